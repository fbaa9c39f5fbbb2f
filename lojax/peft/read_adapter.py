"""A PEFT adapter directory becomes a ``lora`` tree that fits a base."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter, box_arrays
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.targets import nearest
from lojax.files import safetensors
from lojax.peft import factors, magnitudes, tokens
from lojax.peft.config import Config, read_config
from lojax.peft.factors import Cell
from lojax.peft.model_families import name_map as find_map
from lojax.peft.name_map import NameMap, Slot, Table
from lojax.peft.tensor_keys import (
    PREFIX,
    WEIGHTS,
    Extra,
    Factor,
    factor_keys,
    is_parameter_target,
    magnitude_key,
    pair_up,
    parameter_key,
    read_key,
    rows_key,
    tied_copies,
)


def load(path: str | os.PathLike[str], params: Any, name_map: NameMap | str, *, dtype: Any = jnp.float32) -> Any:
    """The ``lora`` tree of a Hugging Face PEFT adapter.

    Args:
        path: The directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        params: The base the adapter is for: a parameter tree, or a ``frozen`` tree. Shapes are enough
            (`jax.ShapeDtypeStruct`), except where only part of a scanned leaf is saved in full or has a DoRA
            adapter, and for trained token rows.
        name_map: A `NameMap`, or the name of a ready one (see `name_maps`).
        dtype: The dtype of the adapters; None keeps that of the file. Parameters saved in full take the
            dtype of the base.

    Returns:
        A tree of the structure of ``params``: an `Adapter` at each adapted weight, an array at each
        parameter saved in full (``modules_to_save``, ``bias``), None elsewhere. `freeze` gives the
        ``frozen`` tree beside it. An embedding that ``params`` also uses as the output head is adapted
        in both uses; PEFT adapts the look-up alone (token rows both, as here). A scanned leaf of which only some
        layers have a DoRA adapter has a magnitude for the others too, their own lengths, which trains.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The files are damaged, need what lojax does not compute, or do not fit ``params``; the
            text lists every missing, unexpected and mis-shaped key. Nothing is loaded partly.
    """
    directory = Path(path)
    config = read_config(directory)
    file = safetensors.open_file(weights_file(directory))
    table = find_map(name_map).table(params)
    keys = sort_keys(file, table, config)
    cells = [(slot, _read_pair(file, keys, slot, a, b, config, dtype)) for slot, a, b in keys.pairs]
    leaves = flatten(params)
    found: dict[str, Any] = {}
    for leaf_path, group in _grouped(cells).items():
        found[leaf_path] = _adapter(leaves[leaf_path], group, config)
    for slot, key in keys.rows:
        chosen = config.tokens(slot.module) or ()
        adapter = tokens.from_torch(slot, file.read(key), chosen, leaves[slot.path], dtype)
        found[slot.path] = box_arrays(leaves[slot.path], adapter)
    for leaf_path, group in _grouped(keys.full).items():
        if leaf_path not in found:
            found[leaf_path] = _full(leaves[leaf_path], table.by_path()[leaf_path], group, file)
        else:
            _check_same(leaves[leaf_path], group, file)
    return map_paths(lambda p, _: found.get(p), params)


def freeze(params: Any, lora: Any) -> Any:
    """The ``frozen`` tree beside ``lora``: ``params``, with None where ``lora`` holds the parameter in full."""
    return map_paths(lambda _, p, t: p if t is None or isinstance(t, Adapter) else None, params, lora)


def weights_file(directory: Path) -> Path:
    """The weights of an adapter directory.

    Raises:
        ValueError: They are a pickle.
        FileNotFoundError: There are none.
    """
    path = directory / WEIGHTS
    if path.is_file():
        return path
    pickled = directory / "adapter_model.bin"
    if pickled.exists():
        raise ValueError(
            f"{pickled} is a pickle, which can run any code when it is opened; lojax reads safetensors only. Where you "
            "trust its origin, convert it once with PyTorch: "
            "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
            f"'{WEIGHTS}', metadata={{'format': 'pt'}})"
        )
    raise FileNotFoundError(f"{directory} holds no {WEIGHTS}.")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a file by what they are.

    Attributes:
        pairs: ``(slot, key of A, key of B)``.
        full: ``(slot, key)`` of each parameter saved in full.
        magnitudes: The key of DoRA's magnitude by the name of the slot.
        rows: ``(slot, key)`` of the trained rows of an embedding.
    """

    pairs: list[tuple[Slot, str, str]]
    full: list[tuple[Slot, str]]
    magnitudes: dict[str, str]
    rows: list[tuple[Slot, str]]


