"""New adapters: the plan carried out on a parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import Adapter, array_shapes, box_arrays
from lojax.adapters.axes import Axes, check, convention, positions, size
from lojax.adapters.initializers import STARTS_AT_ZERO, Site, initializer, key_for
from lojax.adapters.leaves import check_finite
from lojax.adapters.matrices import at_least_float32, column_squares, subtract_update
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import map_paths
from lojax.adapters.rule import Rule
from lojax.adapters.targets import layer_of
from lojax.quantized.formats import make_format
from lojax.quantized.quantized import Quantized, dense, quantize_weight
from lojax.text import spec
from lojax.types import Array, Dtype, Key, Leaf, Params, Path, Shape


def create(
    key: Key,
    params: Params,
    plan: Mapping[Path, Rule],
    seen: Mapping[Path, Axes] | None = None,
    unpacked: Mapping[Path, Shape] | None = None,
) -> tuple[Params, Params]:
    """Splits ``params`` into ``(frozen, lora)`` as ``plan`` says.

    Args:
        key: Consumed: one key per weight is derived from it and the weight's path.
        params: The parameter tree.
        plan: The rule of each parameter that trains (see `lojax.adapters.targets.plan`), with every setting filled in.
        seen: The axes of weights whose use was seen; the rest take `axes.convention`.
        unpacked: The shapes of weights that the net unpacks from codes of other shapes.
    """
    seen, unpacked = seen or {}, unpacked or {}
    new_weights: dict[Path, Leaf] = {}

    def train(path: Path, leaf: Leaf) -> Leaf:
        if path not in plan:
            return None
        rule = plan[path]
        if rule.train == "full":
            return leaf
        shape = unpacked.get(path)
        adapter, new_weights[path] = new_adapter(key_for(key, path), path, leaf, rule, seen.get(path), shape)
        return adapter

    def freeze(path: Path, leaf: Leaf) -> Leaf:
        return None if path in plan and plan[path].train == "full" else new_weights.get(path, leaf)

    lora = map_paths(train, params)
    return map_paths(freeze, params), lora


INIT_USAGE = "init takes a PRNG key first: init(jax.random.key(0), params, ...)."
"""What `check_key` says of a key of `init` that was forgotten, which shifts all other arguments."""


def check_key(key: object, usage: str = INIT_USAGE) -> None:
    """Raises unless ``key`` is one PRNG key, old or new style.

    Args:
        key: What was passed.
        usage: What the error says first: where a key belongs.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        batch_shape = shape
    elif dtype == jnp.uint32 and shape[-1:] == _key_data_shape():  # old style
        batch_shape = shape[:-1]
    elif isinstance(key, (int, np.integer)):
        raise TypeError(f"{usage} Got the number {key} in its place: pass jax.random.key({key}).")
    else:
        got = f"an array {spec(key)}" if hasattr(key, "shape") else f"{type(key).__name__}"
        raise TypeError(f"{usage} Got {got} in its place.")
    if batch_shape:
        raise TypeError(
            f"{usage} Got an array of keys, of shape {batch_shape}. Pass one of them, such as keys[0], or "
            "use jax.vmap over the keys."
        )


