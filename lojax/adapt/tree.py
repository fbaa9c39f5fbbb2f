"""The two trees: `frozen` and `lora` have the structure of `params`, with ``None`` for "not here"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapt.adapter import Adapter, is_adapter
from lojax.adapt.axes import Axes, check, convention, factor_shapes, size
from lojax.adapt.boxes import box_factors, unbox
from lojax.adapt.initializers import initializer, key_for, zeros
from lojax.adapt.paths import flatten, is_leaf, map_paths
from lojax.adapt.rule import Rule


def create(
    key: jax.Array, params: Any, plan: Mapping[str, Rule], seen: Mapping[str, Axes] | None = None
) -> tuple[Any, Any]:
    """Splits ``params`` into ``(frozen, lora)`` as ``plan`` says.

    Args:
        key: Consumed: one key per weight is derived from it and the weight's path.
        params: The parameter tree.
        plan: The rule of each parameter that trains (see `lojax.adapt.targets.plan`).
        seen: The axes of weights whose use was seen; the rest take `axes.convention`.
    """
    seen = seen or {}

    def freeze(path: str, leaf: Any) -> Any:
        return None if path in plan and plan[path].train == "full" else leaf

    def train(path: str, leaf: Any) -> Any:
        if path not in plan:
            return None
        rule = plan[path]
        if rule.train == "full":
            return leaf
        return new_adapter(key_for(key, path), path, leaf, rule, seen.get(path))

    return map_paths(freeze, params), map_paths(train, params)


def new_adapter(key: jax.Array, path: str, leaf: Any, rule: Rule, seen: Axes | None) -> Adapter:
    """A fresh adapter for the weight ``leaf`` at ``path``. ``key`` is consumed."""
    shape = tuple(unbox(leaf).shape)
    axes = check(rule.axes or seen or convention(len(shape)), shape, path)
    m, n = size(axes, shape, "in"), size(axes, shape, "out")
    rank = rule.rank
    assert rank is not None
    if rank > min(m, n):
        raise ValueError(
            f"{path}: rank={rank} is above min(m, n) = {min(m, n)} (shape {shape}, axes {axes}: m={m} in, "
            f"n={n} out). Choose a rank of at most {min(m, n)}, or train the weight in full."
        )
    dtype = jnp.dtype(rule.dtype or jnp.float32)
    shape_a, shape_b = factor_shapes(axes, shape, rank)
    a = initializer(rule.init or "kaiming")(key, shape_a, dtype, fan_in=m, rank=rank)
    a, b = box_factors(leaf, axes, a, zeros(shape_b, dtype))
    return Adapter(a=a, b=b, scale=rule.scale, axes=axes, dropout=rule.dropout or 0.0)


def check_pair(frozen: Any, lora: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both trees by path, or an error that names the first path where they do not fit together."""
    left, right = check_structure(frozen, lora)
    for path in left:
        f, t = unbox(left[path]), unbox(right[path])
        if is_adapter(t):
            _check_adapter(path, f, t)
        elif f is not None and t is not None:
            raise ValueError(f"{path} is an array in both frozen and lora; one of them must hold None there.")
    return left, right


def check_structure(frozen: Any, lora: Any, *, name: str = "frozen") -> tuple[dict[str, Any], dict[str, Any]]:
    """Both trees by path, or an error unless they have the same paths in the same containers.

    Args:
        frozen: The tree that goes with ``lora``.
        lora: The trained tree.
        name: What to call the first one.
    """
    left, right = flatten(frozen), flatten(lora)
    for path in (*left, *right):
        if path not in left or path not in right:
            missing, holder = ("lora", name) if path in left else (name, "lora")
            raise ValueError(
                f"{name} and lora have different structure: {path} is in {holder} but not in {missing}. "
                "Use the pair that one init (or restore onto the same frozen) returned."
            )
    if jax.tree.structure(frozen, is_leaf=is_leaf) != jax.tree.structure(lora, is_leaf=is_leaf):
        raise ValueError(
            f"{name} and lora have the same paths in different containers (such as a dict against a FrozenDict, or a "
            "list against a tuple). Convert one, or use the pair that one init returned."
        )
    return left, right


def _check_adapter(path: str, weight: Any, adapter: Adapter) -> None:
    if weight is None:
        raise ValueError(f"{path}: lora holds an adapter, but frozen holds no weight there (None).")
    a, b = unbox(adapter.a), unbox(adapter.b)
    if len(adapter.axes) != len(weight.shape):
        got = f"axes {adapter.axes}"
        raise ValueError(f"{path}: the weight has shape {tuple(weight.shape)}, but its adapter has {got}.")
    expected = factor_shapes(adapter.axes, weight.shape, a.shape[-1])
    if (tuple(a.shape), tuple(b.shape)) != expected:
        raise ValueError(
            f"{path}: a weight of shape {tuple(weight.shape)} with axes {adapter.axes} needs an adapter of "
            f"shapes {expected[0]} and {expected[1]}, got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Were these params, or this adapter, made for another model?"
        )
