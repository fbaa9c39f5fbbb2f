"""Base safetensors and a PEFT adapter in, merged safetensors out, one tensor at a time."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lojax.cli.base_weights import BaseWeights, open_weights
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
    weights = open_weights(base, paths)
    changes = patches(adapter, weights.specs, experts=experts)
    with atomic_directory(target, overwrite=overwrite) as fresh:
        for file in weights.files:
            held = {name: weights.specs[name] for name in file.entries if name in weights.specs}
            _merge_file(file, held, weights, changes, fresh / file.path.name)
        for path in beside:
            if weights.quantized and path.name == INDEX:
                index = update_index(path, [safetensors.open_file(fresh / file.path.name) for file in weights.files])
                (fresh / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            elif weights.quantized and path.name == CONFIG:
                config = {key: value for key, value in read_object(path).items() if key != "quantization_config"}
                (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(path, fresh / path.name)


def _merge_file(
    file: safetensors.File,
    specs: Mapping[str, tuple[np.dtype, Shape]],
    weights: BaseWeights,
    changes: Patches,
    target: Path,
) -> None:
    def merged(name: str) -> np.ndarray:
        tensor = weights.read(name)
        for patch in changes.get(name, ()):
            patch.apply(tensor)
        return tensor

    safetensors.write(target, specs, merged, metadata=file.metadata, watch=watcher(file.path.name))
