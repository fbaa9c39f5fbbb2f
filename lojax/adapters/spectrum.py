"""The singular values and directions of updates and weights, on the host in float64.

Letters: ``m`` in, ``n`` out, ``r`` rank, ``k`` the smaller of ``m`` and ``n``. An update is never materialized here:
its decomposition is that of an ``[r, r]`` matrix.
"""

from __future__ import annotations

import math

import numpy as np

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding: of factors in float32, or of squares in float64."""

OVERSAMPLES = 10
"""Columns beyond those asked for that a randomized decomposition works with (Halko et al. 2011, section 4.2)."""


def thin_svd(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition of ``a @ b``, the product never formed.

    ``a @ b = Qa (Ra Rb^T) Qb^T``: two thin QR decompositions and the SVD of ``Ra Rb^T``.

    Args:
        a: ``[m, r]``.
        b: ``[r, n]``.

    Returns:
        ``(u, s, vt)`` of shapes ``[m, p]``, ``[p]`` and ``[p, n]``, ``p`` the smallest of ``m``, ``r`` and ``n``.
        NaN where a factor is not finite.

    >>> u, s, vt = thin_svd(np.array([[3.0], [4.0]]), np.array([[2.0, 0.0]]))
    >>> s.round(6).tolist(), ((u * s) @ vt).round(6).tolist()
    ([10.0], [[6.0, 0.0], [8.0, 0.0]])
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not b.size:
        return a[:, :0], np.zeros(0), b[:0]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        size = min(a.shape[0], *b.shape)
        return np.full((a.shape[0], size), np.nan), np.full(size, np.nan), np.full((size, b.shape[1]), np.nan)
    qa, ra = np.linalg.qr(a)
    qb, rb = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)
    return qa @ u, s, vt @ qb.T


def share_evenly(u: np.ndarray, s: np.ndarray, vt: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``[m, r]`` and ``[r, n]`` with ``scale * a @ b = u diag(s) vt``, half of each singular value on either.

    >>> a, b = share_evenly(np.ones((2, 1)), np.array([8.0]), np.ones((1, 2)), -2.0)
    >>> a.tolist(), b.tolist()
    ([[-2.0], [-2.0]], [[2.0, 2.0]])
    """
    root = np.sqrt(s / abs(scale))
    return u * (root if scale > 0 else -root), root[:, None] * vt


