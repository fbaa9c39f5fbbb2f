"""The sweep of the main job, end to end on a tiny net."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import EXAMPLES

import lojax

sys.path.insert(0, str(EXAMPLES))
import sweep as example


def arguments(one_layer_bert, table, *more):
    data = ["--model", str(one_layer_bert), "--data", str(table), "--text", "body", "--label", "folder"]
    return [*data, "--length", "12", *map(str, more)]


def test_smoke_run_prints_a_table_and_leaves_a_plot_and_the_best_adapter(tmp_path, one_layer_bert, table, capsys):
    example.main(arguments(one_layer_bert, table, "--smoke", "--out", tmp_path))
    output = capsys.readouterr().out
    header, _, *lines = (tmp_path / "table.txt").read_text().splitlines()
    assert header.split() == ["rank", "alpha", "learning_rate", "runs", "held_out_accuracy", "training_loss"]
    assert len(lines) == 4 and all(line.split()[3] == "2" and line.count("±") == 2 for line in lines)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert len(record["runs"]) == 8 and np.shape(record["losses"]) == (4, 8)
    best = record["runs"][record["best"]]
    assert f"Best: rank {best['rank']}" in output and header in output
    assert "Trained by itself for 4 steps, its losses differ by at most" in output
    job = example.Job(example.parse(arguments(one_layer_bert, table, "--smoke")))
    frozen, _ = job.start(best)
    lora = lojax.restore(tmp_path / "adapter", frozen=frozen)
    assert {leaf.rank for leaf in jax.tree.leaves(lora, is_leaf=_is_adapter) if _is_adapter(leaf)} == {best["rank"]}


def _is_adapter(node):
    return isinstance(node, lojax.Adapter)


def test_runs_learn_and_only_held_out_rows_choose(tmp_path, one_layer_bert, table, monkeypatch):
    settings = ["--rates", "0.03", "--ranks", "2", "--seeds", "0,1", "--steps", "40", "--out", tmp_path]
    seen = []
    monkeypatch.setattr(example, "accuracies", lambda job, *args: seen.append(args[-1]) or np.array([0.1, 0.2]))
    monkeypatch.setattr(example, "check_alone", lambda *_: 0.0)
    args = arguments(one_layer_bert, table, *settings)
    example.main(args)
    losses = np.array(json.loads((tmp_path / "sweep.json").read_text())["losses"])
    assert (losses[-8:].mean(0) < 0.9 * losses[:8].mean(0)).all()
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] == 1
    held_out = example.finetune_text.make_task(example.parse(args), fold=0).data[1]
    assert {row.tobytes() for row in seen[0].tokens} <= {row.tobytes() for row in held_out.tokens}


def test_the_check_sees_another_run(one_layer_bert, table):
    job = example.Job(example.parse(arguments(one_layer_bert, table, "--smoke")))
    run = {"rank": 2, "alpha": 4.0, "learning_rate": 1e-2, "seed": 0}
    with pytest.raises(AssertionError, match="trained alone"):
        example.check_alone(job, run, np.full(2, 0.5))


def test_bad_input_ends_with_one_line(tmp_path, one_layer_bert, table):
    with pytest.raises(SystemExit, match=r"^error: .*do not fill a batch of 500: pass --batch"):
        example.main(arguments(one_layer_bert, table, "--batch", "500", "--out", tmp_path))
    with pytest.raises(SystemExit, match=r"^error: .*no such file"):
        example.main(["--data", "nowhere.csv"])
