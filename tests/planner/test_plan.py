"""Plans: by formula everywhere, compiled where libtpu is installed."""

import json
import subprocess
import sys

import jax
import pytest

from lojax.cli.main import main
from lojax.planner import aot as ahead
from lojax.planner.chips import parse_topology
from lojax.planner.decoder_config import PRESETS, from_fields
from lojax.planner.plan import plan, search

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
}
SMALL = from_fields(LLAMA)


def test_held_bytes_are_exact():
    found = plan("8B", topology="v5e:4x4", mesh="fsdp=16", batch=16, compiled=False)
    assert abs(found.lora.weights - 2 * PRESETS["8B"].parameters / 16) < 1e6  # the rest are norms
    kernels = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    mlp = [(4096, 14336), (4096, 14336), (14336, 4096)]
    factors = 32 * 16 * sum(m + n for m, n in [*kernels.values(), *mlp]) * 4 // 16
    assert found.lora.adapters == factors
    assert abs(found.lora.optimizer - 2 * factors) < 64
    assert found.full.optimizer > 100 * found.lora.optimizer


def test_operations_are_what_arithmetic_says():
    found = plan("8B", topology="v5e:4x4", mesh="fsdp=16", batch=16, compiled=False)
    tokens, n = 16 * 4096, PRESETS["8B"].parameters - 128256 * 4096
    base = 6 * n * tokens / 16  # forward, recomputed, backward to the activations
    assert 1.0 < found.lora.flops / base < 1.25  # attention and the factors
    assert 1.25 < found.full.flops / found.lora.flops < 1.35


def test_the_70b_case_keeps_its_promise():
    found = plan("70B", topology="v5e:16x16", mesh="fsdp=16,tensor=16", batch=16, compiled=False)
    assert found.fits and found.lora.memory <= 8.5e9
    assert (found.lora.adapters + found.lora.optimizer) <= 0.01 * found.lora.memory


def test_search_finds_the_smallest_slice():
    found = search("8B", chip="v5e", batch=4, compiled=False)
    assert str(found.topology) == "v5e:2x2" and found.fits
    assert str(search("405B", chip="v5p", batch=16, compiled=False).topology).startswith("v5p:")


def test_the_table_and_the_json(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    out = tmp_path / "plan.json"
    arguments = ["--config", str(tmp_path), "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--seq", "256"]
    assert main(["plan", *arguments, "--batch", "4", "--estimate", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("weights, GB", "adapters, GB", "optimizer, GB", "saved activations", "temporaries", "fits in", "full"):
        assert word in shown
    kept = json.loads(out.read_text())
    assert kept["topology"] == "v5e:2x2" and kept["lora"]["memory"] > kept["lora"]["weights"]


def test_without_libtpu_the_hint_and_the_estimate(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["lojax.planner.plan"], "has_compiler", lambda: False)
    monkeypatch.setattr(ahead, "has_compiler", lambda: False)
    assert main(["plan", "--preset", "tiny", "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--batch", "4"]) == 0
    assert 'pip install "jax[tpu]"' in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="libtpu, the TPU compiler, is not installed"):
        plan("tiny", topology="v5e:2x2", mesh="fsdp=4", batch=4, compiled=True)


@pytest.mark.slow
@pytest.mark.skipif(not ahead.has_compiler(), reason="libtpu is not installed")
def test_compiled_agrees_with_the_formulas():
    settings = {"topology": "v5e:2x2", "mesh": "fsdp=2,tensor=2", "seq": 1024, "batch": 4, "rank": 8}
    sure, guess = (plan(SMALL, **settings, compiled=compiled) for compiled in (True, False))
    assert sure.lora.compiled and sure.lora.collectives
    for name in ("weights", "adapters", "optimizer", "flops"):
        assert getattr(sure.lora, name) == getattr(guess.lora, name)
    assert 1 / 3 < sure.lora.memory / guess.lora.memory < 3
    assert 1 / 3 < sure.lora.bytes_received / guess.lora.bytes_received < 3


@pytest.mark.slow
@pytest.mark.skipif(not ahead.has_compiler(), reason="libtpu is not installed")
def test_a_mesh_axis_may_take_parts_of_the_torus():
    mesh = ahead.topology_mesh(parse_topology("v5e:4x4"), {"data": 2, "fsdp": 8})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8}
    assert len({tuple(chip.coords) for chip in mesh.devices.flat}) == 16


BAD = {
    "no such chip": (["--topology", "v9:2x2", "--mesh", "fsdp=4"], "unknown chip 'v9'; expected one of v4"),
    "no such slice": (["--topology", "v5e:4x5", "--mesh", "fsdp=20"], "expected one of v5e:1x1, v5e:2x2"),
    "no topology at all": (["--topology", "sixteen", "--mesh", "fsdp=4"], "expected CHIP:SHAPE"),
    "another number of chips": (["--topology", "v5e:2x2", "--mesh", "fsdp=8"], "needs 8 devices, but there are 4"),
    "no such axis": (
        ["--topology", "v5e:2x2", "--mesh", "model=4"],
        "has an axis 'model'; expected data, fsdp, tensor",
    ),
    "no mesh": (["--topology", "v5e:2x2", "--mesh", "four"], "expected AXIS=SIZE"),
    "batch": (
        ["--topology", "v5e:2x2", "--mesh", "fsdp=4", "--batch", "6"],
        "batch=6 is not a multiple of data × fsdp = 4",
    ),
    "sequence": (
        ["--topology", "v5e:2x2", "--mesh", "tensor=4", "--seq", "30"],
        "seq=30 is not a multiple of tensor = 4",
    ),
    "neither": ([], "Give --topology and --mesh"),
    "both": (["--search", "v5e", "--mesh", "fsdp=4"], "leave out --topology and --mesh"),
    "no chip to search": (["--search", "v9"], "chip='v9'; expected one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, capsys):
    arguments, message = BAD[name]
    assert main(["plan", "--preset", "tiny", *arguments, "--estimate"]) == 1
    assert message in capsys.readouterr().err


def test_a_mesh_that_does_not_divide_the_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 1022}))
    arguments = ["--config", str(tmp_path), "--topology", "v5e:2x2", "--mesh", "tensor=4", "--batch", "4", "--estimate"]
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert "layers/mlp/" in error and "1022 is not a multiple of 4" in error


def test_a_model_too_large_for_any_slice():
    huge = from_fields(LLAMA | {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 400})
    with pytest.raises(ValueError, match=r"fits on no slice of v5e up to v5e:16x16 .*Take a chip with more memory"):
        search(huge, chip="v5e", batch=256, compiled=False)


def test_the_command_runs_from_the_shell():
    command = [sys.executable, "-m", "lojax", "plan", "--preset", "tiny", "--topology", "v5e:2x2", "--mesh", "fsdp=4"]
    done = subprocess.run([*command, "--batch", "4", "--estimate"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "full fine-tuning" in done.stdout, done.stderr
    assert jax.device_count() == 8
