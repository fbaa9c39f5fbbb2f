"""Trained rows of an embedding: PEFT stores the new rows (though it calls them ``delta``), an adapter what is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import positions
from lojax.adapters.metadata import unbox
from lojax.peft.name_map import Slot, roles


def is_table(slot: Slot) -> bool:
    """Whether the slot is a whole embedding, with one axis of rows: what PEFT can train rows of."""
    return slot.kind == "embedding" and not slot.entry and slot.axes is not None and slot.axes.count("in") == 1


def check_table(slot: Slot) -> None:
    """Raises unless the slot is a whole embedding."""
    if not is_table(slot):
        raise ValueError(
            f"{slot.path} {slot.shape} is {slot.module} as a {slot.kind} weight with axes {slot.axes} by the name "
            f"rule {slot.text!r}; token rows are of an embedding, one leaf with one in axis."
        )


def torch_shape(slot: Slot, tokens: Sequence[int]) -> tuple[int, ...]:
    """The shape of PEFT's ``trainable_tokens_delta``: ``[k, features]``."""
    return len(tokens), math.prod(slot.shape) // vocabulary(slot)


def vocabulary(slot: Slot) -> int:
    """The number of rows of an embedding."""
    return slot.shape[positions(roles(slot), "in")[0]]


def from_torch(slot: Slot, rows: np.ndarray, tokens: Sequence[int], leaf: Any, dtype: Any) -> Adapter:
    """The adapter of the new ``rows`` ``[k, features]``: less the rows of the base, in float32."""
    axes = roles(slot)
    base = _rows(slot, tokens, leaf, "trainable_tokens_delta holds whole rows, of which the adapter keeps what is new")
    delta = rows.astype(np.float32).reshape(base.shape) - base
    return Adapter(None, None, 1.0, axes, rows=jnp.asarray(delta, dtype or rows.dtype), tokens=tuple(tokens))


def to_torch(slot: Slot, adapter: Adapter, leaf: Any) -> np.ndarray:
    """The new rows ``[k, features]`` of an embedding: those of the base and what the adapter adds, in float32."""
    check_table(slot)
    assert adapter.tokens is not None
    if adapter.a is not None:
        raise ValueError(
            f"{slot.path} holds an adapter and token rows; PEFT has one or the other for an embedding. "
            "Train rows alone (train='tokens'), or the adapter without tokens=."
        )
    if adapter.axes != roles(slot):
        raise ValueError(
            f"{slot.path}: the token rows are of axes {adapter.axes}, the name rule {slot.text!r} says {slot.axes}. "
            "Correct the rule, or adapt the weight with axes= as the rule says."
        )
    base = _rows(slot, adapter.tokens, leaf, "PEFT stores whole rows, not what was added to them")
    return (base + np.asarray(unbox(adapter.rows), np.float32)).reshape(torch_shape(slot, adapter.tokens))


def _rows(slot: Slot, tokens: Sequence[int], leaf: Any, why: str) -> np.ndarray:
    """The rows of the base, ``[k, *out]``, in float32."""
    table = unbox(leaf)
    if not hasattr(table, "__array__"):
        raise ValueError(f"{slot.path}: {why}; pass the array of the embedding, not its shape.")
    axis = positions(roles(slot), "in")[0]
    if isinstance(table, jax.Array):
        rows = jnp.take(table, jnp.array(tokens), axis=axis)
    else:
        rows = np.take(np.asarray(table), tokens, axis=axis)
    return np.moveaxis(np.asarray(rows, np.float32), axis, 0)
