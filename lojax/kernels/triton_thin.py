"""``x @ a`` with few columns, in one reading of ``x`` on a GPU (Pallas, lowered by Triton).

A program takes some rows of ``x`` and walks along all of them, so no sum is in parts.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lojax.kernels.result import result_like
from lojax.kernels.tiles import Thin, padded_rank, thin_steps
from lojax.kernels.triton_tile import Span, contract, load, store
from lojax.types import Array, Ref


def thin_product(
    x: Array, a: Array, *, transposed: bool = False, steps: Thin | None = None, interpret: bool = False
) -> Array:
    """``x @ a``, or ``x @ a.T`` of ``a`` as it is stored.

    Args:
        x: ``[T, k]``.
        a: ``[k, r]``; ``[r, k]`` if transposed. Of any floating dtype; it is cast to that of ``x``.
        transposed: Whether ``a`` is contracted along its last axis.
        steps: How a program walks; None for what suits the shape.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``[T, r]`` in the dtype of ``x``, summed in float32.
    """
    tokens, rank = x.shape[0], a.shape[0 if transposed else 1]
    steps = steps or thin_steps(tokens, rank, x.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, steps=steps, transposed=transposed),
        out_shape=result_like((tokens, rank), x.dtype, x, a),
        grid=(pl.cdiv(tokens, steps.rows),),
        compiler_params=plgpu.CompilerParams(num_warps=steps.warps, num_stages=steps.stages),
        interpret=interpret,
        name="thin_product",
    )(x, a)


def _kernel(x_ref: Ref, a_ref: Ref, h_ref: Ref, *, steps: Thin, transposed: bool) -> None:
    (tokens, k), rank = x_ref.shape, h_ref.shape[1]
    program = pl.program_id(0)
    # "program * 0", not 0: of a start that it knows JAX checks the end, and the rank may be shorter than its tile.
    rows, ranks = Span(program * steps.rows, steps.rows, tokens), Span(program * 0, padded_rank(rank), rank)

    def step(s: Array, sums: Array) -> Array:
        inner = Span(s * steps.inner, steps.inner, k)
        x = load(x_ref, rows, inner)
        a = load(a_ref, ranks, inner) if transposed else load(a_ref, inner, ranks)
        return sums + contract(x, a.astype(x.dtype), 1, 1 if transposed else 0)

    sums = lax.fori_loop(0, pl.cdiv(k, steps.inner), step, jnp.zeros((rows.length, ranks.length), jnp.float32))
    store(h_ref, rows, ranks, sums)
