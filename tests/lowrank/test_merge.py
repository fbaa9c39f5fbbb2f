"""Merge and unmerge against NumPy in float64, one cast, buffers given away, values refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import lojax
from lojax import Adapter
from lojax.adapters.adapter import is_adapter
from lojax.adapters.paths import flatten
from lojax.lowrank import merge as module
from tests.helpers import assert_same_bits, message

RANK, SCALE = 3, 1.75
CASES = {
    "dense": (("in", "out"), (6, 5), "ir,ro->io"),
    "transposed": (("out", "in"), (5, 6), "ir,ro->oi"),
    "query heads": (("in", "out", "out"), (6, 2, 3), "ir,rhk->ihk"),
    "output heads": (("in", "in", "out"), (2, 3, 6), "hkr,ro->hko"),
    "layers": (("stack", "in", "out"), (4, 6, 5), "sir,sro->sio"),
    "inner stack": (("in", "stack", "out"), (6, 4, 5), "sir,sro->iso"),
    "two stacks": (("stack", "in", "stack", "out"), (2, 6, 4, 5), "tsir,tsro->tiso"),
    "convolution": (("in", "in", "in", "out"), (3, 3, 4, 5), "xyir,ro->xyio"),
}


def make(axes, shape, dtype=np.float32, seed=0):
    """A frozen weight and its adapter, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    shapes = lojax.adapters.adapter.array_shapes(axes, shape, RANK)
    a, b = (rng.normal(size=s).astype(np.float32) for s in (shapes["a"], shapes["b"]))
    return rng.normal(size=shape).astype(dtype), Adapter(a=a, b=b, scale=SCALE, axes=axes)


def by_hand(w, adapter, subscripts, sign=1):
    """``w ± scale * a b`` in float64, and a bound on the rounding of any float32 evaluation of it."""
    w, a, b = (np.asarray(x, np.float64) for x in (w, adapter.a, adapter.b))
    exact = w + sign * adapter.scale * np.einsum(subscripts, a, b)
    size = np.abs(w) + adapter.scale * np.einsum(subscripts, np.abs(a), np.abs(b))
    return exact, (RANK + 3) * np.finfo(np.float32).eps * size


@pytest.mark.parametrize(("axes", "shape", "subscripts"), CASES.values(), ids=CASES)
def test_merge_and_unmerge_by_hand(axes, shape, subscripts):
    w, adapter = make(axes, shape)
    merged = np.asarray(lojax.merge(w, adapter))
    exact, bound = by_hand(w, adapter, subscripts)
    assert merged.dtype == np.float32
    assert (np.abs(merged - exact) <= bound).all()
    assert (np.abs(merged - w) > 10 * bound).mean() > 0.9
    base = np.asarray(lojax.unmerge(merged, adapter))
    exact, bound = by_hand(merged, adapter, subscripts, sign=-1)
    assert (np.abs(base - exact) <= bound).all()
    np.testing.assert_allclose(base, w, atol=4 * bound.max(), rtol=0)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_the_sum_is_in_float32_and_cast_once(dtype):
    w, adapter = make(("in", "out"), (64, 48), dtype)
    rng = np.random.default_rng(1)
    # Integers of nine bits: the update of twenty bits is exact in float32, and needs a cast to this dtype.
    a, b = (rng.integers(-511, 512, size=x.shape).astype(np.float32) for x in (adapter.a, adapter.b))
    adapter = dataclasses.replace(adapter, a=a, b=b / 2**18, scale=0.5)
    delta = np.float32(0.5) * (a @ (b / 2**18))
    assert_same_bits(lojax.merge(w, adapter), (w.astype(np.float32) + delta).astype(dtype))
    assert_same_bits(lojax.unmerge(w, adapter), (w.astype(np.float32) - delta).astype(dtype))
    cast_twice = w + delta.astype(dtype)
    assert (cast_twice.astype(np.float32) != np.asarray(lojax.merge(w, adapter)).astype(np.float32)).mean() > 0.05


def test_low_precision_factors_are_multiplied_in_float32():
    w, adapter = make(("in", "out"), (16, 12))
    low = dataclasses.replace(adapter, a=adapter.a.astype(ml_dtypes.bfloat16), b=adapter.b.astype(ml_dtypes.bfloat16))
    exact, bound = by_hand(w, low, "ir,ro->io")
    assert (np.abs(np.asarray(lojax.merge(w, low)) - exact) <= bound).all()


