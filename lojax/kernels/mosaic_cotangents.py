"""``u = g @ b.T`` and ``dB = h.T @ g`` from one reading of ``g`` on a TPU (Pallas, lowered by Mosaic).

A TPU runs the programs of a kernel one after the other, so both sums stay in its vector memory until they are whole.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lojax.kernels.mosaic_tile import contract, device_vmem, fit, inside, pad_rank, part
from lojax.kernels.result import result_like
from lojax.types import Array, Ref


def cotangents(
    g: Array, h: Array, b: Array, *, block: tuple[int, int] | None = None, interpret: bool = False
) -> tuple[Array, Array]:
    """``(u, dB)``, the cotangents of ``h`` and ``b`` in ``h @ b``, whose own is ``g``.

    Args:
        g: ``[T, n]``.
        h: ``[T, r]``, in the dtype of ``g``.
        b: ``[r, n]``, of any floating dtype; it is cast to that of ``g``.
        block: The rows and columns of a tile of ``g``; None for what suits the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``g @ b.T`` ``[T, r]`` in the dtype of ``g``, and ``h.T @ g`` ``[r, n]`` in that of ``b``.
    """
    (tokens, n), rank, dtype = g.shape, b.shape[0], b.dtype
    h, b = pad_rank(h, 1), pad_rank(b, 0)
    rows, columns = block or (fit(tokens, 512), fit(n, 1024))
    down, across = pl.cdiv(tokens, rows), pl.cdiv(n, columns)
    width, padded = b.shape[0], across * columns
    u, db = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, n=n),
        out_shape=(
            result_like((tokens, width), g.dtype, g, h, b),
            result_like((width, padded), jnp.float32, g, h, b),
        ),
        grid=(down, across),
        in_specs=[
            pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
            pl.BlockSpec((rows, width), lambda i, j: (i, 0)),
            pl.BlockSpec((width, columns), lambda i, j: (0, j)),
        ],
        out_specs=(
            pl.BlockSpec((rows, width), lambda i, j: (i, 0)),
            # All of dB: it is written back once, at the end.
            pl.BlockSpec((width, padded), lambda i, j: (0, 0)),
        ),
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=device_vmem()
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens * n * rank,
            bytes_accessed=g.dtype.itemsize * tokens * (n + 2 * rank) + 4 * rank * n * (down + 1),
            transcendentals=0,
        ),
        interpret=interpret,
        name="cotangents",
    )(g, h, b)
    return u[:, :rank], db[:rank, :n].astype(dtype)


def _kernel(g_ref: Ref, h_ref: Ref, b_ref: Ref, u_ref: Ref, db_ref: Ref, sums_ref: Ref, *, tokens: int, n: int) -> None:
    i, j = pl.program_id(0), pl.program_id(1)
    g, b = inside(g_ref[...], 1, j, n), inside(b_ref[...].astype(g_ref.dtype), 1, j, n)
    u = contract(g, b, 1, 1)

    @pl.when(j == 0)
    def _():
        sums_ref[...] = u

    @pl.when(j > 0)
    def _():
        sums_ref[...] += u

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        u_ref[...] = sums_ref[...].astype(u_ref.dtype)

    # Rows over the edge count here, in a sum along T; those of u are not written.
    db = contract(inside(h_ref[...], 0, i, tokens), inside(g, 0, i, tokens), 0, 0)
    columns = part(j, g.shape[1], db_ref.shape[1])

    @pl.when(i == 0)
    def _():
        db_ref[:, columns] = db

    @pl.when(i > 0)
    def _():
        db_ref[:, columns] += db
