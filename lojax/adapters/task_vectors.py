"""How several arrays become one: weighted sums, after pruning small, random or contradictory entries.

Letters: ``N`` adapters, ``S`` stacked weights, each pruned on its own.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Merge = Callable[..., jax.Array]


def keep_largest(x: jax.Array, density: float) -> jax.Array:
    """``x`` ``[N, S, ...]`` with the ``int(density * size)`` largest entries by magnitude of each, the others zero."""
    flat = x.reshape(*x.shape[:2], -1)
    count = int(density * flat.shape[-1])
    _, largest = jax.lax.top_k(jnp.abs(flat), count)
    mask = jnp.zeros(flat.shape, bool)
    n, s = jnp.indices(largest.shape)[:2]
    return jnp.where(mask.at[n, s, largest].set(True), flat, jnp.zeros_like(flat)).reshape(x.shape)


def drop_and_rescale(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """``x`` with each entry kept with probability ``density`` and divided by it (DARE, Yu et al. 2023, eq. 1)."""
    kept = jax.random.bernoulli(key, density, x.shape)
    return jnp.where(kept, x / jnp.asarray(density, x.dtype), jnp.zeros_like(x))


def weighted_sum(x: jax.Array, weights: jax.Array) -> jax.Array:
    """``sum_n weights[n] * x[n]`` (task arithmetic, Ilharco et al. 2022, eq. 2)."""
    return jnp.tensordot(weights, x, 1)


def sum_where_signs_agree(x: jax.Array, weights: jax.Array, majority: str) -> jax.Array:
    """The mean over the entries whose sign is the elected one (TIES, Yadav et al. 2023, steps 2 and 3).

    Args:
        x: ``[N, ...]``.
        weights: ``[N]``; they weigh the mean, not the vote.
        majority: ``"total"`` elects the sign of the sum, ``"frequency"`` that of most entries.
    """
    vote = x.sum(0) if majority == "total" else jnp.sign(x).sum(0)
    agrees = (jnp.sign(x) == jnp.where(vote >= 0, 1, -1).astype(x.dtype)).astype(x.dtype)
    return weighted_sum(x * agrees, weights) / jnp.maximum(agrees.sum(0), jnp.ones((), x.dtype))


def merger(method: str, density: float | None, majority: str) -> Merge:
    """The function ``(x [N, S, ...], weights [N], key) -> [S, ...]`` of a method."""

    def merge(x: jax.Array, weights: jax.Array, key: jax.Array | None) -> jax.Array:
        if density is not None and method.startswith("dare"):
            assert key is not None
            x = drop_and_rescale(x, density, key)
        elif density is not None and density < 1:
            x = keep_largest(x, density)
        return sum_where_signs_agree(x, weights, majority) if "ties" in method else weighted_sum(x, weights)

    return merge
