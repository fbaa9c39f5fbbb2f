"""LoftQ: a quantized weight and an adapter that together are near to the pretrained weight.

Li et al. 2023, arXiv:2310.08659, algorithm 1. The two are found in turns: the weight without the update is quantized,
and the update is the best one of its rank for what quantization left over.

Letters as in `lojax.adapters.matrices`: ``S`` entries of a stack, ``m`` in, ``n`` out, ``r`` rank.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lojax.adapters.axes import Axes
from lojax.adapters.matrices import as_matrices, from_matrices
from lojax.quantized.formats import Format
from lojax.quantized.quantized import Quantized, quantize_weight
from lojax.types import Array, Dtype

STEPS = 5
"""The steps of ``"loftq"``. On Gaussian weights most of the gain is in the first five."""


def truncated_svd(w: Array, rank: int, scale: float) -> tuple[Array, Array]:
    """The factors ``[m, r]`` and ``[r, n]`` whose product, times ``scale``, is nearest to ``w`` ``[m, n]``."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return share_singular_values(u[:, :rank], s[:rank], vt[:rank], scale)


def share_singular_values(u: Array, s: Array, vt: Array, scale: float) -> tuple[Array, Array]:
    """Half of the singular values to each factor, such that ``scale * a @ b = u diag(s) vt``."""
    root = jnp.sqrt(s / scale)
    return u * root, root[:, None] * vt


# At module level, so that weights of equal shapes are compiled once.
@functools.partial(jax.jit, static_argnames=("format", "axes", "rank", "scale", "dtype"))
def alternate(
    w: Array, steps: int, *, format: Format, axes: Axes, rank: int, scale: float, dtype: Dtype
) -> tuple[Array, Array, Quantized]:
    """LoftQ of one weight: the factors ``[S, m, r]`` and ``[S, r, n]`` in ``dtype``, and the quantized weight.

    The weight is quantized whole, as `lojax.quantize` does it; each matrix of a stack has its own decomposition. The
    error of a step is below that of its quantized weight alone; that it falls from step to step is observed, not
    proved.
    """
    matrices = as_matrices(w, axes)
    split = jax.vmap(functools.partial(truncated_svd, rank=rank, scale=scale))

    def step(a: Array, b: Array) -> tuple[Array, Array, Quantized]:
        # From the factors as they are stored: what rounding takes from them, the quantized weight may hold.
        product = jnp.matmul(a.astype(matrices.dtype), b.astype(matrices.dtype), precision=lax.Precision.HIGHEST)
        remainder = from_matrices(matrices - scale * product, axes, w.shape, matrices.dtype)
        quantized = dataclasses.replace(quantize_weight(remainder, format), dtype=jnp.dtype(w.dtype))
        # The values that the net will multiply with, in the dtype of the weight.
        left, right = split(matrices - as_matrices(quantized.dense(), axes))
        return left.astype(dtype), right.astype(dtype), quantized

    stack, m, n = matrices.shape
    zeros = jnp.zeros((stack, m, rank), dtype), jnp.zeros((stack, rank, n), dtype)
    # The loop overwrites the quantized weight that it starts with. One body in it, since to compile that takes seconds.
    unused = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, *zeros)[2])
    return lax.fori_loop(0, steps, lambda _, state: step(*state[:2]), (*zeros, unused))
