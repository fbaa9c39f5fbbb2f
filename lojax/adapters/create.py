"""New adapters: the plan carried out on a parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import Axes, array_shapes, check, convention, positions, size
from lojax.adapters.decompositions import Decomposition, factorize, without_update
from lojax.adapters.initializers import initializer, key_for, zeros
from lojax.adapters.matrices import as_matrices, at_least_float32, column_squares
from lojax.adapters.metadata import box_arrays, rebox, unbox
from lojax.adapters.paths import map_paths
from lojax.adapters.rule import Rule
from lojax.adapters.targets import layer_of


def create(
    key: jax.Array, params: Any, plan: Mapping[str, Rule], seen: Mapping[str, Axes] | None = None
) -> tuple[Any, Any]:
    """Splits ``params`` into ``(frozen, lora)`` as ``plan`` says.

    Args:
        key: Consumed: one key per weight is derived from it and the weight's path.
        params: The parameter tree.
        plan: The rule of each parameter that trains (see `lojax.adapters.targets.plan`).
        seen: The axes of weights whose use was seen; the rest take `axes.convention`.
    """
    seen = seen or {}
    changed: dict[str, Any] = {}

    def train(path: str, leaf: Any) -> Any:
        if path not in plan:
            return None
        rule = plan[path]
        if rule.train == "full":
            return leaf
        adapter, changed[path] = new_adapter(key_for(key, path), path, leaf, rule, seen.get(path))
        return adapter

    def freeze(path: str, leaf: Any) -> Any:
        return None if path in plan and plan[path].train == "full" else changed.get(path, leaf)

    lora = map_paths(train, params)
    return map_paths(freeze, params), lora


def new_adapter(key: jax.Array, path: str, leaf: Any, rule: Rule, seen: Axes | None) -> tuple[Adapter, Any]:
    """A fresh adapter for the weight ``leaf`` at ``path``, and the frozen weight that goes with it."""
    weight = unbox(leaf)
    shape = tuple(weight.shape)
    axes = check(rule.axes or seen or convention(len(shape)), shape, path)
    dtype = jnp.dtype(rule.dtype or jnp.float32)
    adapter = Adapter(a=None, b=None, scale=1.0, axes=axes)
    if rule.train == "lora":
        adapter, changed = _updated(key, path, weight, axes, rule, dtype)
        leaf = rebox(leaf, changed)
        if rule.variant == "dora":
            adapter = dataclasses.replace(adapter, magnitude=_magnitude(path, weight, axes, dtype))
    if rule.tokens:
        _check_tokens(path, shape, axes, rule)
        rows = zeros(array_shapes(axes, shape, 1, len(rule.tokens))["rows"], dtype)
        adapter = dataclasses.replace(adapter, rows=rows, tokens=tuple(rule.tokens))
    return box_arrays(leaf, adapter), leaf


def _updated(key: jax.Array, path: str, weight: Any, axes: Axes, rule: Rule, dtype: Any) -> tuple[Adapter, Any]:
    """The plain update, and the weight less what it starts with."""
    shape = tuple(weight.shape)
    m, n = size(axes, shape, "in"), size(axes, shape, "out")
    ranks = _ranks(path, shape, axes, rule)
    rank = max(ranks)
    if rank > min(m, n):
        raise ValueError(
            f"{path}: rank={rank} is above min(m, n) = {min(m, n)} (shape {shape}, axes {axes}: m={m} in, "
            f"n={n} out). Choose a rank of at most {min(m, n)}, or train the weight in full."
        )
    uneven = ranks if len(set(ranks)) > 1 else None
    scale = tuple(rule.scale(r) for r in ranks) if uneven else rule.scale(rank)
    scale = scale[0] if isinstance(scale, tuple) and len(set(scale)) == 1 else scale
    shapes = array_shapes(axes, shape, rank)
    start = initializer(rule.init or "kaiming")
    if not isinstance(start, Decomposition):
        a, b = start(key, shapes["a"], dtype, fan_in=m, rank=rank), zeros(shapes["b"], dtype)
        if uneven:
            a = a * within(ranks, rank, a, stack=len(positions(axes, "stack"))).astype(dtype)
    elif uneven:
        raise ValueError(f"{path}: init={rule.init!r} gives every entry of a stack the same rank, got {ranks}.")
    else:
        assert isinstance(scale, float)
        matrices = as_matrices(weight, axes)
        left, right = factorize(start, key, matrices, rank, scale, path)
        a, b = left.reshape(shapes["a"]).astype(dtype), right.reshape(shapes["b"]).astype(dtype)
        if start.changes_weight:  # less the factors as they are stored, rounding and all
            weight = without_update(weight, a, b, scale, axes)
    adapter = Adapter(a, b, scale, axes, rule.dropout or 0.0, ranks=uneven, frozen_a=rule.variant == "lora-fa")
    return adapter, weight


def _ranks(path: str, shape: tuple[int, ...], axes: Axes, rule: Rule) -> tuple[int, ...]:
    """The rank of each entry of the stack; a weight without a stack is a stack of one."""
    entries = size(axes, shape, "stack")
    ranks = rule.rank if isinstance(rule.rank, tuple) else (rule.rank,) * entries
    if len(ranks) != entries:
        raise ValueError(
            f"{path}: {len(ranks)} ranks for a stack of {entries} (shape {shape}, axes {axes}). "
            "Give one rank for each entry, or a single one."
        )
    if rule.layers is not None and layer_of(path) is None:
        if "stack" not in axes or max(rule.layers) >= entries:
            raise ValueError(
                f"{path}: layers={tuple(rule.layers)}, but its path has no layer number and its stack has "
                f"{entries if 'stack' in axes else 'no'} entries (shape {shape}, axes {axes})."
            )
        ranks = tuple(r if i in rule.layers else 0 for i, r in enumerate(ranks))
    if not any(ranks):
        raise ValueError(f"{path}: no entry of the stack is left with a rank above 0: {ranks}.")
    return ranks  # type: ignore[return-value]


def within(ranks: tuple[int, ...], rank: int, a: Any, *, stack: int) -> Any:
    """One where ``a`` ``[*stack, *in, r]`` is within the rank of its entry, else zero."""
    inside = np.arange(rank) < np.array(ranks)[:, None]
    return jnp.asarray(inside.reshape(*a.shape[:stack], *[1] * (a.ndim - stack - 1), rank))


def _magnitude(path: str, weight: Any, axes: Axes, dtype: Any) -> Any:
    """The length of each column of the pretrained weight."""
    squares = column_squares(weight, axes)
    if not isinstance(squares, Tracer) and not bool(jnp.all(squares > 0)):
        count = int(jnp.sum(squares == 0))
        raise ValueError(
            f"{path}: {count} of the {squares.size} columns of the weight are zero or not finite: DoRA divides "
            "by their length. Use the plain variant for this weight, or train it in full."
        )
    return jnp.sqrt(squares).astype(at_least_float32(dtype))  # rounded, training would not start at the base


def _check_tokens(path: str, shape: tuple[int, ...], axes: Axes, rule: Rule) -> None:
    assert rule.tokens is not None
    ins = positions(axes, "in")
    if len(ins) != 1 or "stack" in axes:
        raise ValueError(
            f"{path}: tokens= is for an embedding, with one in axis and no stack; this weight has axes {axes}. "
            "Give its axes with axes=, or train it otherwise."
        )
    rows = shape[ins[0]]
    if (last := max(rule.tokens)) >= rows:
        raise ValueError(f"{path}: tokens names row {last}, but the embedding has {rows} (shape {shape}).")
