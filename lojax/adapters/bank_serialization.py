"""Registers `Bank` with the libraries that write pytrees: `jax.export` and Flax's serialization."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flax import serialization
from jax import export

from lojax.adapters.bank import Bank


def _to_state_dict(bank: Bank) -> dict[str, Any]:
    """The arrays. As everywhere in Flax, what is static (names, scales, ranks) comes from the target on reading."""
    return {"lora": serialization.to_state_dict(bank.lora)}


def _from_state_dict(bank: Bank, state: dict[str, Any]) -> Bank:
    if state.keys() != {"lora"}:
        raise ValueError(
            f"What was written holds {', '.join(state)}, and the target is a bank. Read it into a tree like the one "
            "that was written; lojax.save writes banks that need no target."
        )
    return dataclasses.replace(bank, lora=serialization.from_state_dict(bank.lora, state["lora"], "lora"))


def _serialize_static(values: tuple[Any, ...]) -> bytes:
    return json.dumps(values).encode()


def _deserialize_static(data: bytes) -> tuple[Any, ...]:
    size, names = json.loads(data)
    return size, None if names is None else tuple(names)


serialization.register_serialization_state(Bank, _to_state_dict, _from_state_dict)
export.register_pytree_node_serialization(
    Bank,
    serialized_name="lojax.Bank",
    serialize_auxdata=_serialize_static,
    deserialize_auxdata=_deserialize_static,
)
