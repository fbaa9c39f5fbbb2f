"""The factors of an adapter as plain matrices, and the nearest product of a lower rank.

Letters: ``S`` weights of a stack, ``m`` in, ``n`` out, ``r`` rank.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import positions
from lojax.adapters.metadata import rebox, unbox


def matrices(adapter: Adapter) -> tuple[jax.Array, jax.Array]:
    """The factors as ``[S, m, r]`` and ``[S, r, n]``, in float32 or wider."""
    a, b = jnp.asarray(unbox(adapter.a)), jnp.asarray(unbox(adapter.b))
    stack = len(positions(adapter.axes, "stack"))
    count = math.prod(a.shape[:stack])
    wide = a.dtype if a.dtype.itemsize >= 4 else jnp.float32
    return a.reshape(count, -1, a.shape[-1]).astype(wide), b.reshape(count, b.shape[stack], -1).astype(wide)


def even(adapter: Adapter) -> Adapter:
    """The same update with one scale, and one rank for all entries of a stack: what is above theirs stays zero."""
    if not isinstance(adapter.scale, tuple):
        return dataclasses.replace(adapter, ranks=None)
    b = jnp.asarray(unbox(adapter.b))
    stack = len(positions(adapter.axes, "stack"))
    scale = jnp.asarray(adapter.scale, jnp.float32).reshape(*b.shape[:stack], *[1] * (b.ndim - stack))
    return dataclasses.replace(adapter, b=rebox(adapter.b, (b * scale).astype(b.dtype)), scale=1.0, ranks=None)


def truncated(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The factors ``[S, m, k]`` and ``[S, k, n]``, ``k <= rank``, whose product is nearest to ``a @ b``."""
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.swapaxes(1, 2))
    u, s, vt = jnp.linalg.svd(ra @ rb.swapaxes(1, 2), full_matrices=False)
    root = jnp.sqrt(s[:, :rank])
    return (qa @ u[:, :, :rank]) * root[:, None, :], root[:, :, None] * (vt[:, :rank] @ qb.swapaxes(1, 2))


def padded(x: jax.Array, rank: int, axis: int) -> jax.Array:
    """``x`` with zeros up to ``rank`` along ``axis``."""
    widths = [(0, rank - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths)


def like(adapter: Adapter, a: jax.Array, b: jax.Array, scale: float) -> Adapter:
    """``adapter`` with the factors ``[S, m, r]`` and ``[S, r, n]``, in its own shapes, dtype and boxes."""
    old_a, old_b = unbox(adapter.a), unbox(adapter.b)
    stack = len(positions(adapter.axes, "stack"))
    new_a = a.reshape(*old_a.shape[:-1], a.shape[-1]).astype(old_a.dtype)
    new_b = b.reshape(*old_b.shape[:stack], b.shape[1], *old_b.shape[stack + 1 :]).astype(old_b.dtype)
    return dataclasses.replace(adapter, a=rebox(adapter.a, new_a), b=rebox(adapter.b, new_b), scale=scale)
