"""Weights and factors as matrices: there and back, against NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lojax import Adapter
from lojax.adapters.adapter import array_shapes
from lojax.adapters.matrices import (
    as_matrices,
    column_squares,
    factor_matrices,
    from_matrices,
    subtract_update,
    truncate_rank,
    unify_scale_and_rank,
    with_factors,
    zero_above_rank,
)

KINDS = {
    "dense": ((6, 5), ("in", "out"), "ir,ro->io"),
    "out first": ((5, 6), ("out", "in"), "ir,ro->oi"),
    "heads": ((6, 2, 3), ("in", "out", "out"), "ir,rho->iho"),
    "stack inside": ((6, 4, 5), ("in", "stack", "out"), "sir,sro->iso"),
    "two of each": ((2, 3, 4, 5, 6), ("out", "in", "stack", "in", "out"), "sijr,srop->oisjp"),
}
RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def make(kind):
    shape, axes, subscripts = KINDS[kind]
    shapes = array_shapes(axes, shape, 2)
    return shape, axes, subscripts, array(*shapes["a"]), array(*shapes["b"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_goes_there_and_back(kind):
    shape, axes, *_ = make(kind)
    w = array(*shape)
    matrices = as_matrices(w, axes)
    entries, m, n = (
        np.prod([s for s, r in zip(shape, axes, strict=True) if r == role]) for role in ("stack", "in", "out")
    )
    assert matrices.shape == (entries, m, n)
    np.testing.assert_array_equal(from_matrices(matrices, axes, shape, w.dtype), w)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_and_weights_are_turned_alike(kind):
    shape, axes, subscripts, a, b = make(kind)
    adapter = Adapter(a, b, 2.0, axes)
    left, right = factor_matrices(adapter)
    update = np.einsum(subscripts, a, b)
    np.testing.assert_allclose(left @ right, as_matrices(jnp.asarray(update), axes), rtol=1e-5, atol=1e-6)
    w = array(*shape)
    np.testing.assert_allclose(subtract_update(w, a, b, 2.0, axes), w - 2 * update, rtol=1e-5, atol=1e-5)
    again = with_factors(adapter, left, right, 2.0)
    np.testing.assert_array_equal(again.a, a)
    np.testing.assert_array_equal(again.b, b)
    assert adapter.weight_shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_column_squares_sum_over_the_in_axes(kind):
    shape, axes, *_ = make(kind)
    w = array(*shape)
    lengths = np.square(as_matrices(w, axes)).sum(1).ravel()
    np.testing.assert_allclose(column_squares(w, axes).ravel(), lengths, rtol=1e-5)


def test_what_is_above_the_rank_of_an_entry_is_zero():
    a = zero_above_rank(jnp.ones((3, 4, 2)), (2, 0, 1), ("stack", "in", "out"))
    assert a.sum(1).tolist() == [[4, 4], [0, 0], [4, 0]]


def test_one_scale_gives_the_same_update():
    a, b = array(3, 4, 2), array(3, 2, 5)
    adapter = Adapter(a, b, (0.5, 1.0, 2.0), ("stack", "in", "out"), ranks=(2, 1, 2))
    plain = unify_scale_and_rank(adapter)
    assert (plain.scale, plain.ranks) == (1.0, None)
    np.testing.assert_allclose(plain.a @ plain.b, np.reshape([0.5, 1, 2], (3, 1, 1)) * (a @ b), rtol=1e-5)


def test_truncation_is_the_truncated_svd():
    a, b = array(2, 7, 4), array(2, 4, 6)
    u, s, vt = np.linalg.svd(np.asarray(a @ b), full_matrices=False)
    left, right = truncate_rank(a, b, 2)
    assert left.shape == (2, 7, 2)
    np.testing.assert_allclose(left @ right, (u[:, :, :2] * s[:, None, :2]) @ vt[:, :2], atol=1e-5)
