"""How several arrays become one: weighted sums, after pruning small, random or contradictory entries.

Letters: ``N`` adapters, ``S`` stacked weights, each pruned on its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lojax.types import Array, Key


def keep_largest(x: Array, density: float) -> Array:
    """``x`` ``[N, S, ...]`` with the ``int(density * size)`` largest entries by magnitude of each, the others zero."""
    flat = x.reshape(*x.shape[:2], -1)
    count = int(density * flat.shape[-1])
    _, largest = jax.lax.top_k(jnp.abs(flat), count)
    mask = jnp.zeros(flat.shape, bool)
    n, s = jnp.indices(largest.shape)[:2]
    return jnp.where(mask.at[n, s, largest].set(True), flat, jnp.zeros_like(flat)).reshape(x.shape)


def drop_and_rescale(x: Array, density: float, key: Key) -> Array:
    """``x`` with each entry kept with probability ``density`` and divided by it (DARE, Yu et al. 2023, eq. 1)."""
    mask = jax.random.bernoulli(key, density, x.shape)
    return jnp.where(mask, x / jnp.asarray(density, x.dtype), jnp.zeros_like(x))


def weighted_sum(x: Array, weights: Array) -> Array:
    """``sum_n weights[n] * x[n]`` (task arithmetic, Ilharco et al. 2022, eq. 2)."""
    return jnp.tensordot(weights, x, 1)


def sum_where_signs_agree(x: Array, weights: Array, majority: str) -> Array:
    """The mean over the entries whose sign is the elected one (TIES, Yadav et al. 2023, steps 2 and 3).

    Args:
        x: ``[N, ...]``.
        weights: ``[N]``; they weigh the mean, not the vote.
        majority: ``"total"`` elects the sign of the sum, ``"frequency"`` that of most entries.
    """
    vote = x.sum(0) if majority == "total" else jnp.sign(x).sum(0)
    agrees = (jnp.sign(x) == jnp.where(vote >= 0, 1, -1).astype(x.dtype)).astype(x.dtype)
    return weighted_sum(x * agrees, weights) / jnp.maximum(agrees.sum(0), jnp.ones((), x.dtype))


def prune_and_sum(
    x: Array, weights: Array, *, method: str, density: float | None, majority: str, key: Key | None
) -> Array:
    """``x`` ``[N, S, ...]`` pruned and summed with ``weights`` ``[N]`` as the method says: ``[S, ...]``.

    Args:
        x: The arrays.
        weights: Their weights.
        method: One of `lojax.adapters.algebra.METHODS`; what it is called says what it does.
        density: The share of entries that pruning keeps; None for no pruning.
        majority: As in `sum_where_signs_agree`.
        key: The PRNG key of the DARE methods; consumed.
    """
    if density is not None and method.startswith("dare"):
        assert key is not None
        x = drop_and_rescale(x, density, key)
    elif density is not None and density < 1:
        x = keep_largest(x, density)
    return sum_where_signs_agree(x, weights, majority) if "ties" in method else weighted_sum(x, weights)