def test_unmerge_takes_out_what_merge_put_in_to_the_rounding_of_the_weight():
    w, adapter = make(("in", "out"), (32, 24), ml_dtypes.bfloat16)
    merged = lojax.merge(w, adapter)
    back = np.asarray(lojax.unmerge(merged, adapter), np.float64)
    half_ulps = 2.0**-8 * (np.abs(np.asarray(merged, np.float64)) + np.abs(back)) + 1e-6
    assert (np.abs(back - np.asarray(w, np.float64)) <= half_ulps).all()


# --- trees ---


def tree():
    """Every kind of leaf: adapted, boxed, trained in full, frozen, integer, absent."""
    w, adapter = make(("in", "out"), (6, 5))
    v, other = make(("stack", "in", "out"), (2, 6, 5), seed=1)
    rng = np.random.default_rng(2)
    frozen = {
        "adapted": jnp.asarray(w),
        "boxed": nn.Partitioned(jnp.asarray(v), names=("layers", "x", "y")),
        "bias": None,
        "other": jnp.asarray(rng.normal(size=(3, 3)).astype(np.float32)),
        "count": jnp.arange(3),
        "absent": None,
    }
    arrays = jax.tree.map(jnp.asarray, {"adapted": adapter, "boxed": other})
    lora = dict.fromkeys(frozen) | arrays | {"bias": jnp.asarray(rng.normal(size=5).astype(np.float32))}
    return frozen, lora


def test_every_other_leaf_passes_through_bit_for_bit():
    frozen, lora = tree()
    merged = lojax.merge(frozen, lora)
    assert_same_bits([merged[k] for k in ("other", "count", "bias")], [frozen["other"], frozen["count"], lora["bias"]])
    assert merged["absent"] is None
    assert merged["boxed"].names == ("layers", "x", "y")
    assert not np.array_equal(merged["boxed"].value, frozen["boxed"].value)
    assert not any(isinstance(node, Adapter) for node in merged.values())


def test_unmerge_gives_frozen_and_leaves_a_place_for_what_trains_in_full():
    frozen, lora = tree()
    back = lojax.unmerge(lojax.merge(frozen, lora), lora)
    assert jax.tree.structure(back) == jax.tree.structure(frozen)
    assert back["bias"] is None
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, frozen)
    again = lojax.merge(back, lora)
    assert_same_bits(again["bias"], lora["bias"])


