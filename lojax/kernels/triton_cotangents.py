"""``u = g @ b.T`` and ``dB = h.T @ g`` from one reading of ``g`` on a GPU (Pallas, lowered by Triton).

Letters: T tokens, n the columns of ``g``, r the rank. Each program takes a part of ``g``, some rows by some columns,
and reads each tile of it once for both products. It has the sum over its columns for u, and over its rows for dB;
these partial sums, in float32, are added up afterwards.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lojax.kernels.result import result_like
from lojax.kernels.tiles import Parts, cotangent_parts, padded_rank
from lojax.kernels.triton_tile import Span, contract, load, store
from lojax.types import Array, Ref


def cotangents(
    g: Array, h: Array, b: Array, *, parts: Parts | None = None, interpret: bool = False
) -> tuple[Array, Array]:
    """``(u, dB)``, the cotangents of ``h`` and ``b`` in ``h @ b``, whose own is ``g``.

    Args:
        g: ``[T, n]``.
        h: ``[T, r]``, in the dtype of ``g``.
        b: ``[r, n]``, of any floating dtype; it is cast to that of ``g``.
        parts: How ``g`` is divided; None for what suits the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``g @ b.T`` ``[T, r]`` in the dtype of ``g``, and ``h.T @ g`` ``[r, n]`` in that of ``b``.
    """
    (tokens, n), rank = g.shape, b.shape[0]
    parts = parts or cotangent_parts(tokens, n, rank, g.dtype)
    down, across = pl.cdiv(tokens, parts.rows), pl.cdiv(n, parts.columns)
    u, db = pl.pallas_call(
        functools.partial(_kernel, parts=parts),
        out_shape=(
            result_like((across, tokens, rank), jnp.float32, g, h, b),
            result_like((down, rank, n), jnp.float32, g, h, b),
        ),
        grid=(across, down),
        # Whole, but for the part: Triton's lowering writes to a slice of what a block selects, not to one of a slice.
        out_specs=(
            pl.BlockSpec((None, tokens, rank), lambda j, i: (j, 0, 0)),
            pl.BlockSpec((None, rank, n), lambda j, i: (i, 0, 0)),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=parts.warps, num_stages=parts.stages),
        interpret=interpret,
        name="cotangents",
    )(g, h, b)
    return u.sum(0).astype(g.dtype), db.sum(0).astype(b.dtype)


def _kernel(g_ref: Ref, h_ref: Ref, b_ref: Ref, u_ref: Ref, db_ref: Ref, *, parts: Parts) -> None:
    (tokens, n), rank = g_ref.shape, b_ref.shape[0]
    j, i = pl.program_id(0), pl.program_id(1)
    columns, ranks = Span(j * parts.columns, parts.columns, n), Span(j * 0, padded_rank(rank), rank)
    # Once, before the walk: b belongs to the columns, and stays.
    b = load(b_ref, ranks, columns).astype(g_ref.dtype)
    first = i * (parts.rows // parts.step)

    def walk(s: Array, db: Array) -> Array:
        rows = Span((first + s) * parts.step, parts.step, tokens)
        g, h = load(g_ref, rows, columns), load(h_ref, rows, ranks)
        u = contract(g, b, 1, 1)
        store(u_ref, rows, ranks, u)
        return db + contract(h, g, 0, 0)

    steps = jnp.minimum(parts.rows // parts.step, pl.cdiv(tokens, parts.step) - first)
    db = lax.fori_loop(0, steps, walk, jnp.zeros((ranks.length, columns.length), jnp.float32))
    store(db_ref, ranks, columns, db)
