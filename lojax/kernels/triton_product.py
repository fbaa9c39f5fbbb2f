"""``x @ w + h @ b`` in one pass on a GPU: the rank is a last step of the contraction (Pallas, lowered by Triton).

Letters: T tokens, k the length of the contraction, n the columns of the result, r the rank. Each program computes one
tile of the result in float32: it walks along k, then along r, and writes the tile once.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lojax.kernels.result import result_like
from lojax.kernels.tiles import Tiles, product_tiles, rank_step
from lojax.kernels.triton_tile import Span, contract, grouped_tile, load, store
from lojax.types import Array, Ref


def product_with_update(
    x: Array,
    w: Array,
    h: Array,
    b: Array,
    *,
    transposed: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """``x @ w + h @ b``, or ``x @ w.T + h @ b.T`` of ``w`` and ``b`` as they are stored.

    Args:
        x: ``[T, k]``.
        w: ``[k, n]``; ``[n, k]`` if transposed. In the dtype of ``x``.
        h: ``[T, r]``, in the dtype of ``x``.
        b: ``[r, n]``; ``[n, r]`` if transposed. Of any floating dtype; it is cast to that of ``x``.
        transposed: Whether ``w`` and ``b`` are contracted along their last axis.
        tiles: The tiles; None for those that suit the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``[T, n]`` in the dtype of ``x``, summed in float32.
    """
    tokens, n = x.shape[0], w.shape[0 if transposed else 1]
    tiles = tiles or product_tiles(tokens, n, x.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, transposed=transposed),
        out_shape=result_like((tokens, n), x.dtype, x, w, h, b),
        grid=(pl.cdiv(tokens, tiles.rows) * pl.cdiv(n, tiles.columns),),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="product_with_update_transposed" if transposed else "product_with_update",
    )(x, w, h, b)


def _kernel(x_ref: Ref, w_ref: Ref, h_ref: Ref, b_ref: Ref, y_ref: Ref, *, tiles: Tiles, transposed: bool) -> None:
    write_tile(pl.program_id(0), x_ref, w_ref, h_ref, b_ref, y_ref, tiles=tiles, transposed=transposed)


def write_tile(
    program: Array,
    x_ref: Ref,
    w_ref: Ref,
    h_ref: Ref,
    b_ref: Ref,
    y_ref: Ref,
    *,
    tiles: Tiles,
    transposed: bool,
) -> None:
    """Computes and writes the tile of `product_with_update` that belongs to a program.

    Args:
        program: The number of the program, from 0, of as many as there are tiles.
        x_ref: As in `product_with_update`, like the following.
        w_ref: ``w``.
        h_ref: ``h``.
        b_ref: ``b``.
        y_ref: The result.
        tiles: The tiles.
        transposed: Whether ``w`` and ``b`` are contracted along their last axis.
    """
    (tokens, k), (_, n), (_, rank) = x_ref.shape, y_ref.shape, h_ref.shape
    i, j = grouped_tile(program, pl.cdiv(tokens, tiles.rows), pl.cdiv(n, tiles.columns), tiles.group)
    rows, columns = Span(i * tiles.rows, tiles.rows, tokens), Span(j * tiles.columns, tiles.columns, n)

    def add(sums: Array, left: Ref, right: Ref, inner: Span) -> Array:
        x = load(left, rows, inner)
        # Read as it is stored: the tensor cores take either order from shared memory.
        w = load(right, columns, inner) if transposed else load(right, inner, columns)
        return sums + contract(x, w.astype(x.dtype), 1, 1 if transposed else 0)

    def walk(sums: Array, left: Ref, right: Ref, length: int, step: int) -> Array:
        body = lambda s, sums: add(sums, left, right, Span(s * step, step, length))
        return lax.fori_loop(0, pl.cdiv(length, step), body, sums)

    sums = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    sums = walk(sums, x_ref, w_ref, k, tiles.inner)
    # A loop for a single step too: where it starts is then unknown to JAX, which else refuses a tile over the edge.
    sums = walk(sums, h_ref, b_ref, rank, rank_step(rank))
    store(y_ref, rows, columns, sums)
