"""Code books: the values that small integers stand for."""

from __future__ import annotations

import functools

import numpy as np

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values of NF4: quantiles of a normal distribution, in steps of equal probability on either side of zero,
scaled to [-1, 1] (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""


def _even_steps(count: int) -> np.ndarray:
    """The ends of ``count`` equal parts of [0.1, 1], float32, to the bit those of bitsandbytes' code book."""
    # It counts from the nearer end with a step in float32, and rounds each result once (a fused multiply and add).
    first, step = float(np.float32(0.1)), float((np.float32(1) - np.float32(0.1)) / np.float32(count))
    i = np.arange(count + 1)
    return np.where(i < (count + 1) // 2, first + step * i, 1.0 - step * (count - i)).astype(np.float32)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the 8-bit dynamic type, in order, float32 (Dettmers 2016, arXiv:1511.04561, section 4).

    Seven decades, each with twice as many steps as the one below: of decade ``e``, the middles of ``2^(e+1)`` equal
    parts of [0.1, 1], times ``10^(e-6)``, with either sign; and 0 and 1.
    """
    values = [np.float32(0), np.float32(1)]
    for decade in range(7):
        edges = _even_steps(2**decade)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        steps = np.float32(10.0 ** (decade - 6)) * middles
        values += [*steps, *-steps]
    return np.sort(np.asarray(values, np.float32))
