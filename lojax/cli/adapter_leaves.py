"""An adapter on disk, of lojax or of PEFT, as leaves to analyze, with the weights of its base where that is at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.paths import flatten
from lojax.adapters.targets import nearest
from lojax.checkpoint.adapter_directory import MANIFEST
from lojax.checkpoint.save_restore import read_manifest, restore
from lojax.cli.base_weights import open_weights
from lojax.cli.convert import read_params
from lojax.cli.model_directory import weight_files
from lojax.files import safetensors
from lojax.peft.config import Config
from lojax.peft.patch import Update, patches
from lojax.peft.read_adapter import open_adapter
from lojax.peft.tensor_keys import WRAPPER, FactorPair, read_keys
from lojax.types import Leaf

Leaves = Iterator[tuple[str, Leaf, Leaf]]
"""What `lojax.analysis.analyze.analyze_leaves` takes: a name, an adapter or what trains in full, and its weight."""


def adapter_leaves(directory: Path, base: Path | None, *, experts: str | None = None) -> tuple[Leaves, dict[str, str]]:
    """The leaves of an adapter, read one after another, and what else its files say.

    Args:
        directory: A PEFT adapter, or an adapter that `lojax.save` wrote.
        base: Its base, as `--base` of the command takes it; None for none.
        experts: How a base of torch has its experts, as in `lojax.peft.patch.patches`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the adapter does not fit the base.
    """
    if (directory / MANIFEST).is_file():
        manifest = read_manifest(directory)
        facts = {
            "kind": "lojax adapter",
            "base": base_text(directory),
            "metadata": str(dict(manifest.metadata) or "none"),
        }
        return _lojax_leaves(directory, base), facts
    config, file = open_adapter(directory)
    leaves = _peft_leaves(config, file) if base is None else _peft_leaves_on(directory, base, experts)
    return leaves, {
        "kind": f"PEFT adapter (peft {config['peft_version'] or 'of unknown version'})",
        "base": str(config["base_model_name_or_path"] or "not recorded"),
        "task": str(config["task_type"] or "none"),
    }


def base_text(directory: Path) -> str:
    """What is known of the base of an adapter that `lojax.save` wrote."""
    return "known by its fingerprint" if read_manifest(directory).base is not None else "not recorded"


def _lojax_leaves(directory: Path, base: Path | None) -> Leaves:
    trained = {path: leaf for path, leaf in flatten(restore(directory)).items() if leaf is not None}
    weights = {} if base is None else flatten(read_params(base))
    for path, leaf in trained.items():
        weight = None
        if base is not None and is_adapter(leaf):
            if path not in weights:
                raise ValueError(f"{base} has no {path}; the nearest is {nearest(path, [*weights], 1)[0]}.")
            weight = weights[path]
            shape = leaf.weight_shape
            if len(shape) != len(weight.shape) or any(
                n not in (None, m) for n, m in zip(shape, weight.shape, strict=True)
            ):
                raise ValueError(
                    f"{path}: the adapter is for a weight of shape {shape}, and {base} has {weight.shape}."
                )
            weight = np.asarray(weight)
        yield path, leaf, weight


def _peft_leaves_on(directory: Path, base: Path, experts: str | None) -> Leaves:
    weights = open_weights(base, weight_files(base))
    for name, changes in patches(directory, weights.specs, experts=experts).items():
        for change in changes:
            if isinstance(change, Update):
                yield name, change.as_adapter(), change.as_weight(weights.read(name))
            else:
                shape = weights.specs[name][1]
                yield (
                    name,
                    jax.ShapeDtypeStruct((len(change.rows), *shape[1:]) if change.rows else shape, np.float32),
                    None,
                )


def _peft_leaves(config: Config, file: safetensors.File) -> Leaves:
    keys = read_keys(file)
    for key, reason in keys.unexpected.items():
        raise ValueError(f"{file.path}: {key} {reason}.")
    magnitudes = {key.module: key.key for key in keys.extras if key.extra.field == "magnitude"}
    for pair in keys.pairs:
        adapter = _adapter(file, pair, config)
        if key := magnitudes.pop(pair.module, None):
            adapter = dataclasses.replace(adapter, magnitude=file.read(key).reshape(-1))
        yield pair.module + WRAPPER * pair.depth, adapter, None
    others = [(key.module, key.key) for key in keys.extras if key.extra.field != "magnitude"]
    others += magnitudes.items()
    for name, key in [*keys.full.items(), *others]:
        yield name, jax.ShapeDtypeStruct(file.entries[key].shape, np.float32), None


def _adapter(file: safetensors.File, pair: FactorPair, config: Config) -> Adapter:
    a_shape, b_shape = file.entries[pair.a].shape, file.entries[pair.b].shape
    rank = config.rank(pair.module) if config["target_parameters"] else (a_shape or (0,))[0]
    experts = a_shape[0] // rank if a_shape and rank else 0
    if not experts or len(a_shape) < 2 or len(b_shape) < 2 or {a_shape[0], math.prod(b_shape[1:])} != {rank * experts}:
        raise ValueError(f"{file.path}: {pair.a} is {a_shape} and {pair.b} is {b_shape}: not factors of one rank.")
    ins, outs = a_shape[1:], b_shape[:1]
    a = file.read(pair.a).reshape(experts, rank, *ins)
    b = file.read(pair.b).reshape(*outs, rank, experts).transpose(2, 1, 0)
    a = np.moveaxis(a, 1, -1)
    axes = (*["in"] * len(ins), "out")
    scale = config.scale(pair.module, rank)
    if experts == 1:
        return Adapter(a[0], b[0], scale, axes)  # type: ignore[arg-type]
    return Adapter(a, b, scale, ("stack", *axes))  # type: ignore[arg-type]
