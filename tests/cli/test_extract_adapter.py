"""``python -m lojax extract``: merged into its base, the adapter gives the tuned model back."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from helpers import message

from lojax.cli.extract_adapter import extract
from lojax.cli.main import main
from lojax.cli.merge_files import merge
from lojax.cli.quantize_files import quantize
from lojax.files import safetensors
from tests.cli.test_merge_files import read, sharded, written

SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.self_attn.q_proj.bias": (8,),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
    "model.norm.bias": (8,),
    "lm_head.weight": (20, 8),
}


def models(tmp_path, shapes=SHAPES, same=()):
    rng = np.random.default_rng(0)
    before = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    after = {name: x if name in same else x + rng.normal(size=x.shape).astype(np.float32) for name, x in before.items()}
    return written(tmp_path / "base.safetensors", before), written(tmp_path / "tuned.safetensors", after), before, after


def merged(tmp_path, base, adapter) -> dict[str, np.ndarray]:
    merge(base, adapter, tmp_path / "merged", overwrite=(tmp_path / "merged").exists())
    return read(tmp_path / "merged" / base.name)


def config(adapter) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text())


def test_at_full_rank_the_tuned_model_comes_back(tmp_path, capsys):
    base, tuned, _, after = models(tmp_path)
    out = tmp_path / "adapter"
    assert main(["extract", str(base), str(tuned), str(out), "--rank", "100", "--full", "--task", "CAUSAL_LM"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "4 adapters of rank 8, with 100.0% of the change of their weights (of its square)."
    assert lines[2].startswith("Stored whole: model.embed_tokens.weight, ") and len(lines) == 3
    for name, value in merged(tmp_path, base, out).items():
        np.testing.assert_allclose(value, after[name], atol=1e-5, err_msg=name)
    fields = config(out)
    assert (fields["r"], fields["lora_alpha"], fields["task_type"]) == (8, 8, "CAUSAL_LM")
    assert fields["target_modules"] == ["q_proj", "up_proj"] and fields["bias"] == "lora_only"
    assert fields["modules_to_save"] == ["lm_head", "model.embed_tokens", "model.norm"]


def test_what_is_left_out_is_named(tmp_path, capsys):
    base, tuned, before, after = models(tmp_path, same=("model.norm.bias", "lm_head.weight"))
    out = tmp_path / "adapter"
    assert main(["extract", str(base), str(tuned), str(out), "--rank", "3"]) == 0
    text = capsys.readouterr().out
    assert "Changed too, and left out: model.embed_tokens.weight, " in text and "--full stores them whole." in text
    assert "lm_head" not in text and "model.norm.bias" not in text
    result = merged(tmp_path, base, out)
    change = squares = 0.0
    for name, value in result.items():
        if "proj.weight" not in name:
            np.testing.assert_array_equal(value, before[name])
            continue
        u, s, vt = np.linalg.svd(after[name].astype(np.float64) - before[name], full_matrices=False)
        np.testing.assert_allclose(value - before[name], (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
        change, squares = change + (s[:3] ** 2).sum(), squares + (s**2).sum()
    assert f"4 adapters of rank 3, with {change / squares:.1%} of the change" in text


def test_energy_gives_each_weight_its_rank(tmp_path):
    base, tuned, before, after = models(tmp_path)
    result = extract(base, tuned, tmp_path / "adapter", energy=0.8)
    for name, rank in result.ranks.items():
        s = np.linalg.svd(after[name].astype(np.float64) - before[name], compute_uv=False) ** 2
        assert rank == next(k for k in range(1, 9) if s[:k].sum() >= 0.8 * s.sum())
    assert len({*result.ranks.values()}) > 1 and config(tmp_path / "adapter")["rank_pattern"]
    rebuilt = merged(tmp_path, base, tmp_path / "adapter")
    for name in result.ranks:
        error = np.linalg.norm(rebuilt[name] - after[name]) ** 2 / np.linalg.norm(after[name] - before[name]) ** 2
        assert error <= 0.2 + 1e-6


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        ({"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8)}, {"targets": ["*"]}),
        ({"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_fc.weight": (8, 32)}, {"fan_in_fan_out": True}),
        ({"conv1.weight": (6, 4, 3, 3), "fc.weight": (5, 6)}, {}),
    ],
    ids=["embedding", "conv1d", "conv"],
)
def test_other_kinds_of_weights_come_back_too(shapes, settings, tmp_path):
    base, tuned, _, after = models(tmp_path, shapes)
    result = extract(base, tuned, tmp_path / "adapter", rank=100, **settings)
    assert result.ranks.keys() == shapes.keys() and result.kept == pytest.approx(1)
    for name, value in merged(tmp_path, base, tmp_path / "adapter").items():
        np.testing.assert_allclose(value, after[name], atol=1e-5, err_msg=name)


def test_shards_and_a_base_in_4_bits(tmp_path):
    shapes = {f"layers.{i}.up_proj.weight": (64, 64) for i in range(3)}
    base, _, _, after = models(tmp_path, shapes)
    sharded(tmp_path / "shards", after)
    quantize(base, tmp_path / "nf4")
    extract(tmp_path / "nf4", tmp_path / "shards", tmp_path / "adapter", rank=64)
    dense = merged(tmp_path, tmp_path / "nf4" / base.name, tmp_path / "adapter")
    for name, value in dense.items():
        np.testing.assert_allclose(value, after[name], atol=1e-5)


def test_steps_are_for_large_weights(tmp_path):
    rng = np.random.default_rng(0)
    before = {"up.weight": rng.normal(size=(60, 80)).astype(np.float32)}
    change = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 80)) + 1e-3 * rng.normal(size=(60, 80))
    after = {"up.weight": (before["up.weight"] + change).astype(np.float32)}
    base, tuned = written(tmp_path / "base.safetensors", before), written(tmp_path / "tuned.safetensors", after)
    assert extract(base, tuned, tmp_path / "adapter", rank=2, steps=4).kept > 0.9999


def test_memory_stays_near_the_largest_tensor(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.up_proj.weight": (256, 256) for i in range(24)}
    before = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    after = {name: x + rng.normal(size=(256, 1)).astype(np.float32) for name, x in before.items()}
    base, tuned = written(tmp_path / "base.safetensors", before), written(tmp_path / "tuned.safetensors", after)
    del before, after
    tracemalloc.start()
    extract(base, tuned, tmp_path / "adapter", rank=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 256 * 256 * 4 < base.stat().st_size


def test_what_extract_refuses(tmp_path, capsys):
    base, tuned, _, after = models(tmp_path)
    out = tmp_path / "adapter"
    assert main(["extract", str(base), str(tuned), str(out)]) == 1
    assert "Pass rank=, energy=, or both" in capsys.readouterr().err
    assert "--targets '*.q' matches no weight" in message(
        ValueError, extract, base, tuned, out, rank=1, targets=["*.q"]
    )
    assert "none of the 4 weights to adapt differs" in message(ValueError, extract, base, base, out, rank=1)
    name = "model.layers.0.mlp.up_proj.weight"
    other = written(tmp_path / "other.safetensors", {**after, name: np.ones((13, 8), np.float32)})
    assert f"{name} is (12, 8) in {base} and (13, 8)" in message(ValueError, extract, base, other, out, rank=1)
    nothing = written(tmp_path / "nothing.safetensors", {"a.bias": np.ones(3, np.float32)})
    assert "no '*.weight' of two axes or four in common" in message(ValueError, extract, base, nothing, out, rank=1)
    bad = written(tmp_path / "bad.safetensors", {**after, name: np.full((12, 8), np.nan, np.float32)})
    assert f"{name}: tuned - base holds NaN" in message(ValueError, extract, base, bad, out, rank=1)
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    assert "exists" in message(FileExistsError, extract, base, tuned, out, rank=1)
    assert "which lojax did not write" in message(FileExistsError, extract, base, tuned, out, rank=1, overwrite=True)
    head = written(tmp_path / "head.safetensors", {**after, "score.weight": np.ones((2, 8), np.float32)})
    assert extract(base, head, tmp_path / "more", rank=1).lines()[-1] == (
        "In one of the models alone, and left out: score.weight."
    )
    assert safetensors.open_file(tmp_path / "more" / "adapter_model.safetensors").entries