def _key_data_shape() -> Shape:
    """The shape of an old-style key: a plain array of the data of the default implementation."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def new_adapter(
    key: Key, path: Path, leaf: Leaf, rule: Rule, seen: Axes | None, unpacked: Shape | None = None
) -> tuple[Adapter, Leaf]:
    """A fresh adapter for the weight ``leaf`` at ``path``, and the frozen weight that goes with it."""
    weight = unbox(leaf)
    shape = tuple(weight.shape) if unpacked is None else unpacked
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        _check_codes(path, weight, rule, seen)
    if rule.base is not None:
        _check_base(path, weight, rule)
    axes = check(rule.axes or seen or convention(len(shape)), shape, path)
    dtype = jnp.dtype(rule.dtype or jnp.float32)
    adapter = Adapter(a=None, b=None, scale=1.0, axes=axes)
    if rule.train == "lora":
        assert rule.init is not None and rule.dropout is not None  # as_rules fills them in
        # Codes have no values to start from, and may be of another shape than the weight.
        start: Any = weight if unpacked is None else jax.ShapeDtypeStruct(shape, weight.dtype)
        site = _site(path, start, axes, rule, dtype)
        a, b, new_weight = initializer(rule.init)(key, site)
        new_weight = weight if new_weight is start else new_weight
        adapter = Adapter(
            a,
            b,
            site.scale,
            axes,
            dropout=rule.dropout,
            ranks=site.ranks if site.uneven else None,
            requested_rank=site.requested_rank if site.requested_rank > site.rank else None,
            moved_base=None if new_weight is weight else str(rule.init),
            frozen_a=rule.variant == "lora-fa",
        )
        new_weight = _quantize(new_weight, rule)
        leaf = rebox(leaf, new_weight)
        if rule.variant == "dora":
            start = dense(weight) if rule.base is None else _effective_weight(new_weight, adapter)
            adapter = dataclasses.replace(adapter, magnitude=_magnitude(path, start, axes, dtype))
    else:
        leaf = rebox(leaf, _quantize(weight, rule))
    if rule.tokens:
        _check_tokens(path, shape, axes, rule)
        rows = jnp.zeros(array_shapes(axes, shape, 1, len(rule.tokens))["rows"], dtype)
        adapter = dataclasses.replace(adapter, rows=rows, tokens=tuple(rule.tokens))
    return box_arrays(leaf, adapter), leaf


def _check_codes(path: Path, weight: Array, rule: Rule, seen: Axes | None) -> None:
    """Raises unless the net makes floats of integers, and the adapter needs no more than their shape."""
    if seen is None:
        raise ValueError(
            f"{path} has dtype {weight.dtype}: only real floating-point weights take an adapter, and codes that the "
            "net dequantizes and multiplies with, which the example inputs of init show."
        )
    if rule.variant == "dora" or rule.train == "tokens" or not (callable(rule.init) or rule.init in STARTS_AT_ZERO):
        raise ValueError(
            f"{path}: holds codes ({spec(weight)}) that the net dequantizes by itself, so lojax cannot read the "
            f"weight: it takes plain adapters that start at zero, {', '.join(map(repr, STARTS_AT_ZERO))} or a "
            f"function of yours, got init={rule.init!r}, variant={rule.variant!r}, train={rule.train!r}. For others, "
            "quantize with lojax.quantize."
        )


def _check_base(path: Path, weight: Array | Quantized, rule: Rule) -> None:
    """Raises unless the weight can be quantized."""
    if isinstance(weight, Quantized):
        raise ValueError(
            f"{path}: is quantized already ({weight}), and base={rule.base!r} would quantize it again. Leave base= "
            "out, or pass the float weights."
        )
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{path}: holds codes ({spec(weight)}), and base={rule.base!r} quantizes floating-point weights. Leave "
            "base= out."
        )
    check_finite(path, weight, f"base={rule.base!r} quantizes it", "Load it again.")


def _quantize(weight: Array | Quantized, rule: Rule) -> Array | Quantized:
    """The weight as its rule wants it stored."""
    if rule.base is None or isinstance(weight, Quantized):  # by the start
        return weight
    return quantize_weight(weight, make_format(rule.base))


def _effective_weight(weight: Array | Quantized, adapter: Adapter) -> Array:
    """The weight that the net starts with, the update included."""
    if adapter.moved_base is None:  # the update is zero
        return dense(weight)
    return subtract_update(dense(weight), adapter.a, adapter.b, -adapter.one_scale, adapter.axes)


def _site(path: Path, weight: Array, axes: Axes, rule: Rule, dtype: Dtype) -> Site:
    """The weight with the ranks and scales that its rule gives it."""
    shape = tuple(weight.shape)
    m, n = size(axes, shape, "in"), size(axes, shape, "out")
    requested, limit = _ranks(path, shape, axes, rule), min(m, n)
    if max(requested) > limit and rule._exact_rank:
        raise ValueError(
            f"{path}: rank={max(requested)} is above min(m, n) = {limit} (shape {shape}, axes {axes}: m={m} in, "
            f"n={n} out). Choose a rank of at most {limit}, or train the weight in full."
        )
    # The scale is that of the requested rank: lowering it takes no direction away, so the strength should stay too.
    scales = tuple(rule.scale(r) for r in requested)
    return Site(
        path,
        weight,
        axes,
        ranks=tuple(min(r, limit) for r in requested),
        requested_rank=max(requested),
        scale=scales[0] if len(set(scales)) == 1 else scales,
        dtype=dtype,
        init=rule.init,
        format=None if rule.base is None else make_format(rule.base),
    )


def _ranks(path: Path, shape: Shape, axes: Axes, rule: Rule) -> tuple[int, ...]:
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


def _magnitude(path: Path, weight: Array, axes: Axes, dtype: Dtype) -> Array:
    """The length of each column of the pretrained weight."""
    squares = column_squares(weight, axes)
    usable = jnp.isfinite(squares) & (squares > 0)
    if not isinstance(usable, Tracer) and not bool(usable.all()):
        count = int(jnp.sum(~usable))
        raise ValueError(
            f"{path}: {count} of the {squares.size} columns of the weight are zero or not finite: DoRA divides "
            "by their length. Use the plain variant for this weight, or train it in full."
        )
    return jnp.sqrt(squares).astype(at_least_float32(dtype))  # rounded, training would not start at the base


def _check_tokens(path: Path, shape: Shape, axes: Axes, rule: Rule) -> None:
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
