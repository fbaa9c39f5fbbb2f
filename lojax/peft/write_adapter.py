"""A ``lora`` tree becomes a PEFT adapter directory."""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.adapters.trees import check_pair
from lojax.files import safetensors
from lojax.files.atomic_directory import atomic_directory, refuse_existing
from lojax.peft import factors, magnitudes, tokens
from lojax.peft.config import CONFIG, Config, check_config
from lojax.peft.factors import Cell
from lojax.peft.model_families import name_map as find_map
from lojax.peft.name_map import NameMap, Slot, Table
from lojax.peft.tensor_keys import (
    PREFIX,
    WEIGHTS,
    factor_keys,
    is_parameter_target,
    magnitude_key,
    parameter_key,
    rows_key,
)


def save(
    path: str | os.PathLike[str],
    lora: Any,
    frozen: Any,
    name_map: NameMap | str,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    config: Config | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` as Hugging Face PEFT reads them.

    The map is checked against the trees first, and the directory appears whole or not at all.

    Args:
        path: The directory to make.
        lora: Adapters and parameters trained in full.
        frozen: The tree beside it; shapes are enough, except where a module is only partly trained in full, and for
            an embedding of which token rows train. None: ``lora`` alone, and then ``target_modules`` are spelled out
            in full.
        name_map: A `NameMap`, or the name of a ready one (see `name_maps`).
        base_model_name_or_path: Where PEFT finds the base.
        task_type: PEFT's task, such as ``"CAUSAL_LM"`` or ``"SEQ_CLS"``.
        config: Fields to keep, as `read_config` returned them for the adapter this one came from. Those that lojax
            computes are replaced; ``use_rslora`` decides how alpha is spelled.
        overwrite: Replace an existing directory.

    Raises:
        FileExistsError: ``path`` exists.
        ValueError: The trees do not fit together, a trained leaf is not mapped (the text lists them), or PEFT cannot
            express what was trained.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite)
    if frozen is not None:
        check_pair(frozen, lora)
    joined = _joined(frozen, lora)
    table = find_map(name_map).table(joined)
    trained = {p: leaf for p, leaf in flatten(lora).items() if leaf is not None}
    _check_mapped(table, trained, joined)
    slots = table.by_path()
    cells = _cells(trained, slots, _leaves(frozen))
    full = {s.name: s for p, x in trained.items() if not is_adapter(x) for s in slots[p]}
    rows = [(slots[p][0], x) for p, x in trained.items() if is_adapter(x) and x.rows is not None]
    tensors = _factor_tensors(cells)
    tensors |= {rows_key(slot): tokens.to_torch(slot, x, _leaves(frozen).get(slot.path)) for slot, x in rows}
    leaves = {p: trained.get(p, leaf) for p, leaf in _leaves(frozen).items()} | trained
    saved, modules = _whole_modules(table, full, climb=frozen is not None)
    for slot in saved.values():
        tensors[_full_key(slot, cells)] = factors.full_to_torch(slot, _concrete(slot, leaves))
    fields = dict(config.fields if isinstance(config, Config) else config or {})
    fields |= _fields(table, cells, full, modules, trained, use_rslora=bool(fields.get("use_rslora")))
    fields["trainable_token_indices"] = {slot.module: list(x.tokens) for slot, x in rows} or None
    fields |= {"base_model_name_or_path": base_model_name_or_path or fields.get("base_model_name_or_path")}
    fields |= {"task_type": task_type or fields.get("task_type")}
    if Config(fields).exchanges_experts:
        fields["peft_version"] = "0.19.0"  # the first whose layout of experts is the one written here
    check_config(fields, "config=")
    with atomic_directory(target, overwrite=overwrite) as fresh:
        safetensors.write_all(fresh / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cells(
    trained: Mapping[str, Any], slots: Mapping[str, Sequence[Slot]], frozen: Mapping[str, Any]
) -> dict[str, tuple[Slot, Cell]]:
    """The update of each torch parameter that has one, by name."""
    adapters = {p: x for p, x in trained.items() if is_adapter(x) and x.a is not None}
    if not adapters:
        raise ValueError(
            f"lora holds no low-rank update, only {', '.join(list(trained)[:3])} trained otherwise: PEFT loads no LoRA "
            "without one. Adapt some weight, or save the parameters themselves."
        )
    magnitudes.check_alike(adapters)
    read = ((slot, factors.read_cell(slot, x)) for path, x in adapters.items() for slot in slots[path])
    found = {slot.name: (slot, cell) for slot, cell in read if cell is not None}
    return {name: (slot, cell) for name, (slot, cell) in found.items() if not _is_idle(slot, cell, frozen)}


def _is_idle(slot: Slot, cell: Cell, frozen: Mapping[str, Any]) -> bool:
    """Whether a cell is nothing but the lengths of the base: a layer that no DoRA adapter is on."""
    if cell.magnitude is None or cell.a.any() or cell.b.any():
        return False
    return magnitudes.is_of_base(slot, cell.magnitude, frozen.get(slot.path))


def _leaves(frozen: Any) -> dict[str, Any]:
    return {} if frozen is None else {p: leaf for p, leaf in flatten(frozen).items() if leaf is not None}


class _Shape:
    """Stands for an adapted weight of which only the adapter is at hand."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _joined(frozen: Any, lora: Any) -> dict[str, Any]:
    """Every leaf's shape, by path."""
    joined: dict[str, Any] = {}
    for path, leaf in flatten(lora).items():
        if not is_adapter(leaf):
            joined[path] = leaf
        elif leaf.a is not None:
            joined[path] = _Shape(factors.weight_shape(leaf))
        elif frozen is None:
            raise ValueError(f"{path}: PEFT stores whole token rows, not what was added to them; pass frozen.")
    return joined | _leaves(frozen)


def _check_mapped(table: Table, trained: Mapping[str, Any], joined: Mapping[str, Any]) -> None:
    if not trained:
        raise ValueError("lora holds nothing that trains: there is no adapter to save.")
    lost = [path for path in trained if path in set(table.unmapped)]
    if lost:
        listed = "".join(f"\n  {path} {tuple(unbox(joined[path]).shape)}" for path in lost)
        raise ValueError(
            f"The name map has no rule for {len(lost)} of the {len(trained)} trained leaves, so nothing was written:"
            f"{listed}\nAdd rules: name_map | NameMap.parse('jax/path/{{i}}/kernel <-> torch.name.{{i}}')."
        )


def _factor_tensors(cells: Mapping[str, tuple[Slot, Cell]]) -> dict[str, np.ndarray]:
    nested: dict[str, list[str]] = {}
    for name, (slot, _) in sorted(cells.items(), key=lambda item: item[1][0].order):  # as torch registers them
        nested.setdefault(slot.module, []).append(name)
    tensors = {}
    for names in nested.values():
        for depth, name in enumerate(reversed(names)):
            slot, cell = cells[name]
            if depth and not is_parameter_target(slot):
                raise ValueError(f"{slot.path} and {cells[names[-1]][0].path} are one torch module, {slot.module}.")
            key_a, key_b = factor_keys(slot, depth)
            tensors[key_a], tensors[key_b] = factors.cell_to_torch(slot, cell)
            if cell.magnitude is not None:
                shape = magnitudes.torch_shape(slot, cell.magnitude.shape)
                tensors[magnitude_key(slot)] = cell.magnitude.reshape(shape)
    return tensors


def _full_key(slot: Slot, cells: Mapping[str, tuple[Slot, Cell]]) -> str:
    inner = ".base_layer" if any(s.module == slot.module for s, _ in cells.values()) else ""
    return f"{PREFIX}{slot.module}{inner}.{slot.name.rpartition('.')[2]}"


def _whole_modules(table: Table, full: Mapping[str, Slot], *, climb: bool) -> tuple[dict[str, Slot], list[str]]:
    """Every parameter to write in full, and the modules to save: those of a trained weight, whole.

    ``climb``: a parent of which all is written stands for its children, as PEFT names a head of several layers.
    """
    modules = {slot.module for slot in full.values() if not slot.is_bias}
    written = dict(full) | {slot.name: slot for slot in table.slots.values() if slot.module in modules}
    for name, slot in full.items():
        if slot.kind == "param" and not slot.module:
            raise ValueError(f"{slot.path}: PEFT cannot save {name}, a parameter of the model itself, in full.")
    highest: set[str] = set()
    for module in modules:
        while climb and "." in module:
            parent = module.rpartition(".")[0]
            if any(n.startswith(parent + ".") and n not in written for n in table.slots):
                break
            module = parent
        highest.add(module)
    return written, sorted(highest)


def _concrete(slot: Slot, leaves: Mapping[str, Any]) -> np.ndarray:
    leaf = unbox(leaves[slot.path])
    if not hasattr(leaf, "__array__"):
        raise ValueError(
            f"{slot.path} belongs to a module that is saved in full; pass its array in frozen, not its shape."
        )
    return np.asarray(leaf)


def _fields(
    table: Table,
    cells: Mapping[str, tuple[Slot, Cell]],
    full: Mapping[str, Slot],
    modules: Sequence[str],
    trained: Mapping[str, Any],
    *,
    use_rslora: bool,
) -> dict[str, Any]:
    settings: dict[str, tuple[int, float]] = {}
    for slot, cell in cells.values():
        alpha = cell.scale * (math.sqrt(cell.rank) if use_rslora else cell.rank)
        settings[parameter_key(slot)] = (cell.rank, int(alpha) if alpha == int(alpha) else alpha)
    common = collections.Counter(settings.values()).most_common(1)
    rank, alpha = common[0][0] if common else (8, 8)
    drops = {x.dropout for x in trained.values() if isinstance(x, Adapter) and x.a is not None}
    if len(drops) > 1:
        raise ValueError(f"PEFT has one lora_dropout for all adapters; these have {sorted(drops)}.")
    adapted = [slot for slot, _ in cells.values()]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "use_dora": any(cell.magnitude is not None for _, cell in cells.values()),
        "rank_pattern": {_pattern(key): r for key, (r, _) in settings.items() if r != rank},
        "alpha_pattern": {_pattern(key): a for key, (_, a) in settings.items() if a != alpha},
        "lora_dropout": drops.pop() if drops else 0.0,
        "fan_in_fan_out": bool(adapted) and all(slot.kind == "conv1d" for slot in adapted),
        "bias": _bias(cells, full, modules),
        "target_modules": _target_modules(table, {s.module for s in adapted if not is_parameter_target(s)}),
        "exclude_modules": None,
        "target_parameters": [s.name for s in adapted if is_parameter_target(s)] or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(modules) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern(key: str) -> str:
    return "^" + re.escape(key)


def _bias(cells: Mapping[str, tuple[Slot, Cell]], full: Mapping[str, Slot], modules: Sequence[str]) -> str:
    inside = tuple(f"{module}." for module in modules)
    biases = {slot.module for slot in full.values() if slot.is_bias and not f"{slot.module}.".startswith(inside)}
    if not biases:
        return "none"
    return "lora_only" if biases <= {slot.module for slot, _ in cells.values()} else "all"


def _target_modules(table: Table, adapted: set[str]) -> list[str]:
    """The adapted modules: by last name where the tree has no other module of that name, else in full."""
    others = {slot.module for slot in table.slots.values() if slot.is_weight} - adapted
    taken = {module.rpartition(".")[2] for module in others}
    complete = len(table.slots) > len(adapted)  # without frozen, nothing is known of the others
    last = {module: module.rpartition(".")[2] for module in adapted}
    return sorted({name if complete and name not in taken and not name.isdigit() else m for m, name in last.items()})
