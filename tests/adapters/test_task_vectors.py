"""Pruning, dropping and electing signs, on numbers small enough to check by eye."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.task_vectors import drop_and_rescale, keep_largest, sum_where_signs_agree


def test_pruning_keeps_the_largest_of_each_weight():
    x = jnp.asarray([[[1.0, -5.0, 2.0, 0.5], [9.0, 8.0, 7.0, -10.0]]])
    np.testing.assert_array_equal(keep_largest(x, 0.5), [[[0, -5, 2, 0], [9, 0, 0, -10]]])


def test_dropping_keeps_the_mean():
    x = jnp.ones((1, 1, 200_000))
    dropped = np.asarray(drop_and_rescale(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, 4.0}
    assert abs(dropped.mean() - 1) < 0.02


def test_signs_are_elected():
    x = jnp.asarray([[3.0, 1.0], [-1.0, -1.0], [-1.0, 4.0]])
    ones = jnp.ones(3)
    np.testing.assert_allclose(sum_where_signs_agree(x, ones, "total"), [3.0, 2.5])
    np.testing.assert_allclose(sum_where_signs_agree(x, ones, "frequency"), [-1.0, 2.5])
