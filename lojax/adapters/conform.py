"""`conform`: an adapter in the ranks, the scales and the structure of another one, so that a swap compiles nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import positions
from lojax.adapters.matrices import at_least_float32, pad_rank
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import check_same_structure, flatten, map_paths
from lojax.types import Array, Leaf, Params, Path


def conform(lora: Params, like: Params) -> Params:
    """``lora`` with the structure, ranks, scales, dtypes and shardings of ``like``: the same update, to rounding.

    A jitted function that was compiled for ``like`` takes the result without compiling again. The rank is padded with
    zeros, which stay zero in training. The ratio of the two scales is multiplied into ``b``, in float32 or wider. A
    weight that ``lora`` does not adapt gets an update of zeros. Pure: works under `jit`.

    The result computes what ``lora`` computes. It does not train as ``lora`` would: with another scale, the same
    learning rate makes other steps.

    Args:
        lora: A ``lora`` tree.
        like: A ``lora`` tree for the same base, or its shapes (`jax.ShapeDtypeStruct`).

    Returns:
        A ``lora`` tree with the treedef of ``like``.

    Raises:
        ValueError: ``lora`` cannot be written in the form of ``like``: a larger rank, another variant, another base, a
            weight that ``like`` does not adapt.

    >>> import lojax
    >>> params = {"w": jnp.ones((4, 3))}
    >>> (_, small), (_, large) = (lojax.init(jax.random.key(0), params, "w", rank=r, alpha=r) for r in (1, 2))
    >>> conform(small, large)["w"].a.shape, jax.tree.structure(conform(small, large)) == jax.tree.structure(large)
    ((4, 2), True)
    """
    for name, tree in (("lora", lora), ("like", like)):
        if any(is_adapter(leaf) and leaf.entries is not None for leaf in flatten(tree).values()):
            raise ValueError(f"{name} is a stack of adapters: index one, as bank[0], or put lora in with bank.replace.")
    leaves, _ = check_same_structure(lora, like, name="lora", other="like")
    return map_paths(lambda path, target: conform_leaf(path, leaves[path], target), like)


def conform_leaf(path: Path, leaf: Leaf, like: Leaf) -> Leaf:
    """One leaf of `conform`."""
    if like is None:
        if leaf is not None:
            what = "adapts" if is_adapter(leaf) else "trains in full"
            raise ValueError(
                f"{path}: lora {what} this parameter and like leaves it alone. Make like with this target too."
            )
        return None
    if not is_adapter(like):
        return _conform_full(path, leaf, like)
    if leaf is None:
        return zero_update(path, like)
    if not is_adapter(leaf):
        raise ValueError(f"{path}: lora trains this parameter in full and like adapts it. The two must do the same.")
    check_same_kind(path, leaf, like, "lora", "like")
    if leaf.invocation_tokens != like.invocation_tokens:
        raise ValueError(
            f"{path}: lora acts from the tokens {_shorten(leaf.invocation_tokens)} on, and like from "
            f"{_shorten(like.invocation_tokens)}. Make like with the same ones, or stack the two in a bank."
        )
    if leaf.rank > like.rank or (like.ranks is not None and any(np.greater(_ranks(leaf, like), like.ranks))):
        raise ValueError(
            f"{path}: rank {leaf.ranks or leaf.rank} does not fit into the rank {like.ranks or like.rank} of like. "
            "Make like with the larger rank, or lower this one with lojax.resize(lora, rank)."
        )
    arrays = dict(leaf.arrays)
    if leaf.a is not None:
        arrays["a"], arrays["b"] = pad_factors(leaf, like.rank)
        arrays["b"] = _fold_scale(path, arrays["b"], leaf, like)
    return with_arrays(like, {name: _as_like(x, like.arrays[name]) for name, x in arrays.items()})


def check_same_kind(path: Path, leaf: Adapter, like: Adapter, name: str, other: str) -> None:
    """Raises unless two adapters are of the same weight, variant and base, and so differ in ranks and scales alone."""
    shapes = leaf.weight_shape, like.weight_shape
    if leaf.axes != like.axes or any(m != n and None not in (m, n) for m, n in zip(*shapes, strict=True)):
        raise ValueError(
            f"{path}: {name} adapts a weight of shape {shapes[0]} with axes {leaf.axes}, and {other} one of shape "
            f"{shapes[1]} with axes {like.axes}. They are for different bases."
        )
    if leaf.variant != like.variant or {*leaf.arrays} != {*like.arrays}:
        raise ValueError(
            f"{path}: {name} is of the variant {leaf.variant!r} with the arrays {', '.join(leaf.arrays)}, and {other} "
            f"of {like.variant!r} with {', '.join(like.arrays)}. Train both alike, or merge one of them."
        )
    if leaf.tokens != like.tokens:
        raise ValueError(
            f"{path}: {name} trains the token rows {_shorten(leaf.tokens)}, and {other} {_shorten(like.tokens)}. Train "
            "the same tokens in both."
        )
    if leaf.moved_base != like.moved_base:
        raise ValueError(
            f"{path}: {name} belongs to {_base_name(leaf)}, and {other} to {_base_name(like)}. Save the moved one with "
            "lojax.save(..., start=lora_at_init): it is then an adapter of the pretrained weight."
        )


def pad_factors(adapter: Adapter, rank: int) -> tuple[Array, Array]:
    """``a`` and ``b`` with zeros up to ``rank``."""
    a, b = adapter.arrays["a"], adapter.arrays["b"]
    stack = len(positions(adapter.axes, "stack"))
    if rank == adapter.rank:
        return a, b
    return pad_rank(a, rank, a.ndim - 1), pad_rank(b, rank, stack)


def zero_update(path: Path, like: Adapter) -> Adapter:
    """An adapter in the form of ``like`` that adds nothing to its weight."""
    if like.magnitude is not None or like.moved_base:
        reason = "a DoRA magnitude" if like.magnitude is not None else f"a start by {like.moved_base!r}"
        raise ValueError(
            f"{path}: lora does not adapt this weight, and like does so with {reason}, so that zeros are not the base. "
            "Train an adapter for it as well."
        )
    return with_arrays(like, {name: _as_like(jnp.zeros(x.shape, x.dtype), x) for name, x in like.arrays.items()})


def with_arrays(adapter: Adapter, arrays: dict[str, Any]) -> Adapter:
    """``adapter`` with other arrays, in its own boxes."""
    return dataclasses.replace(adapter, **{name: rebox(getattr(adapter, name), x) for name, x in arrays.items()})


def _conform_full(path: Path, leaf: Leaf, like: Leaf) -> Leaf:
    if leaf is None or is_adapter(leaf):
        raise ValueError(
            f"{path}: like trains this parameter in full and lora does not. Put the value of the base there, as "
            "lora[...] = params[...], and None into frozen."
        )
    x, target = unbox(leaf), unbox(like)
    if jnp.shape(x) != jnp.shape(target):
        raise ValueError(f"{path}: lora holds an array of shape {jnp.shape(x)}, and like one of {jnp.shape(target)}.")
    return rebox(like, _as_like(jnp.asarray(x), target))


def _ranks(leaf: Adapter, like: Adapter) -> tuple[int, ...]:
    """The rank of each entry of the stack."""
    assert like.ranks is not None
    return leaf.ranks or (leaf.rank,) * len(like.ranks)


def _fold_scale(path: Path, b: Array, leaf: Adapter, like: Adapter) -> Array:
    """``b`` times the ratio of the two scales."""
    if leaf.scale == like.scale:
        return b
    scale, target = np.broadcast_arrays(np.asarray(leaf.scale, np.float64), np.asarray(like.scale, np.float64))
    if np.any((target == 0) & (scale != 0)):
        raise ValueError(f"{path}: the scale of like is 0, which no b makes up for. Make like with another alpha.")
    ratio = scale / np.where(target == 0, 1, target)
    wide = at_least_float32(b.dtype)
    stack = b.ndim - 1 - len(positions(leaf.axes, "out"))
    shape = (*b.shape[:stack], *[1] * (b.ndim - stack)) if ratio.ndim else ()
    return (b.astype(wide) * jnp.asarray(ratio.reshape(shape), wide)).astype(b.dtype)


def _as_like(x: Array, like: Any) -> Array:
    """``x`` in the dtype and on the devices of ``like``."""
    x = jnp.asarray(x).astype(like.dtype)
    sharding = None if isinstance(like, Tracer) else getattr(like, "sharding", None)
    if sharding is None or isinstance(x, Tracer) or x.sharding == sharding:
        return x
    return jax.device_put(x, sharding)


def _shorten(tokens: tuple[int, ...] | None) -> str:
    text = ", ".join(map(str, (tokens or ())[:5]))
    return text + ", …" if len(tokens or ()) > 5 else text or "(none)"


def _base_name(adapter: Adapter) -> str:
    return f"a base moved by {adapter.moved_base!r}" if adapter.moved_base else "the pretrained base"
