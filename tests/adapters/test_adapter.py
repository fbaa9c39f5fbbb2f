"""`Adapter`: two trainable leaves, everything else static."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lojax import Adapter
from lojax.adapters.adapter import is_adapter


def adapter(**changes):
    fields = {"a": jnp.ones((4, 2)), "b": jnp.zeros((2, 3)), "scale": 2.0, "axes": ("in", "out")}
    return Adapter(**(fields | changes))


def test_only_the_factors_are_leaves():
    leaves = jax.tree_util.tree_leaves_with_path(adapter())
    assert [jax.tree_util.keystr(keys) for keys, _ in leaves] == [".a", ".b"]


def test_scale_axes_and_dropout_are_static():
    for change in ({"scale": 1.0}, {"axes": ("out", "in")}, {"dropout": 0.1}):
        assert jax.tree.structure(adapter()) != jax.tree.structure(adapter(**change)), change


def test_it_passes_through_jit_and_tree_map_whole():
    doubled = jax.jit(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x))(adapter(dropout=0.5))
    assert is_adapter(doubled)
    assert (doubled.scale, doubled.axes, doubled.dropout) == (2.0, ("in", "out"), 0.5)
    assert (doubled.a == 2).all()


def test_rank_looks_inside_a_box():
    assert adapter().rank == 2
    assert adapter(a=nn.Partitioned(jnp.ones((4, 5)), names=("x", None))).rank == 5
