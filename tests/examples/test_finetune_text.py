"""The main job end to end on a tiny net: it trains, survives a kill, predicts and compares."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import finetune_text
import jax
import numpy as np
import pytest
import text_report
import text_training as training
from conftest import EXAMPLES

SCRIPT = EXAMPLES / "finetune_text.py"
SMALL = ["--length", "12", "--rank", "2", "--batch", "8", "--accumulate", "2"]


def own(one_layer_bert: Path, table: Path) -> list[str]:
    data = [
        "--model",
        str(one_layer_bert),
        "--data",
        str(table),
        "--text",
        "body",
        "--label",
        "folder",
    ]
    return [*data, *SMALL]


def command(*args: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, args)]


def environment() -> dict[str, str]:
    """A user's environment: this checkout's lojax, and no devices that only tests ask for."""
    paths = [os.environ.get("PYTHONPATH", ""), str(EXAMPLES.parent)]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found.pop("XLA_FLAGS", None)
    return found


def call(*args: object) -> str:
    done = subprocess.run(command(*args), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def history(folder: Path) -> dict:
    return json.loads((folder / "history.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_layer_bert, table):
    """The folder and the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    options = ["--epochs", "8", "--save-every", "30", "--learning-rate", "0.03"]
    args = [*own(one_layer_bert, table), *options, "--out", folder]
    return folder, args, call(*args)


def test_run_leaves_adapter_curves_and_history(finished):
    folder, _, output = finished
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "adapter").exists()
    assert not (folder / "unfinished").exists()
    assert len(history(folder)["losses"]) == 8 * 12
    assert len(history(folder)["epochs"]) == 8
    assert "trainable params: " in output
    assert "Merged against adapted on 24 test rows: 100.00% the same" in output
    assert "restored in a new process" in output


def test_run_learns(finished):
    epochs = history(finished[0])["epochs"]
    assert epochs[-1]["loss"] < 0.8 * epochs[0]["loss"]


def test_killed_and_resumed_run_ends_with_the_same_bits(finished, tmp_path):
    whole, args, _ = finished
    folder = tmp_path / "killed"
    args = [*args[:-1], folder]
    state = folder / "unfinished" / "state"
    running = subprocess.Popen(
        command(*args),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    limit = time.monotonic() + 120
    while not (state.is_dir() and any(path.name.isdigit() for path in state.iterdir())):
        assert running.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (folder / "history.json").exists()
    assert "Resuming the run" in call(*args)
    assert history(folder) == history(whole)
    text = "a green bird"
    assert finetune_text.predict(folder, text) == finetune_text.predict(whole, text)


def test_prediction_in_this_process_is_the_one_in_the_new_process(finished, one_layer_bert, table):
    folder, args, output = finished
    rows = finetune_text.make_task(finetune_text.parse(list(map(str, args)))).rows
    expected = finetune_text.predict(folder, rows[1][0].text)
    assert expected in output
    assert sorted(line.split()[1] for line in expected.splitlines()) == ["blue", "green", "red"]


def test_unfinished_run_with_other_settings_is_not_mixed_in(tmp_path, one_layer_bert, table):
    training.prepare(tmp_path, training.Settings("lora", 1e-3, epochs=9))
    args = [*own(one_layer_bert, table), "--epochs", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"other settings.*epochs: 9 there, 1 now.*--fresh"):
        finetune_text.main(args)


def test_compare_prints_and_writes_a_table(tmp_path, one_layer_bert, table, capsys):
    args = [*own(one_layer_bert, table), "--steps", "4", "--out", str(tmp_path), "--compare"]
    finetune_text.main([*args, "--seeds", "0,0,1"])
    records = json.loads((tmp_path / "compare.json").read_text())
    assert [(record["method"], record["seed"]) for record in records] == [
        (method, seed) for method in ("head", "lora", "lora-all", "full") for seed in (0, 0, 1)
    ]
    head, lora, every, full = records[::3]
    assert head["trained"] == 8 * 3 + 3
    assert lora["trained"] == head["trained"] + 2 * 2 * (8 + 8)
    assert every["trained"] > lora["trained"]
    assert full["trained"] == full["parameters"]
    assert head["parameters"] == full["parameters"]
    assert head["optimizer_bytes"] < lora["optimizer_bytes"] < full["optimizer_bytes"]
    assert capsys.readouterr().out.count("(3 seeds)") == 4
    losses = [[record["training_loss"] for record in records[i::3]] for i in range(3)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere.csv"], "no such file"),
        (["--model", "./nowhere"], "neither a directory"),
        (["--predict", "x", "--out", "nowhere"], "holds no finished run"),
        (["--batch", "500"], "do not fill a batch of 500"),
    ],
)
def test_bad_input_ends_with_one_line(args, message, tmp_path, one_layer_bert, table):
    out = ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        finetune_text.main([*own(one_layer_bert, table), *out, *args])


def test_curves_of_a_single_step(tmp_path):
    epoch = {"step": 1, "test_loss": 0.5, "test_accuracy": 0.5}
    text_report.draw_curves(tmp_path / "c.png", training.History([1.0], [0.5], [epoch]), chance=0.5)
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_loss_is_differentiated_with_respect_to_what_is_trained_alone(one_layer_bert, table):
    args = finetune_text.parse(own(one_layer_bert, table))
    task = finetune_text.make_task(args)
    settings = finetune_text.make_settings("lora", 0, task, args)
    settings = dataclasses.replace(settings, max_steps=4)
    net, variables = finetune_text.load(task.directory, settings)
    before = jax.tree.map(np.array, variables)
    method = training.adapted(finetune_text.make_model(net, settings))
    program = training.build(method, settings, len(task.rows[0]))
    run = training.train(program, variables, task.data, settings)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.state.trained))
    moments = sum(leaf.size for leaf in jax.tree.leaves(run.state.optimizer) if leaf.ndim)
    assert moments == 3 * trained  # two of Adam, one of the accumulated gradients


def test_tuning_never_looks_at_the_test_rows(tmp_path, one_layer_bert, table, capsys, monkeypatch):
    monkeypatch.setattr(finetune_text, "GRID", {"head": (1e-2, 3e-2)})
    args = [*own(one_layer_bert, table), "--out", str(tmp_path), "--tune", "--seeds", "0,1", "--steps", "2"]
    finetune_text.main([*args, "--batch", "4"])
    records = json.loads((tmp_path / "tune.json").read_text())
    assert [(r["seed"], r["learning_rate"]) for r in records] == [(0, 1e-2), (0, 3e-2), (1, 1e-2), (1, 3e-2)]
    best = max((1e-2, 3e-2), key=lambda rate: sum(r["test_accuracy"] for r in records if r["learning_rate"] == rate))
    assert capsys.readouterr().out.strip().endswith(f"| {best:g} |")
    train, test = finetune_text.make_task(finetune_text.parse(args)).rows
    folds = [finetune_text.make_task(finetune_text.parse(args), fold=fold).rows for fold in (0, 1)]
    for kept, held in folds:
        assert held and {row.text for row in (*kept, *held)} == {row.text for row in train}
        assert not {row.text for row in (*kept, *held)} & {row.text for row in test}
    assert folds[0][1] != folds[1][1]
