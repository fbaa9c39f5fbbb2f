"""Starts of an adapter read off the weight itself. What the update starts with is taken out of the weight,
so every one of them starts exactly at the pretrained model.

Every function here maps ``(key, w [m, n], rank, scale)`` to ``a [m, r], b [r, n]``, in the dtype of ``w``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.axes import Axes
from lojax.adapters.matrices import as_matrices, from_matrices

OVERSAMPLES = 10
"""Columns beyond the rank that the randomized SVD works with (Halko et al. 2011, §4.2: 5 to 10 are enough)."""


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A start that gives both factors.

    Attributes:
        factors: ``(key, w, rank, scale) -> (a, b)`` for one matrix ``w`` ``[m, n]``.
        changes_weight: Whether ``scale * a @ b`` is not zero, and so is taken out of the frozen weight.
    """

    factors: Callable[..., tuple[jax.Array, jax.Array]]
    changes_weight: bool = True


def orthogonal(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Random factors, both other than zero, with ``a @ b = 0``: PEFT's ``init_lora_weights="orthogonal"``.

    One half of the rows of a random orthogonal ``[r, r]`` matrix is used for ``a``, the other for ``b``. The rank
    is even.
    """
    del scale
    basis_key, a_key, b_key = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(basis_key, (rank, rank), w.dtype))[0]
    a = jax.random.normal(a_key, (w.shape[0], rank // 2), w.dtype) @ basis[0::2] / 10
    b = basis[1::2].T @ jax.random.normal(b_key, (rank // 2, w.shape[1]), w.dtype) / 10
    return a, b


def pissa(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """The largest singular values and vectors of the weight (PiSSA, Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4)."""
    del key
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return _shared(u[:, :rank], s[:rank], vt[:rank], scale)


def fast_pissa(key: jax.Array, w: jax.Array, rank: int, scale: float, *, steps: int) -> tuple[jax.Array, jax.Array]:
    """PiSSA by a randomized SVD with ``steps`` steps of subspace iteration (Halko et al. 2011, arXiv:0909.4061).

    PEFT's ``"pissa_niter_<steps>"``; the weight is only multiplied, with ``rank`` columns and a few more.
    """
    width = min(rank + OVERSAMPLES, *w.shape)
    basis = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
    for _ in range(steps):
        basis = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ basis)[0])[0]
    u, s, vt = jnp.linalg.svd(basis.T @ w, full_matrices=False)
    return _shared((basis @ u)[:, :rank], s[:rank], vt[:rank], scale)


def milora(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """The smallest singular values and vectors of the weight (MiLoRA, Wang et al. 2024, arXiv:2406.09044, eq. 4)."""
    del key
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return _shared(u[:, -rank:], s[-rank:], vt[-rank:], scale)


def olora(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """The start of the QR decomposition of the weight's transpose (OLoRA, Büyükakyüz 2024, arXiv:2406.01775)."""
    del key, scale
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


def _shared(u: Any, s: Any, vt: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    """Half of the singular values to each factor, such that ``scale * a @ b = u diag(s) vt``."""
    root = jnp.sqrt(s / scale)
    return u * root, root[:, None] * vt


DECOMPOSITIONS: dict[str, Decomposition] = {
    "orthogonal": Decomposition(orthogonal, changes_weight=False),
    "pissa": Decomposition(pissa),
    "milora": Decomposition(milora),
    "olora": Decomposition(olora),
}


def decomposition(name: str) -> Decomposition | None:
    """The decomposition of this name, ``"pissa_niter_<steps>"`` among them; None if there is none."""
    if steps := re.fullmatch(r"pissa_niter_(\d{1,3})", name):
        return Decomposition(functools.partial(fast_pissa, steps=int(steps[1])))
    return DECOMPOSITIONS.get(name)


def factorize(
    found: Decomposition, key: jax.Array, matrices: jax.Array, rank: int, scale: float, what: str
) -> tuple[jax.Array, jax.Array]:
    """The factors of a stack of matrices ``[S, m, n]``: ``a`` ``[S, m, r]`` and ``b`` ``[S, r, n]``.

    Args:
        found: How.
        key: Consumed: every entry of the stack has a key of its own.
        matrices: In float32 or wider.
        rank: The rank.
        scale: The factor that will be on the update; above 0.
        what: Who asks, for errors.

    Raises:
        ValueError: The start cannot give this rank.
    """
    if found.factors is orthogonal and rank % 2:
        raise ValueError(f'{what}: init="orthogonal" needs an even rank, got {rank}. Choose {rank + 1}, or "kaiming".')
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"{what}: a start from the weight needs a scale above 0, got {scale}.")
    keys = jax.random.split(key, matrices.shape[0])
    with jax.default_matmul_precision("highest"):
        return jax.vmap(lambda k, w: found.factors(k, w, rank, scale))(keys, matrices)


def without_update(w: Any, a: jax.Array, b: jax.Array, scale: float, axes: Axes) -> jax.Array:
    """The weight ``w`` less ``scale * a @ b``, of the factors as they are stored, rounding and all."""
    matrices = as_matrices(w, axes)
    left = a.reshape(*matrices.shape[:2], -1).astype(matrices.dtype)
    right = b.reshape(matrices.shape[0], -1, matrices.shape[2]).astype(matrices.dtype)
    product = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    return from_matrices(matrices - scale * product, axes, w.shape, w.dtype)
