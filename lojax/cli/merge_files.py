"""Base safetensors and a PEFT adapter in, merged safetensors out, one tensor at a time."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from lojax.cli.model_directory import foreign_entry, side_files, weight_files
from lojax.cli.paths import check_target, user_path
from lojax.cli.progress import watcher
from lojax.files import safetensors
from lojax.files.atomic_directory import atomic_directory
from lojax.peft.patch import Patches, patches

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
    specs = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    changes = patches(adapter, specs, experts=experts)
    with atomic_directory(target, overwrite=overwrite) as fresh:
        for file in files:
            _merge_file(file, changes, fresh / file.path.name)
        for path in beside:
            shutil.copyfile(path, fresh / path.name)


def _merge_file(file: safetensors.File, changes: Patches, target: Path) -> None:
    def merged(name: str) -> np.ndarray:
        tensor = file.read(name)
        for patch in changes.get(name, ()):
            patch.apply(tensor)
        return tensor

    specs = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    safetensors.write(target, specs, merged, metadata=file.metadata, watch=watcher(file.path.name))
