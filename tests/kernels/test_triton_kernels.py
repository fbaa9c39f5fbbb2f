"""The kernels for a GPU, run by the interpreter, against the formula in float64."""

import functools

import jax
import numpy as np

from lojax.kernels import triton_backward, triton_cotangents, triton_product, triton_thin
from tests.kernels.matrices import (
    DTYPES,
    SMALL_PARTS,
    SMALL_STEPS,
    SMALL_TILES,
    assert_close,
    every_shape_and_dtype,
    formula,
    layer_operands,
    rounded,
)


def small(kernel, **settings):
    return functools.partial(kernel, interpret=True, **settings)


@every_shape_and_dtype
def test_the_forward_kernels(shape, dtype):
    m = shape[1]
    x, w, a, b, g = layer_operands(shape, dtype)
    y, *_ = formula(x, w, a, b, g)

    @jax.jit
    def forward(x, w, a, b):
        h = small(triton_thin.thin_product, steps=SMALL_STEPS)(x, a)
        return h, small(triton_product.product_with_update, tiles=SMALL_TILES)(x, w, h, b)

    h, got = forward(x, w, a, b)
    assert h.dtype == got.dtype == dtype
    assert_close(h, rounded(x, dtype) @ rounded(a, dtype), dtype, m)
    assert_close(got, y, dtype, m)


@every_shape_and_dtype
def test_the_backward_kernels(shape, dtype):
    tokens, m, n, _ = shape
    x, w, a, b, g = layer_operands(shape, dtype)
    _, dx, da, db = formula(x, w, a, b, g)
    h = triton_thin.thin_product(x, a, interpret=True)

    @jax.jit
    def backward(x, w, a, b, g, h):
        u = small(triton_thin.thin_product, steps=SMALL_STEPS, transposed=True)(g, b)
        return u, small(triton_backward.gradients, tiles=SMALL_TILES)(g, x, w, h, u, a)

    u, got = backward(x, w, a, b, g, h)
    assert_close(u, rounded(g, dtype) @ rounded(b, dtype).T, dtype, n)
    for value, expected, terms in zip(got, (dx, da, db), (n, tokens + n, tokens + m), strict=True):
        assert_close(value, expected, dtype, terms)


@every_shape_and_dtype
def test_cotangents(shape, dtype):
    tokens, m, n, _ = shape
    x, w, a, b, g = layer_operands(shape, dtype)
    *_, db = formula(x, w, a, b, g)
    h = triton_thin.thin_product(x, a, interpret=True)
    u, got = jax.jit(small(triton_cotangents.cotangents, parts=SMALL_PARTS))(g, h, b)
    assert u.dtype == dtype and got.dtype == b.dtype
    assert_close(u, rounded(g, dtype) @ rounded(b, dtype).T, dtype, n)
    assert_close(got, db, dtype, tokens + m)


def test_an_update_of_zero_leaves_the_product_as_it_is():
    """With B = 0 the sum of the base's product and the update is that product, bit for bit."""
    x, w, a, b, _ = layer_operands((50, 40, 70, 8), DTYPES[1])
    kernel = small(triton_product.product_with_update, tiles=SMALL_TILES)
    h = triton_thin.thin_product(x, a, interpret=True)
    alone, with_zero = kernel(x, w, 0 * h, b), kernel(x, w, h, 0 * b)
    np.testing.assert_array_equal(np.asarray(alone, np.float32), np.asarray(with_zero, np.float32))