def sort_keys(file: safetensors.File, table: Table, config: Config) -> Keys:
    """The keys of a file, all checked.

    Raises:
        ValueError: Keys are missing, unexpected or mis-shaped; the text lists them.
    """
    where = str(file.path)
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    read = {key: read_key(key, where) for key in file.entries}
    weights: dict[str, list[Slot]] = {}
    for slot in table.slots.values():
        if slot.is_weight:
            weights.setdefault(slot.module, []).append(slot)
    tied = tied_copies(read, file.read, weights.__contains__)
    read = {key: kind for key, kind in read.items() if key not in tied}
    pairs, unexpected = pair_up([k for k in read.values() if isinstance(k, Factor)], weights, shapes, config)
    full = [(table.slots[name], key) for key, name in read.items() if isinstance(name, str) and name in table.slots]
    keys = Keys(pairs, full, {}, [])
    refused = _sort_extras([k for k in read.values() if isinstance(k, Extra)], keys, weights, config)
    known = {key for _, *both in pairs for key in both} | {key for _, key in full} | set(unexpected)
    unexpected += [key for key, kind in read.items() if key not in known and not isinstance(kind, Extra)]
    problems = [*_misshapen(keys, shapes, config), *refused]
    problems += _listed("unexpected", unexpected, [PREFIX + name for name in table.slots])
    problems += _listed("missing", [key for key in _missing(keys, weights, config) if key not in unexpected], ())
    if problems:
        raise ValueError(_text(where, problems, none_fit=not pairs and not full and not keys.rows))
    _check_ranks(pairs, shapes, config, where)
    return keys


def _sort_extras(
    extras: Sequence[Extra], keys: Keys, weights: Mapping[str, Sequence[Slot]], config: Config
) -> list[str]:
    """Puts magnitudes and rows into ``keys``; returns what has no place, and why."""
    adapted = {slot.module: slot for slot, *_ in keys.pairs if not is_parameter_target(slot)}
    refused = []
    for extra in extras:
        reason = None
        if extra.kind == "magnitude":
            if not config["use_dora"]:
                reason = f"adapter_config.json says use_dora={config['use_dora']}"
            elif extra.module not in adapted:
                reason = f"{extra.module} has no lora_A and lora_B beside it"
            else:
                keys.magnitudes[adapted[extra.module].name] = extra.key
        else:
            slots = weights.get(extra.module, ())
            if not config.tokens(extra.module):
                reason = f"adapter_config.json names no trainable_token_indices for {extra.module}"
            elif len(slots) != 1 or not tokens.is_table(slots[0]):
                at = ", ".join(f"{slot.path} as a {slot.kind} weight" for slot in slots) or "nothing"
                reason = f"token rows are of an embedding, and the name map has {at} there"
            elif extra.module in adapted:
                reason = f"{extra.module} has an adapter too, which PEFT does not allow"
            else:
                keys.rows.append((slots[0], extra.key))
        refused += [f"  unexpected: {extra.key} ({reason})"] if reason else []
    return refused


def _missing(keys: Keys, weights: Mapping[str, Sequence[Slot]], config: Config) -> list[str]:
    """The keys that the config asks for and the file lacks."""
    slots = [slot for group in weights.values() for slot in group]
    taken = {slot.name for slot, *_ in keys.pairs}
    wanted = [slot for slot in slots if slot.name not in taken and _is_wanted(slot, config)]
    missing = [key for slot in wanted for key in factor_keys(slot)]
    if config["use_dora"]:
        lengths = [slot for slot, *_ in keys.pairs if slot.name not in keys.magnitudes]
        missing += [magnitude_key(slot) for slot in [*lengths, *wanted]]
    if isinstance(config["trainable_token_indices"], dict) or not keys.rows:
        held = {slot.name for slot, _ in keys.rows}
        missing += [rows_key(s) for s in slots if tokens.is_table(s) and s.name not in held and config.tokens(s.module)]
    return missing


def _is_wanted(slot: Slot, config: Config) -> bool:
    return config.targets_parameter(slot.name) if is_parameter_target(slot) else config.targets(slot.module)


def _misshapen(keys: Keys, shapes: Mapping[str, tuple[int, ...]], config: Config) -> list[str]:
    lines = []
    for slot, *both in keys.pairs:
        got = tuple(shapes[key] for key in both)
        rank = _rank_of(slot, got[0])
        if rank and got in [factors.torch_shapes(slot, rank, exchanged=e) for e in (False, True)]:
            continue
        expected = factors.torch_shapes(slot, rank or config.rank(parameter_key(slot)))
        for key, have, want in zip(both, got, expected, strict=True):
            if have != want:
                lines.append(f"  mis-shaped: {key} is {have}; {slot.path} {slot.shape} needs {want}")
    single = [(slot, key, factors.full_shape(slot)) for slot, key in keys.full]
    for slot, *_ in keys.pairs:
        if slot.name in keys.magnitudes:
            key = keys.magnitudes[slot.name]
            single.append((slot, key, magnitudes.torch_shape(slot, factors.sizes(slot, "out"))))
    for slot, key in keys.rows:
        chosen = config.tokens(slot.module) or ()
        single.append((slot, key, tokens.torch_shape(slot, chosen)))
        if max(chosen) >= tokens.vocabulary(slot):
            lines.append(f"  {key}: trains row {max(chosen)}; {slot.path} {slot.shape} has {tokens.vocabulary(slot)}")
    for slot, key, want in single:
        if shapes[key] != want:
            lines.append(f"  mis-shaped: {key} is {shapes[key]}; {slot.path} {slot.shape} needs {want}")
    return lines