def test_merge_composes_with_jit_vmap_and_grad():
    frozen, lora = tree()
    outside = lojax.merge(frozen, lora)
    assert_same_bits(jax.jit(lojax.merge)(frozen, lora), outside)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), lora)
    both = jax.vmap(lojax.merge, in_axes=(None, 0))(frozen, two)
    np.testing.assert_allclose(both["adapted"][0], outside["adapted"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        both["adapted"][1] - frozen["adapted"], 4 * (outside["adapted"] - frozen["adapted"]), rtol=1e-4, atol=1e-5
    )
    grads = jax.grad(lambda lora: lojax.merge(frozen, lora)["adapted"].sum())(lora)
    expected = SCALE * np.asarray(lora["adapted"].b).sum(1)
    np.testing.assert_allclose(grads["adapted"].a, np.broadcast_to(expected, (6, RANK)), rtol=1e-5)


def test_merge_works_on_shapes():
    shapes = jax.eval_shape(lojax.merge, *tree())
    assert shapes["boxed"].value == jax.ShapeDtypeStruct((2, 6, 5), jnp.float32)


def test_a_merged_weight_keeps_the_sharding_of_its_base():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    w, adapter = make(("in", "out"), (8, 6))
    assert lojax.merge(jax.device_put(w, sharding), adapter).sharding.is_equivalent_to(sharding, 2)


# --- donation ---


def test_donation_gives_the_buffers_of_frozen_away_and_those_alone():
    frozen, lora = tree()
    expected = lojax.merge(frozen, lora)
    assert not any(x.is_deleted() for x in jax.tree.leaves((frozen, lora)))
    merged = lojax.merge(frozen, lora, donate=True)
    adapted = [path for path, t in flatten(lora).items() if is_adapter(t)]
    assert adapted and all(x.is_deleted() for x in jax.tree.leaves([flatten(frozen)[path] for path in adapted]))
    assert not any(x.is_deleted() for x in jax.tree.leaves((lora, merged)))
    assert_same_bits(merged, expected)


def test_donated_unmerge_gives_the_buffers_of_params_away():
    frozen, lora = tree()
    merged = lojax.merge(frozen, lora)
    bias = merged.pop("bias")
    back = lojax.unmerge(merged | {"bias": bias}, lora, donate=True)
    adapted = [path for path, t in flatten(lora).items() if is_adapter(t)]
    assert adapted and all(x.is_deleted() for x in jax.tree.leaves([flatten(merged)[path] for path in adapted]))
    assert not any(x.is_deleted() for x in (bias, *jax.tree.leaves(back)))
    np.testing.assert_allclose(back["adapted"], frozen["adapted"], atol=1e-5)


def test_a_donated_merge_needs_no_second_copy_of_the_base():
    w, adapter = make(("in", "out"), (256, 192))
    memory = module._sum_donated.lower(w, adapter).compile().memory_analysis()
    assert memory.alias_size_in_bytes == w.nbytes
    assert module._sum.lower(w, adapter).compile().memory_analysis().alias_size_in_bytes == 0


# --- finite values ---


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_by_path_and_nothing_is_changed(donate, value):
    frozen, lora = tree()
    lora["boxed"] = dataclasses.replace(lora["boxed"], a=lora["boxed"].a.at[1, 0, 0].set(value))
    lora["bias"] = lora["bias"].at[2].set(value)
    before = jax.tree.map(np.array, (frozen, lora))
    assert message(ValueError, lojax.merge, frozen, lora, check_finite=True, donate=donate) == (
        "Merging gives NaN or infinity at bias, boxed. The adapter diverged or the base already held such values; "
        "restore an earlier checkpoint. Nothing was changed."
    )
    assert_same_bits((frozen, lora), before)


def test_an_overflow_in_the_cast_counts_as_infinite():
    w, adapter = make(("in", "out"), (4, 4), np.float16)
    huge = dataclasses.replace(adapter, a=np.full((4, RANK), 300, np.float32), b=np.full((RANK, 4), 300, np.float32))
    text = message(ValueError, lojax.merge, {"w": w}, {"w": huge}, check_finite=True)
    assert text.startswith("Merging gives NaN or infinity at w. ")
    assert np.isinf(np.asarray(lojax.merge(w, huge))).all()


def test_a_long_list_of_bad_paths_is_cut():
    frozen = {f"w{i}": jnp.full((2, 2), jnp.nan) for i in range(8)}
    text = message(ValueError, lojax.merge, frozen, dict.fromkeys(frozen), check_finite=True)
    assert text.startswith("Merging gives NaN or infinity at w0, w1, w2, w3, w4 and 3 more. ")


def test_finite_values_pass_the_check():
    frozen, lora = tree()
    expected = lojax.merge(frozen, lora)
    assert_same_bits(lojax.merge(frozen, lora, check_finite=True), expected)
    assert_same_bits(lojax.merge(frozen, lora, check_finite=True, donate=True), expected)


def test_the_check_cannot_run_under_jit():
    frozen, lora = tree()
    assert message(ValueError, jax.jit(lambda f, t: lojax.merge(f, t, check_finite=True)), frozen, lora) == (
        "check_finite=True reads values, which do not exist under jit: merge outside of jit."
    )


# --- pairs that do not fit ---


@pytest.mark.parametrize(("f", "name"), [(lojax.merge, "frozen"), (lojax.unmerge, "params")])
def test_trees_of_different_structure_are_refused(f, name):
    frozen, lora = tree()
    text = message(ValueError, f, {k: v for k, v in frozen.items() if k != "other"}, lora)
    assert text.startswith(f"{name} and lora have different structure: other is in lora but not in {name}.")
    assert message(ValueError, f, freeze(frozen), lora).startswith(
        f"{name} and lora have the same paths in different containers"
    )


@pytest.mark.parametrize("f", [lojax.merge, lojax.unmerge])
def test_a_weight_of_another_shape_is_refused(f):
    frozen, lora = tree()
    text = message(ValueError, f, frozen | {"adapted": jnp.ones((6, 7))}, lora)
    assert text.startswith("adapted: a weight of shape (6, 7) with axes ('in', 'out') needs an adapter of shapes")
