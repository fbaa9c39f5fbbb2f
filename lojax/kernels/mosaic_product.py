"""The products of a low-rank layer in one pass on a TPU (Pallas, lowered by Mosaic).

Letters as in `triton_product`: T tokens, k the length of the contraction, n the columns of the result, r the rank. The
grid walks along k last, and a tile of the result is summed in float32 in the TPU's vector memory meanwhile; the rank is
the last step.

A TPU runs the programs of a kernel one after the other. So the first tile across, which reads all of its rows of x,
computes ``h = x @ a`` on the way, before anything needs it: x is not read for it again. In the backward pass, where x
is the cotangent g, that is u, and dB comes from the same reading.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lojax.kernels.mosaic_tile import Blocks, contract, device_vmem, inside, pad_rank, part, product_blocks
from lojax.kernels.result import result_like
from lojax.types import Array, Ref


def product_with_update(
    x: Array,
    w: Array,
    h: Array,
    b: Array,
    *,
    transposed: bool = False,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Array:
    """``x @ w + h @ b``, or ``x @ w.T + h @ b.T`` of ``w`` and ``b`` as they are stored.

    Args:
        x: ``[T, k]``.
        w: ``[k, n]``; ``[n, k]`` if transposed. In the dtype of ``x``.
        h: ``[T, r]``, in the dtype of ``x``.
        b: ``[r, n]``; ``[n, r]`` if transposed. Of any floating dtype; it is cast to that of ``x``.
        transposed: Whether ``w`` and ``b`` are contracted along their last axis.
        blocks: The tiles; None for those that suit the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``[T, n]`` in the dtype of ``x``, summed in float32.
    """
    b = b.T if transposed else b
    return _call(x, w, b, h=h, transposed=transposed, blocks=blocks, interpret=interpret)[0]


def forward(
    x: Array, w: Array, a: Array, b: Array, *, blocks: Blocks | None = None, interpret: bool = False
) -> tuple[Array, Array]:
    """``(y, h)``: ``y = x @ w + h @ b`` and ``h = x @ a``, in one pass over ``x``.

    Args:
        x: ``[T, k]``.
        w: ``[k, n]``, in the dtype of ``x``.
        a: ``[k, r]``, of any floating dtype.
        b: ``[r, n]``, of any floating dtype.
        blocks: The tiles; None for those that suit the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``[T, n]`` and ``[T, r]`` in the dtype of ``x``, summed in float32.
    """
    y, h = _call(x, w, b, thin=a.T, blocks=blocks, interpret=interpret)
    return y, h


def backward(
    g: Array, w: Array, h: Array, a: Array, b: Array, *, blocks: Blocks | None = None, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """``(dx, u, dB)``: ``dx = g @ w.T + u @ a.T``, ``u = g @ b.T`` and ``dB = h.T @ g``, in one pass over ``g``.

    Args:
        g: ``[T, n]``, the cotangent of the result.
        w: ``[m, n]``, in the dtype of ``g``.
        h: ``[T, r]``, in the dtype of ``g``.
        a: ``[m, r]``, of any floating dtype.
        b: ``[r, n]``, of any floating dtype.
        blocks: The tiles; None for those that suit the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``[T, m]`` and ``[T, r]`` in the dtype of ``g``, and ``[r, n]`` in float32, each summed in float32.
    """
    dx, u, db = _call(g, w, a.T, thin=b, left=h, transposed=True, blocks=blocks, interpret=interpret)
    return dx, u, db


def _call(
    x: Array,
    w: Array,
    second: Array,
    *,
    h: Array | None = None,
    thin: Array | None = None,
    left: Array | None = None,
    transposed: bool = False,
    blocks: Blocks | None,
    interpret: bool,
) -> list[Array]:
    """``x @ w + h @ second``; without h, ``h = x @ thin.T`` as well, and with left, then ``left.T @ x``.

    Both factors have the rank first, ``[r, n]`` and ``[r, k]``: the last axis of an array takes a multiple of 128 in
    vector memory.
    """
    (tokens, k), n, rank = x.shape, w.shape[0 if transposed else 1], second.shape[0]
    second = pad_rank(second.astype(x.dtype), 0)
    thin = None if thin is None else pad_rank(thin.astype(x.dtype), 0)
    h, left = (None if v is None else pad_rank(v, 1) for v in (h, left))
    width = max(rank, 8)
    if blocks is None:
        sums_of_left = 0 if left is None else 8 * width * (k + 2048)
        blocks = product_blocks(tokens, n, k, width, x.dtype, reserved=sums_of_left)
    rows, columns, inner = blocks.rows, blocks.columns, blocks.inner
    grid = (pl.cdiv(tokens, rows), pl.cdiv(n, columns), pl.cdiv(k, inner))
    by_rows = pl.BlockSpec((rows, width), lambda i, j, s: (i, 0))
    of_x = pl.BlockSpec((rows, inner), lambda i, j, s: (i, s))
    of_w = pl.BlockSpec((columns, inner), lambda i, j, s: (j, s))
    of_thin = pl.BlockSpec((width, inner), lambda i, j, s: (0, s))
    operands = {
        "x": (x, pl.BlockSpec((rows, k), lambda i, j, s: (i, 0)) if blocks.resident else of_x),
        "w": (w, of_w if transposed else pl.BlockSpec((inner, columns), lambda i, j, s: (s, j))),
        "second": (second, pl.BlockSpec((width, columns), lambda i, j, s: (0, j))),
        "thin": (thin, of_thin),
        "h": (h, by_rows),
        "left": (left, by_rows),
    }
    # By name, as not every form has every operand, and the kernel finds its own again.
    operands = {name: (v, spec) for name, (v, spec) in operands.items() if v is not None}
    whole = (width, grid[2] * inner)
    results = {
        "y": ((tokens, n), x.dtype, pl.BlockSpec((rows, columns), lambda i, j, s: (i, j))),
        "h_out": ((tokens, width), x.dtype, by_rows),
        # The sums for dB stay until the end: one block, for all programs.
        "d": (whole, jnp.float32, pl.BlockSpec(whole, lambda i, j, s: (0, 0))),
    }
    results = {name: results[name] for name in ("y", *["h_out"] * (h is None), *["d"] * (left is not None))}
    arrays = [v for v, _ in operands.values()]
    names = (*operands, *results, "sums", *["h_sums"] * (h is None))
    kernel = functools.partial(_kernel, names=names, tokens=tokens, k=k, step=inner, transposed=transposed)
    out = pl.pallas_call(
        kernel,
        out_shape=[result_like(shape, dtype, *arrays) for shape, dtype, _ in results.values()],
        grid=grid,
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, _, spec in results.values()],
        scratch_shapes=[pltpu.VMEM((rows, size), jnp.float32) for size in (columns, *[width] * (h is None))],
        compiler_params=_compiler_params(h is None, left is not None),
        cost_estimate=_cost(blocks, tokens, n, k, rank, x.dtype.itemsize, len(results)),
        interpret=interpret,
        name="product_with_update_transposed" if transposed else "product_with_update",
    )(*arrays)
    # Without what the rank and the last step were filled up to.
    return [*out[:1], *(v[:, :rank] for v in out[1:2]), *(v[:rank, :k] for v in out[2:])]


def _compiler_params(with_h: bool, with_left: bool) -> pltpu.CompilerParams:
    """Which axes of the grid may go in any order: not those along which a program needs what another has left."""
    any_order, in_order = pltpu.PARALLEL, pltpu.ARBITRARY
    semantics = (in_order if with_left else any_order, in_order if with_h else any_order, in_order)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=device_vmem())


def _cost(blocks: Blocks, tokens: int, n: int, k: int, rank: int, itemsize: int, results: int) -> pl.CostEstimate:
    """What XLA is to think that the kernel costs: it cannot look into it."""
    small = rank * (n * -(-tokens // blocks.rows) + 2 * tokens + k)
    flops = 2 * tokens * (n * (k + rank) + k * rank * (results - 1))
    traffic = itemsize * (blocks.traffic(tokens, n, k) + small)
    return pl.CostEstimate(flops=flops, bytes_accessed=traffic, transcendentals=0)


def _kernel(*refs: Ref, names: tuple[str, ...], tokens: int, k: int, step: int, transposed: bool) -> None:
    ref = dict(zip(names, refs, strict=True))
    (i, j, s), last = (pl.program_id(axis) for axis in range(3)), pl.num_programs(2) - 1
    # Of all the columns that are there, or of the tile that is.
    x = ref["x"][:, part(s, step, ref["x"].shape[1])]
    x = inside(x, 1, s, k)
    axis = 1 if transposed else 0
    _add(ref["sums"], contract(x, inside(ref["w"][...], axis, s, k), 1, axis), s == 0)

    if "thin" in ref:

        @pl.when(j == 0)
        def _():
            _add(ref["h_sums"], contract(x, inside(ref["thin"][...], 1, s, k), 1, 1), s == 0)

        @pl.when((j == 0) & (s == last))
        def _():
            ref["h_out"][...] = ref["h_sums"][...].astype(x.dtype)

    if "left" in ref:
        # The tiles of x come by once for each j.
        @pl.when(j == 0)
        def _():
            left = inside(ref["left"][...], 0, i, tokens)
            columns = part(s, step, ref["d"].shape[1])
            _add(ref["d"].at[:, columns], contract(left, inside(x, 0, i, tokens), 0, 0), i == 0)

    @pl.when(s == last)
    def _():
        h = ref["h_out" if "thin" in ref else "h"][...]
        ref["y"][...] = (ref["sums"][...] + contract(h, ref["second"][...], 1, 0)).astype(x.dtype)


def _add(sums: Ref, term: Array, first: Array) -> None:
    """Adds a term to sums, which the first one starts."""

    @pl.when(first)
    def _():
        sums[...] = term

    @pl.when(jnp.logical_not(first))
    def _():
        sums[...] += term
