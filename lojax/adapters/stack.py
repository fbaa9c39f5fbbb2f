"""`stack` and `unstack`: adapters of one base into a `Bank`, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from lojax.adapters.adapter import Adapter, Entry, is_adapter
from lojax.adapters.bank import Bank, is_bank
from lojax.adapters.conform import check_same_kind, pad_factors, zero_update
from lojax.adapters.matrices import at_least_float32
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import check_same_structure, map_paths
from lojax.adapters.rule import is_integer
from lojax.types import Array, Leaf, Params, Path


def stack(adapters: Sequence[Params], *, names: Sequence[str] | None = None, rank: int | None = None) -> Bank:
    """Several adapters of one base as one tree, for ``model.apply(frozen, bank, x, adapter=ids)``.

    Ranks, scales and targets may differ: smaller ranks are padded with zeros, the scales are kept as static numbers,
    and a weight that an adapter leaves alone has zeros there. Arrays of different dtypes are stacked in float32.
    `unstack` gives the adapters back as they were.

    Args:
        adapters: ``lora`` trees of one structure, all for the same base and of one variant.
        names: A name for each, for ``bank["french"]`` and ``bank.ids(["french", "german"])``.
        rank: The rank of every place, so that `Bank.replace` has room for larger adapters; None for the largest rank
            that there is. With it, every place adapts every weight, and `unstack` gives adapters of this rank.

    Returns:
        A `Bank`.

    Raises:
        TypeError: ``adapters`` is not a sequence of ``lora`` trees.
        ValueError: It is empty; the adapters are of different bases or variants; a rank is above ``rank``.

    >>> import jax, lojax
    >>> params = {"w": jnp.ones((4, 3))}
    >>> loras = [lojax.init(jax.random.key(r), params, "w", rank=r)[1] for r in (1, 2)]
    >>> bank = stack(loras, names=["one", "two"])
    >>> bank.lora["w"].a.shape, bank["one"]["w"].a.shape
    ((2, 4, 2), (4, 1))
    """
    if isinstance(adapters, (str, dict)) or is_bank(adapters) or not isinstance(adapters, Sequence):
        raise TypeError(
            f"stack takes a list of lora trees, got {type(adapters).__name__}: lojax.stack([lora1, lora2])."
        )
    if not adapters:
        raise ValueError("stack got no adapters; a bank holds at least one: lojax.stack([lora]).")
    if rank is not None and (not is_integer(rank) or rank < 1):
        raise ValueError(f"rank={rank!r}; expected an integer of at least 1, or None for the largest of the adapters.")
    names = _check_names(names, len(adapters))
    if nested := [i for i, tree in enumerate(adapters) if is_bank(tree)]:
        raise TypeError(f"adapters[{nested[0]}] is a bank itself. Stack its entries: lojax.stack([*bank, lora]).")
    trees = [
        check_same_structure(tree, adapters[0], name=f"adapters[{i}]", other="adapters[0]")[0]
        for i, tree in enumerate(adapters)
    ]
    lora = map_paths(lambda path, _: _stack_leaf(path, [tree[path] for tree in trees], rank), adapters[0])
    return Bank(lora, len(adapters), names)


def unstack(bank: Bank) -> list[Params]:
    """The adapters of a bank, as they were before `stack`: each with its own rank, scale and targets.

    Args:
        bank: What `stack` returned, or a tree like it, such as its gradient.

    Returns:
        One ``lora`` tree for each adapter.

    Raises:
        TypeError: ``bank`` is not a `Bank`.

    >>> import jax, lojax
    >>> loras = [lojax.init(jax.random.key(r), {"w": jnp.ones((4, 3))}, "w", rank=r)[1] for r in (1, 2)]
    >>> [lora["w"].rank for lora in unstack(stack(loras))]
    [1, 2]
    """
    if not is_bank(bank):
        raise TypeError(f"unstack takes the Bank that lojax.stack returned, got {type(bank).__name__}.")
    return list(bank)


def _check_names(names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    names = tuple(names)
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"names={names!r}; expected one string for each adapter.")
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"names={list(names)} for {count} adapters; expected {count} different names.")
    return names


def _stack_leaf(path: Path, leaves: Sequence[Leaf], rank: int | None) -> Leaf:
    """One parameter of all adapters."""
    present = [(i, leaf) for i, leaf in enumerate(leaves) if leaf is not None]
    if not present:
        return None
    adapters = [(i, leaf) for i, leaf in present if is_adapter(leaf)]
    if not adapters:
        return _stack_full(path, leaves)
    if len(adapters) < len(present):
        full = next(i for i, leaf in present if not is_adapter(leaf))
        raise ValueError(
            f"{path}: adapters[{full}] trains this parameter in full and adapters[{adapters[0][0]}] adapts it. All "
            "must do the same."
        )
    first, like = adapters[0]
    for i, leaf in adapters[1:]:
        check_same_kind(path, leaf, like, f"adapters[{i}]", f"adapters[{first}]")
    largest = max(leaf.rank for _, leaf in adapters)
    if rank is not None and like.a is not None and largest > rank:
        i = next(i for i, leaf in adapters if leaf.rank > rank)
        raise ValueError(
            f"{path}: adapters[{i}] has rank {largest}, above rank={rank}. Pass a larger one, or resize it."
        )
    target = max(largest, rank or 0) if like.a is not None else 0
    entries = tuple(_entry(leaf, like, target if rank is not None else None) for leaf in leaves)
    padded = [_pad(zero_update(path, like) if leaf is None else leaf, target) for leaf in leaves]
    arrays = {name: _stack_arrays([x[name] for x in padded], getattr(like, name)) for name in like.arrays}
    present_entries = [entry for entry in entries if entry is not None]
    common = {
        name: values.pop() if len(values := {getattr(entry, name) for entry in present_entries}) == 1 else default
        for name, default in (
            ("scale", 1.0),
            ("dropout", 0.0),
            ("ranks", None),
            ("requested_rank", None),
            ("invocation_tokens", None),
        )
    }
    return dataclasses.replace(like, **arrays, **common, entries=entries)


def _entry(leaf: Adapter | None, like: Adapter, room: int | None) -> Entry | None:
    """What is static about one adapter."""
    if leaf is None:
        return None if room is None else Entry(like.scale, room, like.dropout, invocation_tokens=like.invocation_tokens)
    if room is not None:
        return Entry(leaf.scale, room, leaf.dropout, invocation_tokens=leaf.invocation_tokens)
    return Entry(leaf.scale, leaf.rank, leaf.dropout, leaf.ranks, leaf.requested_rank, leaf.invocation_tokens)


def _pad(adapter: Adapter, rank: int) -> dict[str, Array]:
    arrays = dict(adapter.arrays)
    if adapter.a is not None:
        arrays["a"], arrays["b"] = pad_factors(adapter, rank)
    return arrays


def _stack_arrays(arrays: Sequence[Any], box: Leaf) -> Leaf:
    """The arrays with a new first axis, in a box like ``box``; the new axis has no name."""
    arrays = [jnp.asarray(x) for x in arrays]
    if len({x.dtype for x in arrays}) > 1:
        arrays = [x.astype(at_least_float32(x.dtype)) for x in arrays]
    stacked = jnp.stack(arrays)
    if isinstance(box, meta.Partitioned):
        return box.replace(value=stacked, names=(None, *box.names))
    return rebox(box, stacked)


def _stack_full(path: Path, leaves: Sequence[Leaf]) -> Leaf:
    """A parameter that all adapters train in full."""
    if missing := [i for i, leaf in enumerate(leaves) if leaf is None]:
        trained = next(i for i, leaf in enumerate(leaves) if leaf is not None)
        raise ValueError(
            f"{path}: adapters[{trained}] trains this parameter in full and adapters[{missing[0]}] leaves it alone. "
            "Put the value of the base into that one, as lora[...] = params[...]."
        )
    arrays = [unbox(leaf) for leaf in leaves]
    for i, x in enumerate(arrays):
        if jnp.shape(x) != jnp.shape(arrays[0]):
            raise ValueError(
                f"{path}: adapters[{i}] has shape {jnp.shape(x)} and adapters[0] {jnp.shape(arrays[0])}. They are for "
                "different bases."
            )
    return _stack_arrays(arrays, leaves[0])
