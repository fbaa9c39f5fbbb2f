"""The directory of a model on disk: the files of its weights, and what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from lojax.files import safetensors
from lojax.files.filesystem import parse_json
from lojax.text import printable

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


def foreign_entry(directory: Path, side_names: set[str]) -> str | None:
    """The name of something in a directory that is not of a model which lojax wrote; None where all is."""
    names = sorted(entry.name for entry in directory.iterdir())
    merged = {name for name in names if name.endswith(".safetensors") and safetensors.is_from_lojax(directory / name)}
    foreign = [name for name in names if name not in merged and (name not in side_names or not merged)]
    return foreign[0] if foreign else None


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


def side_files(base: Path, weights: set[str]) -> Iterator[Path]:
    """The config, tokenizer and index beside the weights; other forms of the weights are left behind."""
    if base.is_dir():
        for path in sorted(base.iterdir()):
            heavy = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx")
            if path.is_file() and not path.is_symlink() and path.name not in weights and not heavy:
                yield path


def update_index(path: Path, files: Sequence[safetensors.File]) -> Mapping[str, object]:
    """The index of the written files; what else the old one said stays."""
    index = read_object(path)
    metadata = index.get("metadata")
    size = sum(entry.nbytes for file in files for entry in file.entries.values())
    return {
        **index,
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": size},
        "weight_map": {name: file.path.name for file in files for name in file.entries},
    }


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        fields = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({printable(error)}).") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return fields
