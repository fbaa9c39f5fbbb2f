"""A checkpoint with 4-bit weights as a base: the file that bitsandbytes wrote, and what ``lojax quantize`` writes."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message

import lojax
from lojax.base.bitsandbytes_files import part_names, to_tensors, weight_names
from lojax.cli.quantize_files import quantize
from lojax.files import safetensors

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.safetensors"
FILE = safetensors.open_file(GOLDEN)


def test_the_file_of_bitsandbytes_to_the_bit():
    tree = lojax.load_bitsandbytes(GOLDEN)
    weights = weight_names(FILE.entries)
    parts = {part for name in weights for part in part_names(name, FILE.entries)}
    assert sorted(tree) == sorted({*weights, *(FILE.entries.keys() - parts)})
    for name in weights:
        assert isinstance(tree[name], lojax.Quantized)
        # What bitsandbytes dequantized it to, and the bytes that it wrote.
        np.testing.assert_array_equal(np.asarray(tree[name].dense()), FILE.read(f"{name}.dense"))
        for key, value in to_tensors(name, tree[name]).items():
            assert value.tobytes() == FILE.read(key).tobytes(), key
        assert isinstance(tree[f"{name}.dense"], jax.Array)


def test_a_base_from_shards_trains(tmp_path):
    """The parts of a weight may lie in two files."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(64, 64)).astype(np.float32) / 8 for name in ("up.weight", "down.weight")}
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    safetensors.write_all(whole / "model.safetensors", {**weights, "bias": np.ones(64, np.float32)}, {})
    quantize(whole, out)
    file = safetensors.open_file(out / "model.safetensors")
    split = tmp_path / "split"
    split.mkdir()
    names = sorted(file.entries)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, held in shards.items():
        safetensors.write_all(split / shard, {name: file.read(name) for name in held}, {})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tree, again = lojax.load_bitsandbytes(str(split)), lojax.load_bitsandbytes(out)
    jax.tree.map(np.testing.assert_array_equal, tree, again)
    net = lambda p, x: jnp.tanh(x @ p["up.weight"].T + p["bias"]) @ p["down.weight"].T
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    model = lojax.wrap(net, "*.weight", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), tree, x)
    expected = lojax.quantize({k: jnp.asarray(w) for k, w in weights.items()}, "nf4")
    plain = net({"bias": tree["bias"], **{k: w.dense() for k, w in expected.items()}}, x)
    np.testing.assert_allclose(model.apply(frozen, lora, x), plain, rtol=1e-5, atol=1e-5)


def test_bad_input(tmp_path):
    assert "no .safetensors file" in message(FileNotFoundError, lojax.load_bitsandbytes, tmp_path)
    tensors = {name: FILE.read(name) for name in part_names("odd.weight", FILE.entries)}
    del tensors["odd.weight.absmax"]
    safetensors.write_all(tmp_path / "model.safetensors", tensors, {})
    text = message(ValueError, lojax.load_bitsandbytes, tmp_path)
    assert f"{tmp_path / 'model.safetensors'}: tensor 'odd.weight.absmax' is missing" in text


@pytest.mark.peer
def test_what_bitsandbytes_reads_is_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    tensors = {"w": packed, **{f"w.{name}": value for name, value in state.as_dict(packed=True).items()}}
    arrays = {name: np.asarray(value.detach()) for name, value in tensors.items()}
    safetensors.write_all(tmp_path / "model.safetensors", arrays, {})
    loaded = lojax.load_bitsandbytes(tmp_path)
    assert list(loaded) == ["w"]
    expected = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(np.asarray(loaded["w"].dense()), expected, rtol=1e-6, atol=0)
