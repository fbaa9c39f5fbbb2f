"""4-bit weights in safetensors: every bit of what bitsandbytes wrote, and errors for what it did not."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import message

import lojax
from lojax.base.bitsandbytes_files import STATE, from_tensors, largest_specs, part_names, to_tensors, weight_names
from lojax.files import safetensors
from lojax.quantized.formats import make_format
from lojax.quantized.quantized import Quantized, quantize_weight

FILE = safetensors.open_file(Path(__file__).parent / "golden" / "bitsandbytes.safetensors")
WEIGHTS = {
    "double.weight": ((257, 32), jnp.bfloat16, 32, True),
    "single.weight": ((40, 24), jnp.float32, 64, False),
    "odd.weight": ((7, 5), jnp.float16, 64, True),
}
RNG = np.random.default_rng(0)


def stored(name: str) -> dict[str, np.ndarray]:
    return {key: FILE.read(key) for key in part_names(name, FILE.entries)}


def assert_same_tensors(actual, expected):
    assert sorted(actual) == sorted(expected)
    for key, value in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (value.dtype, value.shape), key
        assert actual[key].tobytes() == value.tobytes(), key


def test_the_weights_of_a_file_are_found():
    assert sorted(weight_names(FILE.entries)) == sorted(WEIGHTS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_bitsandbytes_wrote_is_read(name):
    shape, dtype, block, double = WEIGHTS[name]
    weight = from_tensors(name, stored(name))
    assert (weight.shape, weight.dtype) == (shape, dtype)
    assert weight.format == make_format("nf4", block=block, double=double)
    np.testing.assert_array_equal(weight.dense(), FILE.read(f"{name}.dense"))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_bit_comes_back(name):
    assert_same_tensors(to_tensors(name, from_tensors(name, stored(name))), stored(name))


@pytest.mark.parametrize("shape", [(8, 512, 64), (64, 64), (3, 5), (1, 1), (256, 64)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_lojax_quantized_is_written_and_read(shape, double, dtype):
    w = jnp.asarray(RNG.normal(size=shape), dtype)
    weight = quantize_weight(w, make_format("nf4", double=double))
    tensors = to_tensors("w", weight)
    back = from_tensors("w", tensors)
    assert back.format == weight.format
    jax.tree.map(np.testing.assert_array_equal, back, weight)
    assert jax.tree.structure(back) == jax.tree.structure(weight)
    for key, (kind, largest) in largest_specs("w", shape, weight.format).items():
        assert tensors[key].dtype == kind
        assert tensors[key].shape == largest or (STATE in key and tensors[key].size < largest[0])


def test_a_weight_that_was_read_takes_an_adapter():
    weight = from_tensors("double.weight", stored("double.weight"))
    f = lambda p, x: x @ p["w"].T
    x = jnp.ones((4, 32), jnp.bfloat16)
    model = lojax.wrap(f, "w", rank=2)
    frozen, lora = model.init(jax.random.key(0), {"w": weight}, x)
    assert isinstance(frozen["w"], Quantized)
    np.testing.assert_array_equal(model.apply(frozen, lora, x), f({"w": weight.dense()}, x))


def test_codes_in_a_wider_dtype_are_the_same_bytes():
    tensors = stored("single.weight")
    wide = tensors | {"single.weight": tensors["single.weight"].reshape(-1).view(ml_dtypes.bfloat16).reshape(-1, 1)}
    assert_same_tensors(to_tensors("single.weight", from_tensors("single.weight", wide)), tensors)


# --- what bitsandbytes files do not hold ---


@pytest.mark.parametrize("kind", ["int8", "int4", "float8_e4m3fn"])
def test_other_kinds_are_refused(kind):
    text = message(ValueError, to_tensors, "w", quantize_weight(jnp.ones((64, 64)), make_format(kind)))
    assert f"w: kind='{kind}' is one that files of bitsandbytes do not hold" in text and "'nf4'" in text


def test_other_blocks_dtypes_and_stacks_are_refused():
    text = message(ValueError, to_tensors, "w", quantize_weight(jnp.ones((64, 64)), make_format("nf4", block=16)))
    assert "w: has blocks of 16; bitsandbytes knows blocks of 32, 64, 128" in text
    weight = quantize_weight(jnp.ones((64, 64)), make_format("nf4"))
    odd = Quantized(weight.arrays, weight.format, weight.shape, jnp.float8_e4m3fn)
    assert "w: is a weight of float8_e4m3fn; bitsandbytes quantizes 'float16'" in message(
        ValueError, to_tensors, "w", odd
    )
    one, two = (quantize_weight(i * jnp.ones((256, 64)), make_format("nf4")) for i in (1, 2))
    arrays = jax.tree.map(lambda *x: jnp.stack(x), one.arrays, two.arrays)
    stack = Quantized(arrays, one.format, (2, 256, 64), jnp.float32)
    text = message(ValueError, to_tensors, "w", stack)
    assert "w: is a stack" in text and "from 1.0 to 2.0" in text


# --- damaged files ---


def spoiled(name: str, changes: dict) -> str:
    """The error for a golden weight with other tensors; None takes one out, a function changes it."""
    tensors = stored(name)
    for suffix, change in changes.items():
        array = tensors.pop(name + suffix, None)
        if change is not None:
            tensors[name + suffix] = change(array) if callable(change) else change
    text = message(ValueError, lambda: from_tensors(name, tensors, where="model.safetensors"))
    assert text.startswith(f"model.safetensors: tensor '{name}"), text
    assert text.endswith("Fetch the file or quantize the weight again.")
    return text


def edit(**fields):
    """A change of the JSON; None takes a field out."""

    def change(array: np.ndarray) -> np.ndarray:
        kept = {key: value for key, value in (json.loads(array.tobytes()) | fields).items() if value is not None}
        return np.frombuffer(json.dumps(kept).encode(), np.uint8)

    return {STATE + "nf4": change}


@pytest.mark.parametrize("suffix", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_tensor(suffix):
    assert f"'double.weight{suffix}' is missing from a 4-bit weight" in spoiled("double.weight", {suffix: None})


def test_no_state_and_two():
    assert "has 0 tensors quant_state.bitsandbytes__*" in spoiled("double.weight", {STATE + "nf4": None})
    assert "has 2 tensors" in spoiled("double.weight", {STATE + "fp4": np.zeros(2, np.uint8)})


@pytest.mark.parametrize(
    ("suffix", "change", "part"),
    [
        ("", lambda x: x[:-1], "uint8[4111,1]; a weight of shape (257, 32) in blocks of 32 has uint8[4112,1]"),
        (".absmax", lambda x: x[:-1], "is uint8[256]"),
        (".absmax", lambda x: x.astype(np.float32), "is float32[257]; a weight of shape (257, 32) in blocks of 32 has"),
        (".quant_map", lambda x: x[::-1], "is not the code book of bitsandbytes"),
        (".nested_quant_map", lambda x: x * np.float32(1.01), "is not the code book of bitsandbytes"),
        (".nested_absmax", lambda x: np.repeat(x, 2), "is float32[4]; a weight"),
        (".nested_absmax", lambda x: x * np.float32("nan"), "holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(suffix, change, part):
    assert part in spoiled("double.weight", {suffix: change})


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"quant_type": "fp4"}, "has quant_type 'fp4'; expected 'nf4'"),
        ({"blocksize": 48}, "has blocksize 48; expected 32, 64"),
        ({"blocksize": 64}, "in blocks of 64 has"),
        ({"blocksize": 32.0}, "has blocksize 32.0"),
        ({"blocksize": True}, "has blocksize True"),
        ({"dtype": "float64"}, "has dtype 'float64'; expected 'float16'"),
        ({"dtype": []}, "has dtype []"),
        ({"shape": [257, 33]}, "a weight of shape (257, 33)"),
        ({"shape": [257, -32]}, "has shape [257, -32]"),
        ({"shape": None}, "has shape None; expected the sizes of a weight"),
        ({"shape": [10**30, 10**30]}, "a weight of shape"),
        ({"shape": [10**39] * 64}, "a weight of shape"),
        ({"shape": []}, "has shape []"),
        ({"nested_blocksize": 128}, "has nested_blocksize 128; expected 256"),
        ({"nested_dtype": "float16"}, "has nested_dtype 'float16'; expected 'float32'"),
        ({"nested_offset": None}, "has nested_offset None; expected a float32"),
        ({"nested_offset": 1e300}, "has nested_offset 1e+300"),
        ({"nested_offset": "1"}, "has nested_offset '1'"),
    ],
)
def test_a_description_that_does_not_fit(fields, part):
    assert part in spoiled("double.weight", edit(**fields))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "is not JSON"),
        (b'{"quant_type": "nf4"', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "is not a JSON object: [1]"),
        (b'{"quant_type": "nf4", "quant_type": "nf4"}', "occurs twice"),
        (b'{"nested_offset": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "is not JSON (it is nested too deeply)"),
    ],
)
def test_a_description_that_is_not_json(text, part):
    assert part in spoiled("double.weight", {STATE + "nf4": np.frombuffer(text, np.uint8)})


def test_a_description_of_another_dtype_or_kind():
    assert "expected the bytes of a JSON, uint8" in spoiled("double.weight", {STATE + "nf4": np.zeros(9, np.float32)})
    changes = {STATE + "nf4": None, STATE + "fp4": np.zeros(2, np.uint8)}
    assert "is of type 'fp4'; lojax reads 'nf4'" in spoiled("double.weight", changes)


def test_nested_scales_without_their_description():
    fields = dict.fromkeys(("nested_blocksize", "nested_dtype", "nested_offset"))
    assert "has nested_blocksize None; expected 256" in spoiled("double.weight", edit(**fields))
