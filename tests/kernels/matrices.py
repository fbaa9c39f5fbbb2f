"""Operands for kernels and the plain formulas in float64, by NumPy alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lojax.kernels.tiles import Parts, Thin, Tiles

SMALL_TILES = Tiles(rows=16, columns=32, inner=16, warps=4, stages=1, group=2)
SMALL_PARTS = Parts(rows=32, columns=64, step=16, warps=4, stages=1)
SMALL_STEPS = Thin(rows=16, inner=16, warps=4, stages=1)
"""Tiles so small that a small product has many, whole and not."""

SHAPES = [(64, 64, 96, 16), (7, 5, 3, 1), (16, 33, 64, 4), (50, 40, 70, 64), (33, 16, 32, 100), (1, 48, 31, 7)]
"""``(T, m, n, r)``, even and ragged."""
DTYPES = [jnp.float32, jnp.bfloat16]
every_shape_and_dtype = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(
            shape,
            dtype,
            id=f"{shape}-{dtype.__name__}",
            marks=() if i % 2 == j else pytest.mark.slow,  # by default each shape in one dtype
        )
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
    ],
)


def random(seed, dtype, *shapes):
    """Normal arrays of these shapes."""
    return [
        jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape, dtype) for i, shape in enumerate(shapes)
    ]


def layer_operands(shape, dtype, seed=0):
    """``x, w, a, b, g`` of a layer ``(T, m, n, r)``, the factors in float32."""
    tokens, m, n, r = shape
    x, w, g = random(seed, dtype, (tokens, m), (m, n), (tokens, n))
    a, b = random(seed + 1, jnp.float32, (m, r), (r, n))
    return x, w / np.sqrt(m).astype(dtype), a / np.sqrt(m), b / np.sqrt(r), g


def rounded(x, dtype):
    """``x``, rounded to ``dtype``, in float64."""
    return np.asarray(jnp.asarray(np.asarray(x, np.float32)).astype(dtype)).astype(np.float64)


def formula(x, w, a, b, g):
    """y, dx, dA and dB of ``x w + (x a) b`` in float64; h and u are rounded as any factored form rounds them."""
    dtype = x.dtype
    x, w, g, a_, b_ = (rounded(v, dtype) for v in (x, w, g, a, b))
    h, u = rounded(x @ a_, dtype), rounded(g @ b_.T, dtype)
    return x @ w + h @ b_, g @ w.T + u @ a_.T, x.T @ u, h.T @ g


def assert_close(got, expected, dtype, terms):
    """Sums of ``terms`` terms in float32, rounded once; a few entries of h and u may round the other way."""
    largest = np.max(np.abs(expected), initial=0)
    errors = float(jnp.finfo(jnp.float32).eps) * np.sqrt(terms) + (dtype != jnp.float32) * float(jnp.finfo(dtype).eps)
    error = np.max(np.abs(np.asarray(got, np.float64) - expected), initial=0)
    assert error <= errors * largest, f"{error:.2e} of {largest:.2e}, expected at most {errors:.2e} of it"
