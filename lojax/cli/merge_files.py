"""Base safetensors and a PEFT adapter in, merged safetensors out, one tensor at a time."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from lojax.base.bitsandbytes_files import STATE, State, from_tensors, part_names, read_state, weight_names
from lojax.cli.model_directory import (
    CONFIG,
    INDEX,
    foreign_entry,
    read_object,
    side_files,
    update_index,
    weight_files,
)
from lojax.cli.paths import check_target, user_path
from lojax.cli.progress import watcher
from lojax.files import safetensors
from lojax.files.atomic_directory import atomic_directory
from lojax.peft.patch import Patches, patches
from lojax.types import Shape

SUMMARY = "merge a PEFT adapter into the safetensors of its base"
EXAMPLE = "lojax merge ~/models/base ~/adapters/my-adapter ~/models/merged"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("base", type=user_path, help="a .safetensors file, or the directory of a model")
    parser.add_argument("adapter", type=user_path, help="the directory of a PEFT adapter")
    parser.add_argument("target", type=user_path, help="the directory to make")
    parser.add_argument(
        "--experts", choices=("out_in", "in_out"), help="how the base has its experts, if shapes do not tell"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a target that lojax wrote")


def run(args: argparse.Namespace) -> None:
    """Merges."""
    merge(args.base, args.adapter, args.target, overwrite=args.overwrite, experts=args.experts)
    print(f"{args.base} + {args.adapter} -> {args.target}")


def merge(base: Path, adapter: Path, target: Path, *, overwrite: bool = False, experts: str | None = None) -> None:
    """Writes the merged model: files of the same names, float32 sums, each tensor in the base's dtype.

    4-bit weights of bitsandbytes are dequantized, with an adapter or without.
    Memory stays near the largest tensor of the base plus the adapter. ``experts`` is as in `patches`.

    Raises:
        FileExistsError: ``target`` exists, and ``overwrite`` is False or it holds what lojax did not write.
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, the adapter does not fit the base, or ``target`` is or holds one of them;
            nothing is written.
    """
    paths = weight_files(base)
    beside = [*side_files(base, {path.name for path in paths})]
    foreign = lambda directory: foreign_entry(directory, {path.name for path in beside})
    check_target(target, [base, adapter, *paths, *adapter.glob("*")], overwrite=overwrite, foreign=foreign)
    files = [safetensors.open_file(path) for path in paths]
    entries = {name: entry for file in files for name, entry in file.entries.items()}
    if len(entries) < sum(len(file.entries) for file in files):
        raise ValueError(f"{base}: two of its files hold a tensor of the same name.")
    owners = {name: file for file in files for name in file.entries}
    weights = {name: _open_quantized(name, owners) for name in weight_names(owners)}
    inside = {part for name in weights for part in part_names(name, owners)} - set(weights)
    specs = {name: (entry.dtype, entry.shape) for name, entry in entries.items() if name not in inside}
    specs |= {name: (state.dtype, state.shape) for name, (state, _) in weights.items()}
    readers = {name: read for name, (_, read) in weights.items()}
    changes = patches(adapter, specs, experts=experts)
    with atomic_directory(target, overwrite=overwrite) as fresh:
        for file in files:
            held = {name: specs[name] for name in file.entries if name in specs}
            _merge_file(file, held, readers, changes, fresh / file.path.name)
        for path in beside:
            if weights and path.name == INDEX:
                index = update_index(path, [safetensors.open_file(fresh / file.path.name) for file in files])
                (fresh / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            elif weights and path.name == CONFIG:
                config = {key: value for key, value in read_object(path).items() if key != "quantization_config"}
                (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(path, fresh / path.name)


def _open_quantized(name: str, owners: Mapping[str, safetensors.File]) -> tuple[State, Callable[[], np.ndarray]]:
    """What is said of a 4-bit weight, and a function that reads and dequantizes it.

    ``owners`` are the files by tensor: a shard may end between the parts of a weight.
    """
    parts = part_names(name, owners)
    where = owners[parts[0]].path
    states = {part: owners[part].read(part) for part in parts if STATE in part}

    def read() -> np.ndarray:
        return np.array(from_tensors(name, {part: owners[part].read(part) for part in parts}, where=where).dense())

    return read_state(name, states, where=where), read


def _merge_file(
    file: safetensors.File,
    specs: Mapping[str, tuple[np.dtype, Shape]],
    readers: Mapping[str, Callable[[], np.ndarray]],
    changes: Patches,
    target: Path,
) -> None:
    def merged(name: str) -> np.ndarray:
        tensor = readers[name]() if name in readers else file.read(name)
        for patch in changes.get(name, ()):
            patch.apply(tensor)
        return tensor

    safetensors.write(target, specs, merged, metadata=file.metadata, watch=watcher(file.path.name))
