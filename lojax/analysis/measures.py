"""What an update does to one matrix, in numbers. Pure maths of NumPy arrays in float64.

Letters: ``m`` in, ``n`` out, ``r`` rank. ``w`` is the pretrained matrix, and ``(u, s, vt)`` the singular value
decomposition of its update.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lojax.adapters.intruders import direction_cosines
from lojax.adapters.spectrum import NEGLIGIBLE, largest_singular_value, out_directions

BLOCK = 1 << 22
"""How many entries of a matrix are updated at once."""

Decomposition = tuple[np.ndarray, np.ndarray, np.ndarray]
"""``(u, s, vt)`` of shapes ``[m, r]``, ``[r]`` and ``[r, n]``."""


class Measures(NamedTuple):
    """What an update does to its matrix; see `lojax.analysis.analyze.Row`."""

    ratio: float
    top_ratio: float
    amplification: float | None
    cosines: np.ndarray | None
    lost: float


def measure(w: np.ndarray, update: Decomposition, rank: int, *, top: int) -> Measures:
    """The measures of an update on its matrix.

    Args:
        w: ``[m, n]``.
        update: The decomposition of the update; of one that is not of low rank it has all ``min(m, n)`` values.
        rank: The number of directions that the amplification is about.
        top: How many directions of the sum are searched for intruders; 0 for none, which saves two decompositions.
    """
    u, s, vt = update
    norm, base_norm = float(np.linalg.norm(s)), float(np.linalg.norm(w))
    cosines = None
    if not (np.isfinite(w).all() and np.isfinite(s).all()):
        return Measures(math.nan, math.nan, math.nan, None, math.nan)
    if top:
        base_values, base_vectors = out_directions(w)
        largest = float(base_values[0]) if len(base_values) else 0.0
        cosines = direction_cosines(base_vectors, w + (u * s) @ vt, top)[0]
    else:
        largest = largest_singular_value(w)
    return Measures(
        ratio=_quotient(norm, base_norm),
        top_ratio=_quotient(float(s[0]) if s.size else 0.0, largest),
        amplification=amplification(w, update, rank),
        cosines=cosines,
        lost=lost_share(w, update),
    )


def amplification(w: np.ndarray, update: Decomposition, rank: int) -> float | None:
    """``||dW||_F / ||U^T W V||_F`` (Hu et al. 2021, arXiv:2106.09685, section 7.3): how much an update strengthens what
    the matrix did in the same directions.

    ``U`` and ``V`` are the singular vectors of the update, up to ``rank`` of them and without those of zeros, whose
    directions mean nothing. None for an update of zero.

    >>> w = np.diag([2.0, 1.0])
    >>> amplification(w, (np.array([[1.0], [0.0]]), np.array([6.0]), np.array([[1.0, 0.0]])), 1)
    3.0
    """
    u, s, vt = update
    count = min(rank, int((s > NEGLIGIBLE * s.max()).sum())) if s.size else 0
    if not count:
        return None
    return _quotient(float(np.linalg.norm(s)), float(np.linalg.norm(u[:, :count].T @ w @ vt[:count].T)))


def lost_share(w: np.ndarray, update: Decomposition) -> float:
    """The share of the entries that the update moves and a merge in bfloat16 leaves as they were.

    The sum is in float32, as in `lojax.merge`; both it and ``w`` are rounded to bfloat16.
    """
    u, s, vt = update
    left = u * s
    moved = lost = 0
    rows = max(1, BLOCK // max(w.shape[1], 1))
    for start in range(0, w.shape[0], rows):
        block = w[start : start + rows].astype(np.float32)
        change = (left[start : start + rows] @ vt).astype(np.float32)
        moves = change != 0
        stays = (block + change).astype(jnp.bfloat16) == block.astype(jnp.bfloat16)
        moved += int(moves.sum())
        lost += int((moves & stays).sum())
    return lost / moved if moved else 0.0


def _quotient(x: float, y: float) -> float:
    if y > 0:
        return x / y
    return math.inf if x > 0 else 0.0