def out_directions(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The singular values of a matrix, largest first, and its singular vectors on the side of the outputs.

    By the eigenvectors of the smaller of ``w^T w`` and ``w w^T``. In float64 that is as exact as the SVD of a matrix of
    float32 numbers is in float32, and takes a third of the time.

    Args:
        w: ``[m, n]``, finite.

    Returns:
        ``(s, v)`` of shapes ``[p]`` and ``[n, p]``, ``p <= k``: without `NEGLIGIBLE` singular values, whose vectors
        are not determined.
    """
    w = np.asarray(w, np.float64)
    m, n = w.shape
    squares, vectors = np.linalg.eigh(w.T @ w if n <= m else w @ w.T)
    s, vectors = np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1]
    count = int((s > NEGLIGIBLE * s[0]).sum()) if len(s) else 0
    s, vectors = s[:count], vectors[:, :count]
    return s, vectors if n <= m else (w.T @ vectors) / s


def leading_directions(w: np.ndarray, count: int, *, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest singular values and the vectors on the side of the outputs, by randomized subspace iteration.

    Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1. The matrix is only multiplied, with ``count`` columns
    and `OVERSAMPLES` more.

    Args:
        w: ``[m, n]``, finite.
        count: How many.
        steps: Steps of the iteration; each makes the error smaller, as the square of the ratio of singular values.

    Returns:
        ``(s, v)`` of shapes ``[p]`` and ``[n, p]``, ``p <= count``, without `NEGLIGIBLE` values.
    """
    width = min(count + OVERSAMPLES, *w.shape)
    basis = np.linalg.qr(w @ np.random.default_rng(0).normal(size=(w.shape[1], width)))[0]
    for _ in range(steps):
        # A QR after each half step: the plain power would lose all but the largest direction to rounding.
        basis = np.linalg.qr(w @ np.linalg.qr(w.T @ basis)[0])[0]
    _, s, vt = np.linalg.svd(basis.T @ w, full_matrices=False)
    kept = min(count, int((s > NEGLIGIBLE * s[0]).sum()))
    return s[:kept], vt[:kept].T


def largest_singular_value(w: np.ndarray, *, steps: int = 100, tolerance: float = 1e-9) -> float:
    """The largest singular value of ``w`` ``[m, n]`` by Golub and Kahan's bidiagonalization (1965).

    It only multiplies with the matrix, twice a step. The vectors are orthogonalized against all earlier ones.

    Args:
        w: The matrix, finite.
        steps: The most steps that are taken.
        tolerance: It ends once a step changes the value by less than this share.
    """
    w = w if w.shape[1] <= w.shape[0] else w.T  # the steps then end with the whole space
    m, n = w.shape
    right = np.random.default_rng(0).normal(size=n)
    rights, lefts = np.zeros((0, n)), np.zeros((0, m))
    diagonal: list[float] = []
    beside: list[float] = []
    value = 0.0
    for _ in range(min(steps, n)):
        length = float(np.linalg.norm(right))
        if length <= 1e-300:
            break
        rights = np.vstack([rights, right / length])
        beside.append(length)
        left = _orthogonal(w @ rights[-1], lefts)
        diagonal.append(float(np.linalg.norm(left)))
        if diagonal[-1] <= 1e-300:
            break
        lefts = np.vstack([lefts, left / diagonal[-1]])
        right = _orthogonal(w.T @ lefts[-1], rights)
        bidiagonal = np.diag(diagonal) + np.diag(beside[1:], 1)
        before, value = value, float(np.linalg.svd(bidiagonal, compute_uv=False)[0])
        if value - before <= tolerance * value:
            break
    return value


def _orthogonal(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``x`` without its part in the space of orthonormal ``rows``; twice, since rounding leaves some of it."""
    for _ in range(2):
        x = x - rows.T @ (rows @ x)
    return x


def stable_rank(s: np.ndarray) -> float:
    """``||W||_F^2 / sigma_1^2`` (Rudelson and Vershynin 2007): 1 for a single direction; 0 for a zero matrix.

    >>> stable_rank(np.array([2.0, 2.0, 0.0])), stable_rank(np.zeros(3))
    (2.0, 0.0)
    """
    if np.isnan(s).any():
        return math.nan
    return float((s / s.max()) @ (s / s.max())) if s.size and s.max() > 0 else 0.0


def effective_rank(s: np.ndarray) -> float:
    """``exp`` of the entropy of the normalized singular values (Roy and Vetterli 2007); 0 for a zero matrix.

    >>> round(effective_rank(np.array([1.0, 1.0, 0.0])), 6)
    2.0
    """
    total = s.sum()
    if np.isnan(total):
        return math.nan
    if not total > 0:
        return 0.0
    p = s[s > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def least_rank(s: np.ndarray, energy: float) -> int:
    """The smallest number of singular values whose squares are at least the share ``energy`` of those of all.

    Truncation to that rank is the best approximation that keeps the energy (Eckart and Young 1936). `NEGLIGIBLE`
    values count as zero, so that ``energy=1`` gives the numerical rank.

    Args:
        s: Singular values, largest first.
        energy: In (0, 1].

    >>> least_rank(np.array([3.0, 1.0, 0.1, 0.0]), 0.8), least_rank(np.array([3.0, 1.0, 0.1, 0.0]), 1.0)
    (1, 3)
    """
    if not s.size or not s[0] > 0:
        return 0
    squares = (s / s[0]) ** 2
    squares[s <= NEGLIGIBLE * s[0]] = 0
    # What is left out is summed from the small end: there the differences that decide are not lost in a large sum.
    left_out = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # by the number of values that are kept
    return int(np.argmax(left_out <= (1 - energy) * squares.sum()))
