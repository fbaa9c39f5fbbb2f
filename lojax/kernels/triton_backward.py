"""The three gradients of a low-rank layer in one launch on a GPU (Pallas, lowered by Triton).

``dx = g @ w.T + u @ a.T`` keeps the tensor cores busy and leaves the memory idle; ``dA = x.T @ u`` and ``dB = h.T @ g``
keep the memory busy and leave the tensor cores idle. So they are programs of one kernel, which a GPU runs side by side:
the first ones take some columns of x, or of g, and walk along all tokens; the others compute tiles of dx.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lojax.kernels.result import result_like
from lojax.kernels.tiles import Tiles, padded_rank, product_tiles
from lojax.kernels.triton_product import write_tile
from lojax.kernels.triton_tile import Span, contract, load, store
from lojax.types import Array, Ref


def gradients(
    g: Array,
    x: Array,
    w: Array,
    h: Array,
    u: Array,
    a: Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """``(dx, dA, dB)`` of ``x @ w + (x @ a) @ b``.

    Args:
        g: ``[T, n]``, the cotangent of the result. The following have its dtype, but a.
        x: ``[T, m]``.
        w: ``[m, n]``.
        h: ``[T, r]``, ``x @ a``.
        u: ``[T, r]``, ``g @ b.T``.
        a: ``[m, r]``, of any floating dtype.
        tiles: Those of dx; None for those that suit the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        dx ``[T, m]`` in the dtype of ``g``, dA ``[m, r]`` and dB ``[r, n]`` in float32.
    """
    (tokens, m), n, rank = x.shape, g.shape[1], a.shape[1]
    # Those of dx alone: compiled for an H100, the programs for dA and dB take no more shared memory and registers.
    tiles = tiles or product_tiles(tokens, m, g.dtype)
    # Half the width of a tile of dx, as tall: a row of it is then two lines of the cache, and the sums fit with ease.
    width = tiles.columns // 2
    thin = pl.cdiv(m, width) + pl.cdiv(n, width)
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, width=width),
        out_shape=(
            result_like((tokens, m), g.dtype, g, x, w, h, u, a),
            result_like((m, rank), jnp.float32, g, x, w, h, u, a),
            result_like((rank, n), jnp.float32, g, x, w, h, u, a),
        ),
        grid=(thin + pl.cdiv(tokens, tiles.rows) * pl.cdiv(m, tiles.columns),),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="gradients",
    )(g, x, w, h, u, a)


def _kernel(
    g_ref: Ref,
    x_ref: Ref,
    w_ref: Ref,
    h_ref: Ref,
    u_ref: Ref,
    a_ref: Ref,
    dx_ref: Ref,
    da_ref: Ref,
    db_ref: Ref,
    *,
    tiles: Tiles,
    width: int,
) -> None:
    # Programs of three kinds: some walk down columns of x for dA, some down columns of g for dB, the others make dx.
    program = pl.program_id(0)
    for_a, for_b = pl.cdiv(x_ref.shape[1], width), pl.cdiv(g_ref.shape[1], width)

    # The long programs first: the short ones fill the gaps at the end.
    @pl.when(program < for_a)
    def _():
        columns, sums = _walk_columns(program, x_ref, u_ref, width, tiles.inner)
        store(da_ref, columns, _ranks(program, u_ref), sums)

    @pl.when((program >= for_a) & (program < for_a + for_b))
    def _():
        columns, sums = _walk_columns(program - for_a, g_ref, h_ref, width, tiles.inner)
        # Turned round only here, where it is small.
        store(db_ref, _ranks(program, h_ref), columns, sums.T)

    @pl.when(program >= for_a + for_b)
    def _():
        write_tile(program - for_a - for_b, g_ref, w_ref, u_ref, a_ref, dx_ref, tiles=tiles, transposed=True)


def _ranks(program: Array, thin_ref: Ref) -> Span:
    rank = thin_ref.shape[1]
    return Span(program * 0, padded_rank(rank), rank)


def _walk_columns(program: Array, large_ref: Ref, thin_ref: Ref, width: int, step: int) -> tuple[Span, Array]:
    """Some columns of a large matrix ``[T, k]``, and their product ``[width, r]`` with a thin one ``[T, r]``."""
    tokens, k = large_ref.shape
    columns, ranks = Span(program * width, width, k), _ranks(program, thin_ref)

    def add(s: Array, sums: Array) -> Array:
        rows = Span(s * step, step, tokens)
        # The wide side is the first: the tensor cores of an H100 take 64 of its rows at a time, and few columns of the
        # other.
        return sums + contract(load(large_ref, rows, columns), load(thin_ref, rows, ranks), 0, 0)

    sums = jnp.zeros((width, ranks.length), jnp.float32)
    return columns, lax.fori_loop(0, pl.cdiv(tokens, step), add, sums)
