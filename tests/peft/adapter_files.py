"""Adapter directories for tests: written, copied and changed."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lojax
import lojax.peft
from lojax.files import safetensors
from tests.peft.layouts import golden


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter directory."""
    file = safetensors.open_file(path / "adapter_model.safetensors")
    return {name: file.read(name) for name in file.entries}


def outputs(layout: Any, base: Any, lora: Any, x: Any) -> np.ndarray:
    frozen = lojax.peft.freeze(base, lora)
    return np.asarray(lojax.transform(layout.apply, strict=True)(frozen, lora, x))


def written(path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(fields))
    (path / "adapter_model.safetensors").unlink(missing_ok=True)
    shapes = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    safetensors.write(path / "adapter_model.safetensors", shapes, tensors.__getitem__)
    return path


def copied(case: str, path: Path, *, config: dict[str, Any] | None = None) -> Path:
    shutil.copytree(golden(case)[0], path, dirs_exist_ok=True)
    fields = json.loads((path / "adapter_config.json").read_text()) | (config or {})
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def edited(path: Path, edit: Any) -> Path:
    """``path`` with its tensors changed; where it is a golden directory, a copy of it is."""
    if "golden" in path.parts:
        path = shutil.copytree(path, Path(tempfile.mkdtemp()) / "copy")
    tensors = tensors_of(path)
    edit(tensors)
    return written(path, json.loads((path / "adapter_config.json").read_text()), tensors)
