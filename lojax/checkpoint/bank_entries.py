"""Between a bank and the adapters that are stored of it, each as it was before it was stacked."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path as FilePath

import jax
import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import positions
from lojax.adapters.bank import Bank
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.stack import stack
from lojax.checkpoint.arrays import named_sharding, snapshot, to_device
from lojax.text import spec
from lojax.types import ArrayLike, Leaf, Params, Path, PyTree


def split_bank(bank: Bank) -> list[Params]:
    """The adapters of a bank, in copies that later donation cannot touch.

    Raises:
        ValueError: Values would be lost: those of the padding of a smaller rank, or where an adapter leaves a weight
            alone, are not zero.
    """
    # Copied as a whole, so that each stacked array crosses from its device once; the adapters are views of the copies.
    leaves, treedef = jax.tree.flatten(bank)
    copies = snapshot({str(i): leaf for i, leaf in enumerate(leaves)})
    bank = jax.tree.unflatten(treedef, copies.values())
    for path, leaf in flatten(bank.lora).items():
        if is_adapter(leaf):
            _check_padding(path, leaf, bank)
    return list(bank)


def _check_padding(path: Path, leaf: Adapter, bank: Bank) -> None:
    stacked = (slice(None),) * len(positions(leaf.axes, "stack"))
    for i, entry in enumerate(leaf.entries or ()):
        for name, x in leaf.arrays.items():
            if entry is None:
                rest = x[i]
            elif name in ("a", "b") and entry.rank < leaf.rank:
                beyond = slice(entry.rank, None)
                rest = x[i][..., beyond] if name == "a" else x[i][(*stacked, beyond)]
            else:
                continue
            # NaN counts as a value; -0.0 does not, which is what weight decay makes of 0.
            if bool(rest.any()):
                what = "leaves this weight alone" if entry is None else f"has rank {entry.rank} of {leaf.rank}"
                raise ValueError(
                    f"{path}: {entry_text(bank.names, i)} {what}, and what its {name} holds beyond that is not zero, "
                    "so a save would lose it. Did the update of an optimizer move zeros? To drop it, save "
                    "lojax.stack(lojax.unstack(bank), names=bank.names)."
                )


def entry_text(names: Sequence[str] | None, i: int) -> str:
    """How errors name an adapter of a bank.

    >>> entry_text(["french"], 0), entry_text(None, 0)
    ("bank['french']", 'bank[0]')
    """
    return f"bank[{names[i]!r}]" if names else f"bank[{i}]"


@contextlib.contextmanager
def naming_entry(names: Sequence[str] | None, i: int) -> Iterator[None]:
    """Says in errors which adapter of a bank they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # Built-in types alone: a subclass may take other arguments.
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{entry_text(names, i)}: {error}") from error


def none_at(frozen: Params, paths: Container[Path]) -> Params:
    """``frozen`` with None at these paths."""
    return map_paths(lambda path, leaf: None if path in paths else leaf, frozen)


def join_entries(entries: Sequence[Params], names: Sequence[str] | None, like: Bank | None, where: FilePath) -> Bank:
    """The bank of these adapters, as `lojax.stack` makes it, with its arrays on the host.

    Args:
        entries: ``lora`` trees whose arrays are on the host.
        names: Their names.
        like: What the result must have the structure of, or None.
        where: The checkpoint, for errors.

    Raises:
        ValueError: The bank differs from ``like``.
    """
    # The structure as `stack` has it, from shapes alone; the arrays below, on the host, in the dtypes of the files.
    bank = jax.eval_shape(lambda *trees: stack(trees, names=names), *entries)
    if like is not None:
        check_like_bank(bank, like, where)
        # The boxes of ``like`` may name the axis of the bank, which those of an adapter do not have.
        bank = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(bank))
    by_path = [flatten(entry) for entry in entries]

    def fill(path: Path, leaf: Leaf) -> Leaf:
        if leaf is None:
            return None
        own = [None if tree[path] is None else jax.tree.leaves(tree[path]) for tree in by_path]
        shapes, treedef = jax.tree.flatten(leaf)
        arrays = [_stack_padded(x, [None if of is None else of[k] for of in own]) for k, x in enumerate(shapes)]
        return jax.tree.unflatten(treedef, arrays)

    return Bank(map_paths(fill, bank.lora), bank.size, bank.names)


def _stack_padded(like: jax.ShapeDtypeStruct, arrays: Sequence[ArrayLike | None]) -> np.ndarray:
    """The arrays with a new first axis, each with zeros up to the shape of ``like``."""
    # Not `like.dtype`, which has 32 bits for 64 where JAX has no 64-bit types.
    dtypes = {np.asarray(x).dtype for x in arrays if x is not None}
    stacked = np.zeros(like.shape, dtypes.pop() if len(dtypes) == 1 else like.dtype)
    for i, x in enumerate(arrays):
        if x is not None:
            stacked[(i, *map(slice, np.shape(x)))] = x
    return stacked


def check_like_bank(bank: Bank, like: Bank, where: FilePath) -> None:
    """Raises unless two banks have the same names, paths, static fields, shapes and dtypes."""
    if (bank.size, bank.names) != (like.size, like.names):
        raise ValueError(f"{where} holds {_describe(bank)}, but like holds {_describe(like)}.")
    stored, expected = flatten(bank.lora), flatten(like.lora)
    for path, leaf in stored.items():
        other = expected[path]
        statics = [getattr(x, "entries", None) for x in (leaf, other)]
        if statics[0] != statics[1]:
            raise ValueError(f"{path}: {where} holds a bank of {statics[0]}, but like one of {statics[1]}.")
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(other), strict=True)
        for x, y in pairs:
            if spec(x) != spec(y):
                raise ValueError(f"{path}: {where} holds {spec(x)}, but like holds {spec(y)}.")


def _describe(bank: Bank) -> str:
    return f"{bank.size} adapters" + (f" named {', '.join(bank.names)}" if bank.names else " without names")


def place_bank(bank: Bank, like: Bank | None, sharding: PyTree) -> Bank:
    """The arrays of a bank on devices: sharded as asked, else as those of ``like``, else uncommitted."""
    arrays, treedef = jax.tree.flatten(bank)
    if isinstance(sharding, jax.sharding.Sharding):
        choices = [sharding] * len(arrays)
    elif sharding is not None:
        choices = jax.tree.leaves(sharding, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    else:
        choices = [named_sharding(x) for x in (arrays if like is None else jax.tree.leaves(like))]
    if len(choices) != len(arrays):
        raise ValueError(
            f"sharding holds {len(choices)} shardings for the {len(arrays)} arrays of a bank. Pass one for all, or the "
            "tree of lojax.sharding.shardings(frozen, bank).lora."
        )
    return jax.tree.unflatten(treedef, [to_device(x, choice) for x, choice in zip(arrays, choices, strict=True)])