def _rank_of(slot: Slot, shape: tuple[int, ...]) -> int:
    count = int(np.prod(factors.sizes(slot, "expert"))) if is_parameter_target(slot) else 1
    return shape[0] // count if shape else 0


def _listed(kind: str, keys: Sequence[str], known: Sequence[str]) -> list[str]:
    lines = []
    for key in keys[:10]:
        near = nearest(key, known, 1) if known else []
        lines.append(f"  {kind}: {key}" + (f" (nearest in the base: {near[0]})" if near else ""))
    return [*lines, *([f"  {kind}: and {len(keys) - 10} more"] if len(keys) > 10 else [])]


def _text(where: str, problems: list[str], none_fit: bool) -> str:
    start = f"{where} does not fit the base:"
    hint = "Is this the base it was trained on, and does the name map fit it? print(name_map.table(params)) shows."
    if none_fit:
        start = f"{where} is an adapter for another architecture, or the name map is for another: no key fits the base."
    return "\n".join([start, *problems, hint])


def _check_ranks(pairs: Any, shapes: Mapping[str, tuple[int, ...]], config: Config, where: str) -> None:
    wrong = []
    for slot, a, _ in pairs:
        rank, expected = _rank_of(slot, shapes[a]), config.rank(parameter_key(slot))
        if rank != expected:
            wrong.append(f"  {a} has rank {rank}, adapter_config.json says {expected} for {parameter_key(slot)}")
    if wrong:
        more = [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        start = f"{where} and its adapter_config.json disagree about ranks, on which the scale depends:"
        raise ValueError("\n".join([start, *wrong[:10], *more, "One of the two files is of another adapter."]))


def _read_pair(
    file: safetensors.File, keys: Keys, slot: Slot, key_a: str, key_b: str, config: Config, dtype: Any
) -> Cell:
    length = keys.magnitudes.get(slot.name)
    held = [file.read(key) for key in (key_a, key_b, length) if key is not None]
    a, b, *rest = held if dtype is None else [tensor.astype(dtype) for tensor in held]
    rank = _rank_of(slot, a.shape)
    scale = config.scale(parameter_key(slot), rank)
    exchanged = _is_exchanged(slot, a.shape, b.shape, rank, config)
    return factors.cell_from_torch(slot, a, b, scale, magnitude=rest[0] if rest else None, exchanged=exchanged)


def _is_exchanged(slot: Slot, a: tuple[int, ...], b: tuple[int, ...], rank: int, config: Config) -> bool:
    """Whether in and out are exchanged: by shape, and where that cannot tell by the PEFT that wrote it."""
    straight, exchanged = (factors.torch_shapes(slot, rank, exchanged=e) for e in (False, True))
    return config.exchanges_experts and slot.kind == "experts" if straight == exchanged else (a, b) == exchanged


def _grouped(items: Sequence[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(item[0].path, []).append(item)
    return groups


def _adapter(leaf: Any, cells: Sequence[tuple[Slot, Cell]], config: Config) -> Adapter:
    adapter = factors.assemble(cells, cells[0][1].a.dtype, leaf)
    arrays = {name: jnp.asarray(x) for name, x in adapter.arrays.items()}
    return box_arrays(leaf, dataclasses.replace(adapter, dropout=float(config["lora_dropout"] or 0.0), **arrays))


def _full(leaf: Any, slots: Sequence[Slot], saved: Sequence[tuple[Slot, str]], file: safetensors.File) -> Any:
    base = unbox(leaf)
    if len(saved) < len(slots) and not hasattr(base, "__array__"):
        raise ValueError(
            f"{saved[0][0].path}: {file.path} holds {len(saved)} of its {len(slots)} entries, so the others must come "
            "from the base; pass its arrays, not shapes."
        )
    value = np.array(base) if len(saved) < len(slots) else np.empty(base.shape, base.dtype)
    for slot, key in saved:
        value[factors.full_index(slot)] = factors.full_from_torch(slot, file.read(key)).astype(base.dtype)
    return rebox(leaf, jnp.asarray(value))


def _check_same(leaf: Any, saved: Sequence[tuple[Slot, str]], file: safetensors.File) -> None:
    """PEFT saves the base beside the adapter of an embedding: it must be ours."""
    base = unbox(leaf)
    for slot, key in saved:
        ours = np.asarray(base)[factors.full_index(slot)] if hasattr(base, "__array__") else None
        theirs = factors.full_from_torch(slot, file.read(key))
        if ours is not None and not np.allclose(
            ours.astype(np.float32), theirs.astype(np.float32), atol=1e-6, rtol=1e-3
        ):
            raise ValueError(
                f"{file.path}: {key} is the base weight that the adapter was trained on, and {slot.path} differs from "
                "it. Put it into params first, or load the base that the adapter belongs to."
            )
