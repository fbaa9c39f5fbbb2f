"""Base safetensors and a PEFT adapter in, merged safetensors out, one tensor at a time."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np

from lojax.cli.paths import check_target, user_path
from lojax.cli.progress import watcher
from lojax.files import safetensors
from lojax.files.atomic_directory import atomic_directory
from lojax.peft.patch import Patches, patches
from lojax.text import printable

SUMMARY = "merge a PEFT adapter into the safetensors of its base"
EXAMPLE = "lojax merge ~/models/base ~/adapters/my-adapter ~/models/merged"
INDEX = "model.safetensors.index.json"


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
    side_files = [*_side_files(base, {path.name for path in paths})]
    foreign = lambda directory: _foreign_entry(directory, {path.name for path in side_files})
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
        for path in side_files:
            shutil.copyfile(path, fresh / path.name)


def _foreign_entry(directory: Path, side_names: set[str]) -> str | None:
    """The name of something in a directory that is not of a model which `merge` wrote; None where all is."""
    names = sorted(entry.name for entry in directory.iterdir())
    merged = {name for name in names if name.endswith(".safetensors") and safetensors.is_from_lojax(directory / name)}
    foreign = [name for name in names if name not in merged and (name not in side_names or not merged)]
    return foreign[0] if foreign else None


def _merge_file(file: safetensors.File, changes: Patches, target: Path) -> None:
    def merged(name: str) -> np.ndarray:
        tensor = file.read(name)
        for patch in changes.get(name, ()):
            patch.apply(tensor)
        return tensor

    specs = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    safetensors.write(target, specs, merged, metadata=file.metadata, watch=watcher(file.path.name))


def weight_files(base: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        FileNotFoundError: There are none, or one that the index names is missing.
        ValueError: The index is not of the right form, or names a file outside its directory.
    """
    if base.is_file():
        return [base]
    index = base / INDEX
    if not index.is_file():
        files = sorted(base.glob("model.safetensors")) or sorted(base.glob("*.safetensors"))
        if len(files) == 1:
            return files
        what = "several .safetensors files and no index" if files else "no .safetensors file"
        raise FileNotFoundError(f"{base} holds {what}; pass the file itself.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {printable(repr(error))}.") from None
    for name in names:
        if not isinstance(name, str) or PurePath(name).name != name or "\\" in name or name in (".", ".."):
            raise ValueError(
                f"{index} names {printable(repr(name))}, which is not a plain file name. It could lead out of {base}."
            )
        if not (base / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not in {base}.")
    return [base / name for name in names]


def _side_files(base: Path, weights: set[str]) -> Iterator[Path]:
    """The config, tokenizer and index beside the weights; other forms of the weights are left behind."""
    if base.is_dir():
        for path in sorted(base.iterdir()):
            heavy = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx")
            if path.is_file() and not path.is_symlink() and path.name not in weights and not heavy:
                yield path
