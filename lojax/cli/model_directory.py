"""The directory of a model on disk: the files of its weights, and what lies beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lojax.files import safetensors
from lojax.files.filesystem import parse_json
from lojax.files.model_files import INDEX, weight_files
from lojax.text import printable

CONFIG = "config.json"

__all__ = ["CONFIG", "INDEX", "foreign_entry", "read_object", "side_files", "update_index", "weight_files"]


def foreign_entry(directory: Path, side_names: set[str]) -> str | None:
    """The name of something in a directory that is not of a model which lojax wrote; None where all is."""
    names = sorted(entry.name for entry in directory.iterdir())
    merged = {name for name in names if name.endswith(".safetensors") and safetensors.is_from_lojax(directory / name)}
    foreign = [name for name in names if name not in merged and (name not in side_names or not merged)]
    return foreign[0] if foreign else None


def side_files(base: Path, weights: set[str]) -> Iterator[Path]:
    """The config, tokenizer and index beside the weights; other forms of the weights are left behind.

    Links count as what they lead to: in the cache of the Hugging Face hub every file is one.
    """
    if base.is_dir():
        for path in sorted(base.iterdir()):
            heavy = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx")
            if path.is_file() and path.name not in weights and not heavy:
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
