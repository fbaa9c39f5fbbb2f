"""The kernels for a TPU, run by the interpreter, against the formula in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lojax.kernels import mosaic_cotangents, mosaic_product
from lojax.kernels.mosaic_tile import Blocks
from tests.kernels.matrices import assert_close, every_shape_and_dtype, formula, layer_operands, rounded

BLOCKS = Blocks(rows=32, columns=64, inner=16)
"""Several of each, and none along an axis that is shorter."""


@every_shape_and_dtype
def test_forward_and_the_product_with_an_update(shape, dtype):
    m = shape[1]
    x, w, a, b, g = layer_operands(shape, dtype)
    expected, dx, *_ = formula(x, w, a, b, g)

    @jax.jit
    def run(x, w, a, b, g):
        forms = {"blocks": BLOCKS, "interpret": True}
        y, h = mosaic_product.forward(x, w, a, b, **forms)
        again = mosaic_product.product_with_update(x, w, h, b, **forms)
        u = (g @ b.T.astype(g.dtype)).astype(g.dtype)
        return y, h, again, mosaic_product.product_with_update(g, w, u, a, transposed=True, **forms)

    y, h, again, transposed = run(x, w, a, b, g)
    assert y.dtype == h.dtype == dtype and h.shape == (shape[0], shape[3])
    assert_close(h, rounded(x, dtype) @ rounded(a, dtype), dtype, m)
    assert_close(y, expected, dtype, m)
    assert_close(again, expected, dtype, m)
    assert_close(transposed, dx, dtype, 2 * max(shape))


@every_shape_and_dtype
def test_backward_and_cotangents(shape, dtype):
    tokens, m, n, _ = shape
    x, w, a, b, g = layer_operands(shape, dtype)
    _, dx, _, db = formula(x, w, a, b, g)

    @jax.jit
    def run(x, w, a, b, g):
        h = (x @ a.astype(x.dtype)).astype(x.dtype)
        both = mosaic_product.backward(g, w, h, a, b, blocks=BLOCKS, interpret=True)
        return *both, *mosaic_cotangents.cotangents(g, h, b, block=(16, 128), interpret=True)

    got_dx, u, got_db, u_alone, db_alone = run(x, w, a, b, g)
    expected = rounded(g, dtype) @ rounded(b, dtype).T
    assert_close(u, expected, dtype, n)
    assert_close(u_alone, expected, dtype, n)
    assert_close(got_dx, dx, dtype, 2 * n)
    assert_close(got_db, db, dtype, tokens + m)
    assert_close(db_alone, db, dtype, tokens + m)


def test_rows_that_stay_in_vector_memory():
    x, w, a, b, g = layer_operands((70, 64, 96, 8), jnp.float32)
    y, dx, _, db = formula(x, w, a, b, g)
    forms = {"blocks": dataclasses.replace(BLOCKS, inner=32, resident=True), "interpret": True}

    @jax.jit
    def run(x, w, a, b, g):
        y, h = mosaic_product.forward(x, w, a, b, **forms)
        return y, *mosaic_product.backward(g, w, h, a, b, **forms)

    for got, expected in zip(run(x, w, a, b, g), (y, dx, None, db), strict=True):
        if expected is not None:
            assert_close(got, expected, jnp.float32, 200)


def test_the_interpreter_fills_what_is_over_the_edge_with_nan():
    """So the tests above would see an edge that is not cleared."""
    from jax.experimental import pallas as pl

    copy = functools.partial(
        pl.pallas_call,
        out_shape=jax.ShapeDtypeStruct((8,), "float32"),
        grid=(1,),
        in_specs=[pl.BlockSpec((8,), lambda i: (i,))],
        out_specs=pl.BlockSpec((8,), lambda i: (i,)),
        interpret=True,
    )
    y = copy(lambda x_ref, y_ref: y_ref.__setitem__(..., x_ref[...]))(jnp.ones(5))
    assert jnp.isnan(y[5:]).all() and (y[:5] == 1).all()
