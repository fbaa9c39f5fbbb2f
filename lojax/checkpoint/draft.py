"""What is about to be saved: checked as a whole before a byte is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lojax.adapters.adapter import is_adapter
from lojax.adapters.algebra import moved_paths, subtract_start
from lojax.adapters.bank import Bank, is_bank
from lojax.adapters.bank_shapes import drop_full
from lojax.adapters.paths import flatten
from lojax.adapters.trees import check_pair
from lojax.checkpoint.arrays import snapshot
from lojax.checkpoint.bank_entries import naming_entry, split_bank
from lojax.checkpoint.bank_manifest import folder_name
from lojax.checkpoint.codec import collect_arrays, describe_leaves, flatten_with_keys
from lojax.checkpoint.fingerprint import fingerprint, restrict
from lojax.checkpoint.manifest import Manifest
from lojax.types import ArrayLike, Leaf, Params, Path


@dataclasses.dataclass(frozen=True)
class Draft:
    """One adapter.

    Attributes:
        leaves: Its leaves by path.
        keys: See `lojax.checkpoint.codec.flatten_with_keys`.
        arrays: Its arrays by the name they are stored under.
        adapted: The paths whose weight is a part of the fingerprint.
        folder: Its place in the folder of a bank; empty for an adapter of its own.
    """

    leaves: Mapping[Path, Leaf]
    keys: Mapping[Path, tuple[str | int, ...]]
    arrays: Mapping[str, ArrayLike]
    adapted: Sequence[Path]
    folder: str = ""

    def manifest(self, base: Mapping[Path, Any] | None, metadata: Mapping[str, Any]) -> Manifest:
        """The manifest, without what only the written files tell."""
        adapters, full, other = describe_leaves(self.leaves)
        return Manifest(
            metadata=metadata, adapters=adapters, full=full, other=other, keys=self.keys, base=base, arrays="", files={}
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapter, ready to be written.

    Attributes:
        folder: As in `Draft`.
        arrays: Copies of its arrays.
        manifest: The manifest, without what only the written files tell.
    """

    folder: str
    arrays: Mapping[str, ArrayLike]
    manifest: Manifest


def draft(lora: Params | Bank, frozen: Params | None, start: Params | Bank | None) -> list[Draft]:
    """One adapter, or those of a bank.

    Raises:
        TypeError: A leaf is not an array, or ``lora`` is a pair of trees.
        ValueError: What `lojax.save` refuses.
    """
    if not is_bank(lora):
        if is_bank(start):
            raise ValueError("start is a bank and lora one adapter: pass the start of this one, as start=start[0].")
        if frozen is not None:
            check_pair(frozen, lora)
        return [_draft(lora, frozen, start)]
    # For its checks of the arrays: a copy of a tracer fails with a worse message.
    _draft(lora.lora, frozen, None)
    frozen = None if frozen is None else drop_full(frozen, lora.lora)
    starts = list(start) if isinstance(start, Bank) else [start] * len(lora)
    if len(starts) != len(lora):
        raise ValueError(f"start holds {len(starts)} adapters, and lora {len(lora)}. Pass the bank of their starts.")
    drafts = []
    for i, (entry, its_start) in enumerate(zip(split_bank(lora), starts, strict=True)):
        with naming_entry(lora.names, i):
            if frozen is not None:
                check_pair(frozen, entry)
            one = _draft(entry, frozen, its_start)
        drafts.append(dataclasses.replace(one, folder=folder_name(i, lora.names[i] if lora.names else None)))
    return drafts


def finish(
    drafts: Sequence[Draft], lora: Params | Bank, frozen: Params | None, metadata: Mapping[str, Any]
) -> list[Part]:
    """The drafts with a fingerprint of the base, and with copies of their arrays."""
    if not is_bank(lora):
        (one,) = drafts
        base = None if frozen is None else fingerprint(frozen, one.adapted)
        return [Part("", snapshot(one.arrays), one.manifest(base, metadata))]
    parts = []
    frozen = None if frozen is None else drop_full(frozen, lora.lora)
    # Weights that several adapters of the bank adapt are read once.
    base = None if frozen is None else fingerprint(frozen, dict.fromkeys(path for d in drafts for path in d.adapted))
    for one in drafts:
        own = None if base is None else restrict(base, frozen, one.adapted)
        # Not a snapshot again: `split_bank` has copied the arrays.
        parts.append(Part(one.folder, one.arrays, one.manifest(own, metadata)))
    return parts


def _draft(lora: Params, frozen: Params | None, start: Params | None) -> Draft:
    _check_is_lora(lora, frozen)
    moved = moved_paths(lora)
    if start is not None:
        lora = subtract_start(lora, start)
    leaves, keys = flatten_with_keys(lora)
    arrays = collect_arrays(leaves)
    adapted = [path for path, leaf in leaves.items() if is_adapter(leaf) and (start is None or path not in moved)]
    return Draft(leaves, keys, arrays, adapted)


def _check_is_lora(lora: Params, frozen: Params | None) -> None:
    """Raises where ``lora`` looks like something else: the base, or both trees at once."""
    if isinstance(lora, tuple) and [_holds_adapter(tree) for tree in lora] == [False, True]:
        raise TypeError("lora is a pair of trees, (frozen, lora): pass save(path, lora, frozen=frozen).")
    if frozen is None and not _holds_adapter(lora) and jax.tree.leaves(lora):
        raise ValueError(
            "lora holds no adapter, so this would save the parameters of the base. Pass the lora tree of "
            "`frozen, lora = model.init(...)`; where all that trains is trained in full, pass frozen=frozen as well."
        )


def _holds_adapter(tree: Params) -> bool:
    return any(is_adapter(leaf) for leaf in flatten(tree).values())
