"""The kinds of quantization, against NumPy by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lojax.quantized.code_books import NF4, dynamic_map
from lojax.quantized.formats import (
    KINDS,
    _decode_by_gather,
    _decode_by_selects,
    _nearest,
    _nearest_of_many,
    leading_axes,
    make_format,
    pack,
    unpack,
)
from lojax.quantized.quantized import quantize_weight

RNG = np.random.default_rng(0)
SHAPES = [(64, 64), (3, 128, 64), (7, 5), (1,), (2, 3, 40), (128,), (8, 512, 4), (256, 256)]


def by_hand(w: np.ndarray, block: int) -> np.ndarray:
    """NF4 without double quantization: every entry is the nearest of 16 values times the largest of its block."""
    flat, out = w.reshape(-1).astype(np.float64), []
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        scale = np.abs(part).max()
        nearest = NF4[np.abs(part[:, None] / (scale or 1) - NF4[None].astype(np.float64)).argmin(1)]
        out.append(nearest * scale)
    return np.concatenate(out).reshape(w.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [64, 32])
def test_nf4_by_hand(shape, block):
    w = RNG.normal(size=shape).astype(np.float32)
    q = quantize_weight(jnp.asarray(w), make_format("nf4", block=block, double=False))
    np.testing.assert_allclose(q.dense(), by_hand(w, block), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
def test_what_comes_back_is_near(kind, shape, double):
    w = RNG.normal(size=shape).astype(np.float32)
    q = quantize_weight(jnp.asarray(w), make_format(kind, double=double))
    assert (q.shape, q.dtype) == (shape, jnp.float32)
    # Half of the widest gap between two values, of the scale of the block; and what rounding the scale adds.
    gap = {"nf4": 0.16, "int4": 1 / 14 + 0.01, "int8": 1 / 254, "float8_e4m3fn": 1 / 16}[kind]
    error = np.abs(np.asarray(q.dense()) - w).max()
    assert error <= gap * np.abs(w).max() + (0.1 if double and kind in ("nf4", "int4") else 0)


@pytest.mark.parametrize("nearest", [_nearest, _nearest_of_many])
@pytest.mark.parametrize("book", [NF4, dynamic_map()], ids=["nf4", "dynamic map"])
def test_the_nearest_value_of_all_and_of_two_the_first(nearest, book):
    middles = (book[:-1] + book[1:]) / np.float32(2)
    beside = [np.nextafter(x, np.float32(side)) for x in (middles, book) for side in (-3, 3)]
    x = np.concatenate([book, middles, *beside, RNG.uniform(-1.1, 1.1, 1000)]).astype(np.float32)
    expected = np.abs(x[:, None] - book).argmin(1)
    np.testing.assert_array_equal(jax.jit(lambda x: nearest(x, book))(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dtype_stays(kind, dtype):
    q = quantize_weight(jnp.ones((8, 64), dtype), make_format(kind))
    assert q.dense().dtype == dtype
    np.testing.assert_allclose(q.dense().astype(jnp.float32), 1, rtol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_zeros_comes_back_as_zeros(kind):
    w = jnp.zeros((4, 64)).at[1].set(jnp.linspace(-1, 1, 64))
    dense = quantize_weight(w, make_format(kind, double=False)).dense()
    np.testing.assert_array_equal(dense[0], 0)
    assert np.isfinite(dense).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [True, False])
def test_one_entry_of_a_stack_is_that_entry(kind, double):
    """Every stored array has the leading axes: cut to one layer, they are that layer, to the bit."""
    w = jnp.asarray(RNG.normal(size=(3, 256, 128)), jnp.float32)
    format = make_format(kind, double=double)
    q = quantize_weight(w, format)
    assert format.leading_of_scales(q.shape) >= 1
    for i in range(3):
        arrays = {name: x[i] for name, x in q.arrays.items()}
        one = format.dequantize(arrays["codes"], format.decode_scales(arrays), q.shape[1:], q.dtype)
        np.testing.assert_array_equal(one, q.dense()[i])


def test_both_decoders_give_the_code_book():
    codes = jnp.arange(16, dtype=jnp.uint8)
    for decode in (_decode_by_gather, _decode_by_selects):
        np.testing.assert_array_equal(decode(codes), NF4)


def test_two_codes_share_a_byte_the_first_in_the_high_half():
    codes = jnp.asarray([1, 2, 15, 0], jnp.uint8)
    assert pack(codes).tolist() == [0x12, 0xF0]
    assert unpack(pack(codes)).tolist() == codes.tolist()


def test_gaussian_weights_lose_what_the_paper_says():
    """NF4 of Gaussian weights: a relative error of 0.0930 at most, doubly quantized, in 0.52 bytes each."""
    w = jnp.asarray(RNG.normal(size=(1024, 1024)), jnp.float32)
    q = quantize_weight(w, make_format("nf4"))
    assert float(jnp.linalg.norm(q.dense() - w) / jnp.linalg.norm(w)) < 0.0930
    assert q.nbytes / q.size < 0.52
    assert sum(x.nbytes for x in jax.tree.leaves(q)) == q.nbytes


def test_the_dynamic_map_has_seven_decades_of_either_sign():
    values = dynamic_map()
    assert values.shape == (256,)
    assert (np.diff(values) > 0).all()
    assert values[-1] == 1
    assert 0 in values
    positive = values[(values > 0) & (values < 1)]
    np.testing.assert_array_equal(np.sort(-positive), values[values < 0])
    assert [int(((positive > 10.0 ** (e - 7)) & (positive <= 10.0 ** (e - 6))).sum()) for e in range(7)] == [
        2**e for e in range(7)
    ]


def test_leading_axes_hold_whole_blocks():
    for shape in SHAPES:
        k = leading_axes(shape, 64)
        assert math.prod(shape[k:]) % 64 == 0 or k == 0
