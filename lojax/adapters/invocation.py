"""On which tokens an activated LoRA acts: from the last occurrence of its invocation tokens on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lojax.adapters.adapter import is_adapter
from lojax.adapters.bank import Bank
from lojax.adapters.paths import flatten
from lojax.types import Array, Params


def active_tokens(tokens: Array, lora: Params | Bank | Sequence[int], *, adapter: Any = None) -> Array:
    """The tokens on which an adapter acts, for ``model.apply(..., active=)`` (aLoRA, arXiv:2512.17910).

    An adapter with invocation tokens acts from the start of their last occurrence on, and nowhere in a row without
    them; any other acts on every token. As PEFT's ``calculate_alora_offsets`` has it. Works under `jit`.

    Args:
        tokens: Token ids ``[batch, T]``: the whole sequence up to now, also where the net sees only its end.
        lora: The adapter, a `Bank`, or the invocation tokens themselves.
        adapter: For a bank: ``int [batch]``, the number of the adapter of each row, or their names; -1 acts nowhere.

    Returns:
        ``bool [batch, T]``.

    Raises:
        TypeError: ``adapter`` is missing for a bank, or given without one.
        ValueError: ``tokens`` has another shape; the weights of one adapter have different invocation tokens.

    >>> active_tokens(jnp.array([[5, 1, 2, 7], [1, 5, 5, 5]]), [1, 2]).tolist()
    [[False, True, True, True], [False, False, False, False]]
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens is {tokens.dtype}{list(tokens.shape)}; expected integers [batch, T].")
    if isinstance(lora, Bank):
        if adapter is None:
            raise TypeError("lora is a bank: say which row uses which of its adapters with adapter=ids.")
        return _of_bank(tokens, lora, adapter)
    if adapter is not None:
        raise TypeError("adapter= picks adapters of a bank, and lora is none. Leave it out.")
    if isinstance(lora, Sequence) and all(isinstance(token, int) for token in lora):
        return _from_last(tokens, tuple(lora))
    found = invocations(lora)
    return jnp.ones(tokens.shape, bool) if found is None else _from_last(tokens, found)


def invocations(lora: Params) -> tuple[int, ...] | None:
    """The invocation tokens of an adapter, the same for all its weights."""
    leaves = [leaf for leaf in flatten(lora).values() if is_adapter(leaf)]
    found = {leaf.invocation_tokens for leaf in leaves}
    if len(found) > 1:
        raise ValueError(f"The weights of one adapter have different invocation tokens: {sorted(map(str, found))}.")
    return found.pop() if found else None


def _of_bank(tokens: Array, bank: Bank, adapter: Any) -> Array:
    if isinstance(adapter, (list, tuple)):
        adapter = bank.ids(adapter)
    each = jnp.stack([active_tokens(tokens, lora) for lora in bank])
    ids = jnp.asarray(adapter)
    return each[jnp.maximum(ids, 0), jnp.arange(tokens.shape[0])] & (ids >= 0)[:, None]


def _from_last(tokens: Array, invocation: tuple[int, ...]) -> Array:
    """True from the start of the last occurrence of ``invocation`` on."""
    length, k = tokens.shape[1], len(invocation)
    if not 0 < k <= length:
        return jnp.zeros(tokens.shape, bool)
    starts = jnp.stack([tokens[:, i : length - k + 1 + i] == token for i, token in enumerate(invocation)]).all(0)
    places = jnp.arange(length - k + 1)
    last = jnp.max(jnp.where(starts, places, -1), axis=1)
    return (jnp.arange(length) >= last[:, None]) & (last >= 0)[:, None]
