"""`Adapter`: two trainable leaves, everything else static."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import serialization

from lojax import Adapter
from lojax.adapters.adapter import is_adapter
from tests.helpers import assert_same_bits


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


# --- its text ---


def test_the_repr_is_one_line():
    whole = adapter(a=jnp.ones((64, 4)), b=jnp.ones((4, 100)), scale=1.0)
    assert repr(whole) == "Adapter((64, 100), rank=4, alpha=4, float32)"
    assert repr(adapter(dropout=0.1, frozen_a=True, scale=0.75)) == (
        "Adapter((4, 3), rank=2, alpha=1.5, float32, lora-fa, dropout=0.1)"
    )
    assert repr(adapter(magnitude=jnp.ones(3))) == "Adapter((4, 3), rank=2, alpha=4, float32, dora)"
    stack = adapter(
        a=jnp.ones((2, 4, 3)), b=jnp.ones((2, 3, 5)), axes=("stack", "in", "out"), scale=(1.0, 2.0), ranks=(3, 1)
    )
    assert repr(stack) == "Adapter((2, 4, 5), ranks=(3, 1), scale=(1.0, 2.0), float32)"
    rows = adapter(a=None, b=None, rows=jnp.ones((3, 5)), tokens=(1, 4, 6))
    assert repr(rows) == "Adapter((?, 5), 3 token rows, float32)"
    shapes = jax.eval_shape(lambda: adapter())
    assert repr(shapes) == "Adapter((4, 3), rank=2, alpha=4, float32)"
    assert repr(adapter(a=nn.Partitioned(jnp.ones((4, 5), jnp.bfloat16), names=("x", None)))) == (
        "Adapter((4, 3), rank=5, alpha=10, bfloat16)"
    )


def test_the_repr_of_what_a_map_over_trees_makes_of_it_shows_its_fields():
    labels = jax.tree.map(lambda _: "train", adapter())
    assert repr(labels) == "Adapter(a='train', b='train', scale=2.0, axes=('in', 'out'))"
    assert "a=" in repr(jax.tree.map(lambda x: jnp.stack([x, x]), adapter()))
    assert repr(jax.tree.map(lambda _: None, adapter())) == "Adapter(scale=2.0, axes=('in', 'out'))"


# --- registered with the libraries that write trees ---


LORA = {
    "w": adapter(a=jnp.arange(8.0).reshape(4, 2), magnitude=jnp.ones(3)),
    "boxed": adapter(
        a=nn.Partitioned(jnp.ones((4, 2)), names=("x", None)), b=nn.Partitioned(jnp.zeros((2, 3)), ("y",))
    ),
    "head": jnp.ones(2),
    "frozen": None,
}


def test_flax_writes_and_reads_it():
    blank = jax.tree.map(jnp.zeros_like, LORA)
    assert_same_bits(serialization.from_bytes(blank, serialization.to_bytes(LORA)), LORA)
    state = serialization.to_state_dict(LORA)
    assert set(state["w"]) == {"a", "b", "magnitude"}
    assert_same_bits(serialization.from_state_dict(blank, state), LORA)


def test_flax_refuses_what_another_adapter_wrote():
    written = serialization.to_bytes({"w": adapter()})
    with pytest.raises(ValueError, match=r"holds the arrays a, b, and the target a, b, magnitude"):
        serialization.from_bytes({"w": adapter(magnitude=jnp.ones(3))}, written)
    with pytest.raises(ValueError, match=r"for a has shape \(4, 2\), and the target's has \(4, 5\)"):
        serialization.from_bytes({"w": adapter(a=jnp.ones((4, 5)), b=jnp.ones((5, 3)))}, written)


@pytest.mark.parametrize("change", [{}, {"ranks": (2,), "scale": (0.1,), "frozen_a": True, "dropout": 1 / 3}])
def test_jax_exports_functions_of_it(change):
    pytest.importorskip("flatbuffers")
    lora = {"w": adapter(**change)}
    exported = jax.export.export(jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree)))(lora)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.in_tree == exported.in_tree
    assert_same_bits(loaded.call(lora), jax.tree.map(lambda x: x + 1, lora))


def test_weight_shape_and_trained_arrays():
    assert adapter().weight_shape == (4, 3)
    assert adapter(a=None, b=None, rows=jnp.ones((2, 3)), tokens=(0, 1)).weight_shape == (None, 3)
    assert adapter(magnitude=jnp.ones(3), frozen_a=True).trained_arrays == ("b", "magnitude")
