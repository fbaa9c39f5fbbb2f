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
from conftest import EXAMPLES, tensors

from lojax.quantized.quantized import is_quantized

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
    """A user's environment: this checkout's lojax, no devices that only tests ask for, but quick compilation."""
    paths = [os.environ.get("PYTHONPATH", ""), str(EXAMPLES.parent)]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found["XLA_FLAGS"] = found["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "").strip()
    found["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
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
    # Resumed in a new process, which leaves out to predict in one more: the whole run does that.
    resumed = "import sys, finetune_text as f; f.check_new_process = lambda *_: None; f.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", resumed, *map(str, args)],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "Resuming the run" in done.stdout
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
        (row, seed) for row in ("head", "lora", "lora-nf4", "lora-int8", "lora-all", "full") for seed in (0, 0, 1)
    ]
    head, lora, nf4, int8, every, full = records[::3]
    assert lora["trained"] == nf4["trained"] == int8["trained"]
    assert lora["parameters"] == nf4["parameters"] == int8["parameters"]
    assert full["frozen_bytes"] == 0 < nf4["frozen_bytes"] < int8["frozen_bytes"] < lora["frozen_bytes"]
    assert len({record["training_loss"] for record in (lora, nf4, int8)}) == 3
    assert head["trained"] == 8 * 3 + 3
    assert lora["trained"] == head["trained"] + 2 * 2 * (8 + 8)
    assert every["trained"] > lora["trained"]
    assert full["trained"] == full["parameters"]
    assert head["parameters"] == full["parameters"]
    assert head["optimizer_bytes"] < lora["optimizer_bytes"] < full["optimizer_bytes"]
    assert capsys.readouterr().out.count("(3 seeds)") == 6
    losses = [[record["training_loss"] for record in records[i::3]] for i in range(3)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere.csv"], "no such file"),
        (["--model", "./nowhere"], "neither a directory"),
        (["--predict", "x", "--out", "nowhere"], "holds no finished run"),
        (["--batch", "500"], "do not fill a batch of 500"),
        (["--quantize", "nf5"], "'nf5' is unknown.*nf4"),
        (["--quantize", "nf4", "--compare"], "--quantize is for a single run.*--only lora-nf4"),
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


KINDS = ("nf4", "int4", "int8", "float8_e4m3fn")


def stored(weights: dict[str, np.ndarray], kind: str) -> tuple[int, int]:
    """The bytes of a base in float32 and in a kind, counted by the definition of the kind."""
    before = after = 0
    for name, w in weights.items():
        if name.startswith("pooler"):
            continue
        before += 4 * w.size
        blocks = -(-w.size // 64)
        if w.ndim < 2:
            after += 4 * w.size
        elif kind in ("nf4", "int4"):  # codes, scales of 8 bits, their scales, their mean
            after += -(-w.size // 2) + blocks + 4 * -(-blocks // 256) + 4
        else:  # codes, a scale for each output (torch keeps kernels [out, in]) or column of an embedding
            after += w.size + 4 * w.shape[1 if "embeddings" in name else 0]
    return before, after


@pytest.mark.parametrize(
    ("kind", "new_process"),
    [
        *(pytest.param(kind, False, marks=[pytest.mark.slow] * (kind not in ("nf4", "int8"))) for kind in KINDS),
        pytest.param("nf4", True, marks=pytest.mark.slow),
    ],
)
def test_run_on_a_quantized_base(kind, new_process, tmp_path, one_layer_bert, table, capsys, monkeypatch):
    def in_this_process(folder, text, logits, classes):
        restored = text_report.read_prediction(finetune_text.predict(folder, text), classes)
        np.testing.assert_allclose(restored, text_report.softmax(logits), atol=2e-4)

    if not new_process:  # one is enough; what it does is the same for every kind
        monkeypatch.setattr(finetune_text, "check_new_process", in_this_process)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    args = [*own(one_layer_bert, table), "--steps", "4", "--learning-rate", "0.03", "--out", str(tmp_path)]
    finetune_text.main([*args, "--quantize", kind])
    output = capsys.readouterr().out
    before, after = stored(tensors(1), kind)
    assert f"The base in {kind}: {before:,} bytes before, {after:,} after" in output
    assert "Merged against adapted on 24 test rows: 100.00% the same" in output
    assert ("restored in a new process" in output) == new_process
    assert json.loads((tmp_path / "settings.json").read_text())["quantize"] == kind
    finetune_text.main(["--predict", "a green bird", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.split("\n")
    assert sorted(line.split()[1] for line in lines if line) == ["blue", "green", "red"]


def test_quantized_base_holds_every_kernel_and_embedding_but_the_head(tmp_path, one_layer_bert, table):
    args = [*own(one_layer_bert, table), "--quantize", "nf4"]
    task = finetune_text.make_task(finetune_text.parse(args))
    settings = finetune_text.make_settings("lora", 0, task, finetune_text.parse(args))
    _, variables = finetune_text.load(task.directory, settings)
    _, floats = finetune_text.load(task.directory, dataclasses.replace(settings, quantize=None))
    head, base = variables["params"].pop("classifier"), variables["params"]
    jax.tree.map(np.testing.assert_array_equal, head, floats["params"].pop("classifier"))
    kept = jax.tree.leaves(base, is_leaf=is_quantized)
    wide = [leaf for leaf in jax.tree.leaves(floats["params"]) if leaf.ndim > 1]
    assert sum(map(is_quantized, kept)) == len(wide) == 3 + 6
    assert not any(leaf.ndim > 1 for leaf in kept if not is_quantized(leaf))


def test_unfinished_run_on_another_base_is_not_mixed_in(tmp_path, one_layer_bert, table):
    args = [*own(one_layer_bert, table), "--out", str(tmp_path)]
    for there, now in ((None, "nf4"), ("nf4", "int8"), ("int8", None)):
        parsed = finetune_text.parse([*args, *(["--quantize", there] if there else [])])
        settings = finetune_text.make_settings("lora", 0, finetune_text.make_task(parsed), parsed)
        training.prepare(tmp_path, settings, fresh=True)
        message = rf"other settings \(quantize: {there!r} there, {now!r} now\)"
        with pytest.raises(SystemExit, match=message):
            finetune_text.main([*args, *(["--quantize", now] if now else [])])


def test_compare_trains_the_rows_that_are_asked_for(tmp_path, one_layer_bert, table, capsys):
    args = [*own(one_layer_bert, table), "--steps", "1", "--out", str(tmp_path), "--compare"]
    finetune_text.main([*args, "--only", "lora-int8"])
    assert [record["method"] for record in json.loads((tmp_path / "compare.json").read_text())] == ["lora-int8"]
    with pytest.raises(SystemExit):
        finetune_text.parse([*args, "--only", "lora-int7"])
    assert "no row 'lora-int7'; expected some of head, lora, lora-nf4" in capsys.readouterr().err
