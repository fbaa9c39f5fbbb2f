"""The adapters of a bank as shapes, and whether they fit a base. Nothing is computed or traced."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax.core import meta

from lojax.adapters.adapter import Adapter, Entry, is_adapter
from lojax.adapters.axes import positions
from lojax.adapters.bank import Bank
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.trees import check_pair
from lojax.types import Leaf, Params, Path


def entry_shapes(bank: Bank) -> list[Params]:
    """The shapes of each adapter of a bank, as ``jax.eval_shape(unstack, bank)`` gives them, without shardings."""
    return [map_paths(lambda _, leaf, i=i: _leaf_shapes(leaf, i), bank.lora) for i in range(bank.size)]


def widest_shapes(bank: Bank) -> Params:
    """The shapes of one adapter with the largest rank of the bank, that adapts every weight which any of them does."""

    def widest(_: Path, leaf: Leaf) -> Leaf:
        if leaf is None or not is_adapter(leaf):
            return None if leaf is None else _drop_first_axis(leaf)
        entry = next(entry for entry in leaf.entries or () if entry is not None)
        return entry_adapter(leaf, dataclasses.replace(entry, rank=leaf.rank, ranks=None))

    return map_paths(widest, bank.lora)


def check_bank_pair(frozen: Params, bank: Bank) -> tuple[dict[Path, Leaf], dict[Path, Leaf]]:
    """Both trees by path, the leaves of the bank with their leading axis, or an error as of `check_pair`.

    ``frozen`` may hold the value of the base where the bank trains a parameter in full.
    """
    check_pair(drop_full(frozen, bank.lora), widest_shapes(bank))
    for path, leaf in flatten(bank.lora).items():
        lengths = {jnp.shape(x)[0] for x in jax.tree.leaves(leaf)}
        if lengths - {bank.size}:
            raise ValueError(
                f"{path}: the arrays of a bank of {bank.size} adapters have a first axis of that length, and one here "
                f"has {min(lengths - {bank.size})}. Stack the adapters again: lojax.stack([...])."
            )
    return flatten(frozen), flatten(bank.lora)


def drop_full(frozen: Params, lora: Params) -> Params:
    """``frozen`` as it is beside a single adapter: None where ``lora`` trains a parameter in full.

    Beside a bank, ``frozen`` may hold the value of the base there, for the rows that no adapter acts on.
    """
    full = {path for path, leaf in flatten(lora).items() if leaf is not None and not is_adapter(leaf)}
    return map_paths(lambda path, leaf: None if path in full else leaf, frozen)


def _leaf_shapes(leaf: Leaf, i: int) -> Leaf:
    if leaf is None or not is_adapter(leaf):
        return None if leaf is None else _drop_first_axis(leaf)
    assert leaf.entries is not None, "an adapter of a bank says what its entries are"
    entry = leaf.entries[i]
    return None if entry is None else entry_adapter(leaf, entry)


def entry_adapter(leaf: Adapter, entry: Entry) -> Adapter:
    """The shapes of one adapter of a bank at one weight."""
    rank_axis = {"a": -1, "b": len(positions(leaf.axes, "stack"))}
    arrays = {name: _drop_first_axis(getattr(leaf, name), rank_axis.get(name), entry.rank) for name in leaf.arrays}
    return dataclasses.replace(leaf, entries=None, **entry.static, **arrays)


def _drop_first_axis(leaf: Leaf, rank_axis: int | None = None, rank: int = 0) -> Leaf:
    """The shape of a leaf without its first axis, and with another rank; the name of the axis goes too."""
    x = unbox(leaf)
    shape = [*jnp.shape(x)[1:]]
    if rank_axis is not None:
        shape[rank_axis] = rank
    value = jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(x))
    return leaf.replace(value=value, names=leaf.names[1:]) if isinstance(leaf, meta.Partitioned) else rebox(leaf, value)
