"""How an adapter starts, by name. Here: the starts of ``a`` alone; ``b`` is zero with them."""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.decompositions import DECOMPOSITIONS, Decomposition, decomposition


def kaiming(key: jax.Array, shape: tuple[int, ...], dtype: Any, *, fan_in: int, rank: int) -> jax.Array:
    """Uniform in ``±1/sqrt(fan_in)``: Kaiming uniform with slope sqrt(5), PEFT's default for A.

    He et al. 2015, arXiv:1502.01852, eq. 14, with gain ``sqrt(2 / (1 + 5))``.

    Args:
        key: Consumed.
        shape: ``[*stack, *in, r]``.
        dtype: The dtype of the result.
        fan_in: The product of the in axes, ``m``.
        rank: Unused.
    """
    del rank
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any, *, fan_in: int, rank: int) -> jax.Array:
    """Normal with standard deviation ``1/r``: PEFT's ``init_lora_weights="gaussian"``.

    Args:
        key: Consumed.
        shape: ``[*stack, *in, r]``.
        dtype: The dtype of the result.
        fan_in: Unused.
        rank: The rank ``r``.
    """
    del fan_in
    return jax.random.normal(key, shape, dtype) / rank


INITIALIZERS: dict[str, Callable[..., jax.Array]] = {"kaiming": kaiming, "gaussian": gaussian}

FROM_DATA = {
    "eva": "lora = lojax.eva(model.apply, frozen, lora, batches)",
    "lora_ga": "frozen, lora = lojax.lora_ga(loss, frozen, lora, batches)",
}
"""Starts that need data, and what gives them (see `lojax.training`)."""


def initializer(init: str | Callable[..., Any]) -> Callable[..., jax.Array] | Decomposition:
    """The start called ``init``, or ``init`` itself where it is a function for ``a``.

    Raises:
        ValueError: There is no start of this name.
    """
    if callable(init):
        return init
    if str(init).lower() in FROM_DATA:
        call = FROM_DATA[str(init).lower()]
        raise ValueError(f"init={init!r} needs batches: init with another start, then call {call}.")
    found = INITIALIZERS.get(str(init)) or decomposition(str(init))
    if found is None:
        known = sorted({*INITIALIZERS, *DECOMPOSITIONS, "pissa_niter_4"})
        near = difflib.get_close_matches(str(init), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"init={init!r} is unknown; expected one of {known}.{hint}")
    return found


def key_for(key: jax.Array, path: str) -> jax.Array:
    """The key of the weight at ``path``: the same whatever else is adapted, and in any order."""
    data = path.encode()
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(data)), zlib.adler32(data))


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The start of ``b``."""
    return jnp.zeros(shape, dtype)
