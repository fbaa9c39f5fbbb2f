"""Weights and factors as plain matrices, one for each entry of the stack.

Letters: ``S`` entries of a stack, ``m`` in, ``n`` out, ``r`` rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import Axes, positions, size
from lojax.adapters.metadata import rebox, unbox
from lojax.types import Array, Dtype, Shape


def at_least_float32(dtype: Dtype) -> Dtype:
    """``dtype``, or float32 where that is wider; unlike `jnp.promote_types`, also under strict promotion."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


# --- weights ---


def as_matrices(w: Array, axes: Axes) -> Array:
    """The weight ``w`` as ``[S, m, n]``, in float32 or wider."""
    shape = (-1, size(axes, w.shape, "in"), size(axes, w.shape, "out"))
    return jnp.transpose(w, _order(axes)).reshape(shape).astype(at_least_float32(w.dtype))


def from_matrices(matrices: Array, axes: Axes, shape: Shape, dtype: Dtype) -> Array:
    """The reverse of `as_matrices`: ``[S, m, n]`` as a weight of this shape and dtype."""
    order = _order(axes)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(matrices.reshape([shape[i] for i in order]), inverse).astype(dtype)


def column_squares(w: Array, axes: Axes) -> Array:
    """The squared length of each column of a weight: the sum over its in axes, ``[*stack, *out]``, float32 or wider."""
    squares = jnp.sum(jnp.square(w.astype(at_least_float32(w.dtype))), axis=positions(axes, "in"))
    remaining = [i for i, role in enumerate(axes) if role != "in"]
    return jnp.transpose(squares, [remaining.index(i) for i in _order(axes) if i in remaining])


def subtract_update(w: Array, a: Array, b: Array, scale: float, axes: Axes) -> Array:
    """The weight ``w`` minus ``scale * a @ b``, computed in float32 from the factors as they are stored."""
    matrices = as_matrices(w, axes)
    left = a.reshape(*matrices.shape[:2], -1).astype(matrices.dtype)
    right = b.reshape(matrices.shape[0], -1, matrices.shape[2]).astype(matrices.dtype)
    product = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    return from_matrices(matrices - scale * product, axes, w.shape, w.dtype)


def _order(axes: Axes) -> list[int]:
    return [*positions(axes, "stack"), *positions(axes, "in"), *positions(axes, "out")]


# --- factors ---


def factor_matrices(adapter: Adapter) -> tuple[Array, Array]:
    """The factors as ``[S, m, r]`` and ``[S, r, n]``, in float32 or wider."""
    a, b = jnp.asarray(unbox(adapter.a)), jnp.asarray(unbox(adapter.b))
    stack = a.shape[: len(positions(adapter.axes, "stack"))]
    entries, dtype = int(np.prod(stack)), at_least_float32(a.dtype)
    return a.reshape(entries, -1, a.shape[-1]).astype(dtype), b.reshape(entries, b.shape[len(stack)], -1).astype(dtype)


def with_factors(adapter: Adapter, a: Array, b: Array, scale: float) -> Adapter:
    """``adapter`` with the factors ``[S, m, r]`` and ``[S, r, n]``, in its own shapes, dtype and boxes."""
    old_a, old_b = unbox(adapter.a), unbox(adapter.b)
    stack = len(positions(adapter.axes, "stack"))
    new_a = a.reshape(*old_a.shape[:-1], a.shape[-1]).astype(old_a.dtype)
    new_b = b.reshape(*old_b.shape[:stack], b.shape[1], *old_b.shape[stack + 1 :]).astype(old_b.dtype)
    a, b = rebox(adapter.a, new_a), rebox(adapter.b, new_b)
    return dataclasses.replace(adapter, a=a, b=b, scale=scale, requested_rank=None)


def unify_scale_and_rank(adapter: Adapter) -> Adapter:
    """The same update with one scale and one rank for all entries of a stack; the factors stay padded with zeros."""
    if not isinstance(adapter.scale, tuple):
        return dataclasses.replace(adapter, ranks=None)
    b = jnp.asarray(unbox(adapter.b))
    stack = len(positions(adapter.axes, "stack"))
    scale = jnp.asarray(adapter.scale, jnp.float32).reshape(*b.shape[:stack], *[1] * (b.ndim - stack))
    return dataclasses.replace(adapter, b=rebox(adapter.b, (b * scale).astype(b.dtype)), scale=1.0, ranks=None)


def zero_above_rank(a: Array, ranks: Sequence[int], axes: Axes) -> Array:
    """``a`` ``[*stack, *in, r]`` with zeros in the columns above the rank of each entry."""
    stack = len(positions(axes, "stack"))
    inside = np.arange(a.shape[-1]) < np.array(ranks)[:, None]
    return a * inside.reshape(*a.shape[:stack], *[1] * (a.ndim - stack - 1), -1).astype(a.dtype)


def truncate_rank(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The factors ``[S, m, k]`` and ``[S, k, n]``, ``k <= rank``, whose product is nearest to ``a @ b``.

    ``a @ b = Qa (Ra Rb^T) Qb^T``, so the SVD is that of an ``[r, r]`` matrix and the product is never materialized.
    """
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.mT)
    u, s, vt = jnp.linalg.svd(ra @ rb.mT, full_matrices=False)
    root = jnp.sqrt(s[:, :rank])  # half of each singular value to each factor, which balances their gradients
    return (qa @ u[:, :, :rank]) * root[:, None, :], root[:, :, None] * (vt[:, :rank] @ qb.mT)


def pad_rank(x: Array, rank: int, axis: int) -> Array:
    """``x`` with zeros up to ``rank`` along ``axis``."""
    return jnp.pad(x, [(0, rank - n if i == axis else 0) for i, n in enumerate(x.shape)])
