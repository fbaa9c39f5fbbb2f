"""A Hugging Face Llama on a mesh: every process reads only its own slices of the safetensors files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lojax.adapters.paths import unflatten
from lojax.files.safetensors import File, open_file
from lojax.planner.decoder import Decoder, parameter_specs


def load(folder: Path, decoder: Decoder, dtype: Any = jnp.bfloat16) -> Any:
    """The parameters of ``decoder``, sharded over its mesh.

    Args:
        folder: The model's directory: ``config.json`` and ``model*.safetensors``.
        decoder: The decoder of that configuration, on its mesh.
        dtype: The dtype of the weights.

    Raises:
        FileNotFoundError: There is no safetensors file.
        ValueError: A tensor is missing or has another shape than the configuration says.
    """
    files = open_files(folder)
    params = {}
    progress = tqdm(parameter_specs(decoder.config).items(), desc="weights", disable=jax.process_index() > 0)
    for path, (shape, spec) in progress:
        read = slice_reader(path, shape, files, folder)
        cast = lambda index, read=read: np.asarray(read(index)).astype(jnp.dtype(dtype))
        params[path] = jax.make_array_from_callback(shape, decoder.sharding(spec), cast)
    return unflatten(params)


def open_files(folder: Path) -> dict[str, File]:
    """The file of each tensor. Only headers are read."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"{folder} holds no *.safetensors. Expected a Hugging Face model directory.")
    files = [open_file(folder / name) for name in names]
    return {name: file for file in files for name in file.entries}


def slice_reader(
    path: str, shape: tuple[int, ...], files: Mapping[str, File], folder: Path
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function ``index -> array`` that reads only that slice of the parameter at ``path``."""
    stacked, template = path.startswith("layers/"), torch_name(path)
    transposed = path.endswith("/kernel")  # torch stores [out, in]
    layer_shape = shape[1:] if stacked else shape
    expected = layer_shape[::-1] if transposed else layer_shape

    def read_tensor(layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        name = template.format(layer)
        if name not in files:
            raise ValueError(f"{folder} lacks the tensor {name!r}. Is config.json that of another model?")
        entry = files[name].entries[name]
        if entry.shape != expected:
            raise ValueError(f"{folder}: {name!r} has shape {entry.shape}; config.json says {expected}.")
        mapped = np.memmap(files[name].path, entry.dtype, "r", entry.start, entry.shape)
        return mapped[index[::-1]].T if transposed else mapped[index]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return read_tensor(None, index)
        return np.stack([read_tensor(i, index[1:]) for i in range(shape[0])[index[0]]])

    return read


def torch_name(path: str) -> str:
    """The name of a parameter in a Hugging Face Llama; ``{}`` stands for the layer.

    >>> torch_name("layers/mlp/up_proj/kernel")
    'model.layers.{}.mlp.up_proj.weight'
    """
    name = path.rpartition("/")[0] + ("/bias" if path.endswith("/bias") else "/weight")
    name = name.replace("layers/", "layers/{}/", 1).replace("/", ".")
    return name if name.startswith("lm_head") else f"model.{name}"
