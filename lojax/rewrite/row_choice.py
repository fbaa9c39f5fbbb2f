"""What a caller says about the rows of a batch: which adapter each uses, and on which tokens it acts. Checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import is_adapter
from lojax.adapters.bank import Bank
from lojax.adapters.paths import flatten
from lojax.text import spec
from lojax.types import Array, Leaf, Params, Path


def check_bank(lora: Params | Bank | None) -> Bank:
    """``lora``, if it is a bank.

    Raises:
        TypeError: It is not.
    """
    if isinstance(lora, Bank):
        return lora
    what = "None" if lora is None else "one adapter"
    raise TypeError(
        f"adapter= picks adapters of a bank, and lora is {what}. Make a bank with lojax.stack([lora, ...]), or leave "
        "adapter= out."
    )


def check_choice(bank: Bank, adapter: Any) -> Array:
    """``adapter`` as an array.

    Raises:
        TypeError: ``adapter`` is of a kind that names no adapters.
        ValueError: A number is out of range, or the shape is not one of those expected.
    """
    if isinstance(adapter, str):
        adapter = bank.index(adapter)
    elif isinstance(adapter, (list, tuple)) and any(isinstance(name, str) or name is None for name in adapter):
        adapter = bank.ids(adapter)
    choice = jnp.asarray(adapter)
    if choice.size == 0:
        raise ValueError("adapter= is empty; expected the number of an adapter for each row of the batch.")
    usage = f"expected integers [batch] from -1 (the base alone) to {len(bank) - 1}, or floats [batch, {len(bank)}]"
    if jnp.issubdtype(choice.dtype, jnp.integer):
        if choice.ndim > 1:
            raise ValueError(f"adapter= is {spec(choice)}; {usage}.")
        if not isinstance(choice, Tracer):
            values = np.asarray(choice)
            bad = values[(values < -1) | (values >= len(bank))]
            if bad.size:
                raise ValueError(f"adapter= holds {bad[0]}, and the bank {len(bank)} adapters; {usage}.")
        return choice.astype(jnp.int32)
    if not jnp.issubdtype(choice.dtype, jnp.floating):
        raise TypeError(f"adapter= is {spec(choice)}; {usage}.")
    if choice.ndim != 2 or choice.shape[1] != len(bank):
        raise ValueError(f"adapter= is {spec(choice)}; {usage}.")
    return choice


def check_base(choice: Array, without_base: set[Path], trained: Mapping[Path, Leaf]) -> None:
    """Raises where -1 is to be the base alone and frozen does not hold the base."""
    if not jnp.issubdtype(choice.dtype, jnp.integer) or not np.any(np.asarray(choice) == -1):
        return
    if without_base:
        raise ValueError(
            f"adapter=-1 is the base alone, and {min(without_base)} is trained in full: frozen holds None there. Put "
            "the value of the base into frozen."
        )
    moved = [path for path, leaf in trained.items() if is_adapter(leaf) and leaf.moved_base]
    if moved:
        raise ValueError(
            f"adapter=-1 is the base alone, and the start of {moved[0]} was taken out of its weight, so frozen is not "
            "the base. Save the adapters with lojax.save(..., start=lora_at_init), and stack them on the pretrained "
            "weights."
        )


def check_active(active: Any, rows: int) -> Array:
    """``active`` as an array, or an error unless it says for every row on which tokens its adapter acts."""
    active = jnp.asarray(active)
    if active.dtype != bool or active.ndim != 2 or active.shape[0] != rows:
        raise ValueError(
            f"active= is {spec(active)}; expected bool [{rows}, T]: for each row, the tokens on which its adapter acts "
            "(lojax.active_tokens makes it)."
        )
    return active


def check_invocation(lora: Params) -> None:
    """Raises if an adapter acts from its invocation tokens on, and nobody said where those stand."""
    for path, leaf in flatten(lora).items():
        if not is_adapter(leaf):
            continue
        own = [leaf.invocation_tokens, *(entry.invocation_tokens for entry in leaf.entries or () if entry is not None)]
        if any(own):
            raise ValueError(
                f"{path}: this adapter acts from its invocation tokens {next(filter(None, own))} on. Say where that "
                "is: apply(..., active=lojax.active_tokens(tokens, lora))."
            )
