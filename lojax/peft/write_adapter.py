"""A ``lora`` tree becomes a PEFT adapter directory."""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.algebra import moved_paths, subtract_start
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.adapters.trees import check_pair, refuse_bank
from lojax.files import safetensors
from lojax.files.atomic_directory import atomic_directory, refuse_existing
from lojax.files.naming import as_path
from lojax.peft import factors
from lojax.peft.config import CONFIG, Config, check_config
from lojax.peft.extras import EXTRAS
from lojax.peft.factors import TorchUpdate
from lojax.peft.full_parameters import full_to_torch
from lojax.peft.model_families import name_map as find_map
from lojax.peft.name_map import NameMap, Table, TorchParameter, group_by
from lojax.peft.tensor_keys import CONFIG_RECORD, PREFIX, WEIGHTS, WRAPPER, extra_key, factor_keys
from lojax.types import Leaf, Params, Path

Updates = Mapping[str, tuple[TorchParameter, TorchUpdate]]
"""The update of each torch parameter that has one, by name."""


def save(
    path: str | os.PathLike[str],
    lora: Params,
    frozen: Params,
    name_map: NameMap | str,
    *,
    start: Params | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    config: Config | Mapping[str, Any] | None = None,
    overwrite: bool | None = None,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` as Hugging Face PEFT reads them.

    The map is checked against the trees first, and the directory appears whole or not at all.

    Args:
        path: The directory to make.
        lora: Adapters and parameters trained in full; of a bank one adapter, ``bank["french"]``.
        frozen: The tree beside it; shapes are enough, except where a module is only partly trained in full, and for
            an embedding of which token rows train. None: ``lora`` alone, and then ``target_modules`` are spelled out
            in full.
        name_map: A `NameMap`, or the name of a ready one (see `name_maps`).
        start: The `lora` tree as init returned it, where the start of an adapter was taken out of its weight (PiSSA,
            OLoRA, MiLoRA, LoftQ, LoRA-GA). PEFT puts an adapter on the pretrained weight, so what is written is the
            difference from ``start``, of twice the rank.
        base_model_name_or_path: Where PEFT finds the base.
        task_type: PEFT's task, such as ``"CAUSAL_LM"`` or ``"SEQ_CLS"``.
        config: Fields to keep, as `read_config` returned them for the adapter this one came from. Those that lojax
            computes are replaced; ``use_rslora`` decides how alpha is spelled.
        overwrite: By default an adapter that lojax wrote to ``path`` is replaced, as by `lojax.save`, and nothing
            else. True: replace the directory, whatever it holds. False: replace nothing.

    Raises:
        FileExistsError: ``path`` exists, and must not be replaced.
        OSError: The disk is full, or anything else went wrong with a file; the error names ``path``.
        ValueError: The trees do not fit together, a trained leaf is not mapped (the text lists them), PEFT cannot
            express what was trained, or an adapter belongs to a weight that init moved and there is no ``start``.
    """
    refuse_bank(lora)
    target = as_path(path)
    if overwrite is None:
        overwrite = target.is_dir() and foreign_entry(target) is None
    refuse_existing(target, overwrite=overwrite)
    if frozen is not None:
        check_pair(frozen, lora)
    lora = _for_pretrained(lora, start)
    base = {p: leaf for p, leaf in flatten(frozen).items() if leaf is not None}
    trained = {p: leaf for p, leaf in flatten(lora).items() if leaf is not None}
    weights = _weights(trained, base)
    table = find_map(name_map).table(weights)
    _check_mapped(table, trained, weights)
    updates, tensors = _adapter_tensors(table, trained, base)
    trained_full = _trained_in_full(table, trained)
    whole, modules = _whole_modules(table, trained_full, climb=frozen is not None)
    leaves = base | trained
    for parameter in whole.values():
        tensors[_full_key(parameter, updates)] = full_to_torch(parameter, _array(parameter, leaves))
    fields = dict(config.fields if isinstance(config, Config) else config or {})
    fields |= _fields(table, updates, trained_full, modules, trained, use_rslora=bool(fields.get("use_rslora")))
    fields["base_model_name_or_path"] = base_model_name_or_path or fields.get("base_model_name_or_path")
    fields["task_type"] = task_type or fields.get("task_type")
    if Config(fields).exchanges_experts:
        fields["peft_version"] = "0.19.0"  # the first whose layout of experts is the one written here
    record = json.dumps(check_config(fields, "config=").computation())
    with atomic_directory(target, overwrite=overwrite) as fresh:
        safetensors.write_all(fresh / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt", CONFIG_RECORD: record})
        (fresh / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _for_pretrained(lora: Params, start: Params | None) -> Params:
    """``lora`` for the pretrained weights, which are those that PEFT loads."""
    if start is not None:
        return subtract_start(lora, start)
    if moved := moved_paths(lora):
        init = flatten(lora)[moved[0]].moved_base
        raise ValueError(
            f"{moved[0]}: the start of this adapter ({init}) was taken out of its weight, and PEFT would put it on the "
            "pretrained weight, where it is wrong. Pass start=, the lora tree as init returned it: then an adapter of "
            "twice the rank is written, for the pretrained weight. A checkpoint that lojax.save wrote with start= is "
            "such an adapter already."
        )
    return lora


def foreign_entry(directory: pathlib.Path) -> str | None:
    """The name of something in a directory that is not of an adapter which `save` wrote; None where all is."""
    names = sorted(entry.name for entry in directory.iterdir())
    foreign = next((name for name in names if name not in (CONFIG, WEIGHTS)), None)
    if foreign is None and names and not safetensors.is_from_lojax(directory / WEIGHTS):
        return names[-1]
    return foreign


def _weights(trained: Mapping[Path, Leaf], base: Mapping[Path, Leaf]) -> dict[Path, Leaf]:
    """Every leaf by path; where only the adapter of a weight is at hand, the shape of that weight."""
    weights: dict[Path, Leaf] = {}
    for path, leaf in trained.items():
        if is_adapter(leaf) and leaf.a is not None:
            weights[path] = jax.ShapeDtypeStruct(leaf.weight_shape, unbox(leaf.a).dtype)
        elif not is_adapter(leaf):
            weights[path] = leaf
        elif path not in base:
            raise ValueError(f"{path}: PEFT stores whole token rows, not what was added to them; pass frozen.")
    return weights | dict(base)


def _check_mapped(table: Table, trained: Mapping[Path, Leaf], weights: Mapping[Path, Leaf]) -> None:
    if not trained:
        raise ValueError("lora holds nothing that trains: there is no adapter to save.")
    unmapped = set(table.unmapped)
    missing = [path for path in trained if path in unmapped]
    if missing:
        raise ValueError(
            f"The name map has no rule for {len(missing)} of the {len(trained)} trained leaves, so nothing was written:"
            + "".join(f"\n  {path} {tuple(unbox(weights[path]).shape)}" for path in missing)
            + "\nAdd rules: name_map | NameMap.parse('jax/path/{i}/kernel <-> torch.name.{i}')."
        )
    if not any(is_adapter(leaf) and leaf.a is not None for leaf in trained.values()):
        raise ValueError(
            f"lora holds no low-rank update, only {', '.join(list(trained)[:3])} trained otherwise: PEFT loads no LoRA "
            "without one. Adapt some weight, or save the parameters themselves."
        )


def _adapter_tensors(
    table: Table, trained: Mapping[Path, Leaf], base: Mapping[Path, Leaf]
) -> tuple[Updates, dict[str, np.ndarray]]:
    """The update of each torch parameter, and the tensors of the adapters."""
    parameters, tensors = table.by_path(), {}
    updates: dict[str, tuple[TorchParameter, TorchUpdate]] = {}
    for path, adapter in trained.items():
        for parameter in parameters[path] if is_adapter(adapter) else ():
            update = None if adapter.a is None else factors.read_update(parameter, adapter)
            present = [extra for extra in EXTRAS if getattr(adapter, extra.field) is not None]
            extras = {extra: extra.to_torch(parameter, adapter, base.get(path)) for extra in present}
            if update and _is_idle(parameter, adapter, update, extras, base.get(path)):
                continue
            tensors |= {extra_key(extra, parameter): tensor for extra, tensor in extras.items()}
            if update:
                updates[parameter.name] = parameter, update
    in_torch_order = sorted(updates.values(), key=lambda item: item[0].order)
    for nested in group_by(in_torch_order, lambda item: item[0].module).values():
        for depth, (parameter, update) in enumerate(reversed(nested)):
            if depth and not parameter.is_experts:
                raise ValueError(f"{parameter.path} and {nested[-1][0].path} are one torch module, {parameter.module}.")
            tensors |= zip(factor_keys(parameter, depth), factors.to_torch(parameter, update), strict=True)
    return updates, tensors


def _is_idle(
    parameter: TorchParameter, adapter: Adapter, update: TorchUpdate, extras: Mapping[Any, np.ndarray], leaf: Leaf
) -> bool:
    """Whether an entry of a stack has no adapter: PEFT gets no tensors for it."""
    if not extras:
        return factors.entry_rank(parameter, adapter) == 0
    return update.is_zero and all(extra.is_idle(parameter, tensor, leaf) for extra, tensor in extras.items())


def _trained_in_full(table: Table, trained: Mapping[Path, Leaf]) -> dict[str, TorchParameter]:
    """The parameters trained in full, by name."""
    return {name: p for name, p in table.parameters.items() if p.path in trained and not is_adapter(trained[p.path])}


def _full_key(parameter: TorchParameter, updates: Updates) -> str:
    is_wrapped = any(adapted.module == parameter.module for adapted, _ in updates.values())
    return f"{PREFIX}{parameter.module}{WRAPPER * is_wrapped}.{parameter.name.rpartition('.')[2]}"


def _whole_modules(
    table: Table, trained_full: Mapping[str, TorchParameter], *, climb: bool
) -> tuple[dict[str, TorchParameter], list[str]]:
    """Every parameter to write in full, and the modules to save: those of a trained weight, whole.

    ``climb``: a parent of which all is written stands for its children, as PEFT names a head of several layers.
    """
    modules = {parameter.module for parameter in trained_full.values() if not parameter.is_bias}
    whole = dict(trained_full) | {name: p for name, p in table.parameters.items() if p.module in modules}
    for name, parameter in trained_full.items():
        if parameter.kind == "param" and not parameter.module:
            raise ValueError(f"{parameter.path}: PEFT cannot save {name}, a parameter of the model itself, in full.")
    partial = {parent for name in table.parameters if name not in whole for parent in _parents(name)}
    tops = set()
    for module in modules:
        wholes = itertools.takewhile(lambda parent: parent not in partial, _parents(module)) if climb else ()
        tops.add([module, *wholes][-1])
    return whole, sorted(tops)


def _parents(name: str) -> list[str]:
    """The modules around a parameter or module, from the inside out.

    >>> _parents("a.b.weight")
    ['a.b', 'a']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _array(parameter: TorchParameter, leaves: Mapping[Path, Leaf]) -> np.ndarray:
    leaf = unbox(leaves[parameter.path])
    if not hasattr(leaf, "__array__"):
        raise ValueError(
            f"{parameter.path} belongs to a module that is saved in full; pass its array in frozen, not its shape."
        )
    return np.asarray(leaf)


def _fields(
    table: Table,
    updates: Updates,
    trained_full: Mapping[str, TorchParameter],
    modules: Sequence[str],
    trained: Mapping[Path, Leaf],
    *,
    use_rslora: bool,
) -> dict[str, Any]:
    """The config fields that follow from the adapters."""
    settings: dict[str, tuple[int, float]] = {}
    for parameter, update in updates.values():
        alpha = update.scale * (math.sqrt(update.rank) if use_rslora else update.rank)
        settings[parameter.config_key] = (update.rank, int(alpha) if alpha == int(alpha) else alpha)
    most_common = collections.Counter(settings.values()).most_common(1)
    rank, alpha = most_common[0][0] if most_common else (8, 8)
    adapters = {path: leaf for path, leaf in trained.items() if isinstance(leaf, Adapter)}
    dropouts = {adapter.dropout for adapter in adapters.values() if adapter.a is not None}
    if len(dropouts) > 1:
        raise ValueError(f"PEFT has one lora_dropout for all adapters; these have {sorted(dropouts)}.")
    invocations = {adapter.invocation_tokens for adapter in adapters.values()}
    if len(invocations) > 1:
        raise ValueError(f"PEFT has one alora_invocation_tokens for all adapters; these have {[*invocations]}.")
    adapted = [parameter for parameter, _ in updates.values()]
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {"^" + re.escape(key): r for key, (r, _) in settings.items() if r != rank},
        "alpha_pattern": {"^" + re.escape(key): a for key, (_, a) in settings.items() if a != alpha},
        "lora_dropout": dropouts.pop() if dropouts else 0.0,
        "alora_invocation_tokens": list(*filter(None, invocations)) or None,
        "fan_in_fan_out": bool(adapted) and all(parameter.kind == "conv1d" for parameter in adapted),
        "bias": _bias(adapted, trained_full, modules),
        "target_modules": _target_modules(table, {p.module for p in adapted if not p.is_experts}),
        "exclude_modules": None,
        "target_parameters": [p.name for p in adapted if p.is_experts] or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(modules) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    leaf_modules = {parameter.path: parameter.module for parameter in table.parameters.values()}
    for extra in EXTRAS:
        fields |= extra.config_fields(adapters, leaf_modules)
    return fields


def _bias(adapted: Sequence[TorchParameter], trained_full: Mapping[str, TorchParameter], modules: Sequence[str]) -> str:
    """Which biases train besides those of the modules that are saved whole."""
    inside = tuple(f"{module}." for module in modules)
    biases = {p.module for p in trained_full.values() if p.is_bias and not f"{p.module}.".startswith(inside)}
    if not biases:
        return "none"
    return "lora_only" if biases <= {parameter.module for parameter in adapted} else "all"


def _target_modules(table: Table, adapted: set[str]) -> list[str]:
    """The adapted modules: by last name where the tree has no other module of that name, else in full."""
    others = {parameter.module for parameter in table.parameters.values() if parameter.is_weight} - adapted
    taken = {module.rpartition(".")[2] for module in others}
    knows_base = len(table.parameters) > len(adapted)  # without frozen, the table has the trained weights only
    last = {module: module.rpartition(".")[2] for module in adapted}
    return sorted({name if knows_base and name not in taken and not name.isdigit() else m for m, name in last.items()})
