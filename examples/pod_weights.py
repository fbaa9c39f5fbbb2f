"""A Hugging Face Llama on a mesh: every process reads from the safetensors files only the slices that it holds."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lojax.files.safetensors import File, open_file
from lojax.planner.decoder import Decoder, described, nested


def load(folder: Path, decoder: Decoder, dtype: Any = jnp.bfloat16) -> Any:
    """The parameters of ``decoder``, each lying on the mesh as the decoder wants it.

    Args:
        folder: The model's directory: ``config.json`` and ``model*.safetensors``.
        decoder: The decoder of that configuration, on its mesh.
        dtype: The dtype to hold the weights in.

    Raises:
        FileNotFoundError: There is no safetensors file.
        ValueError: A tensor is missing or has another shape than the configuration says.
    """
    tensors = opened(folder)
    params = {}
    for path, (shape, spec) in tqdm(described(decoder.config).items(), desc="weights", disable=jax.process_index() > 0):
        read = reader(path, shape, tensors, folder)
        cast = lambda index, read=read: np.asarray(read(index)).astype(jnp.dtype(dtype))
        params[path] = jax.make_array_from_callback(shape, decoder.sharding(spec), cast)
    return nested(params)


def opened(folder: Path) -> dict[str, File]:
    """Which file holds each tensor. Only headers are read."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"{folder} holds no *.safetensors. Expected a Hugging Face model directory.")
    files = [open_file(folder / name) for name in names]
    return {name: file for file in files for name in file.entries}


def reader(
    path: str, shape: tuple[int, ...], tensors: Mapping[str, File], folder: Path
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function of an index into our array that reads just that part of it."""
    stacked, name = path.startswith("layers/"), torch_name(path)
    turned = path.endswith("/kernel")  # torch keeps [out, in]
    one = shape[1:] if stacked else shape
    wanted = one[::-1] if turned else one

    def part(layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        full = name.format(layer)
        if full not in tensors:
            raise ValueError(f"{folder} lacks the tensor {full!r}. Is config.json that of another model?")
        entry = tensors[full].entries[full]
        if entry.shape != wanted:
            raise ValueError(f"{folder}: {full!r} has shape {entry.shape}; config.json says {wanted}.")
        mapped = np.memmap(tensors[full].path, entry.dtype, "r", entry.start, entry.shape)
        return mapped[index[::-1]].T if turned else mapped[index]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return part(None, index)
        return np.stack([part(i, index[1:]) for i in range(shape[0])[index[0]]])

    return read


def torch_name(path: str) -> str:
    """The name of a parameter in a Hugging Face Llama; ``{}`` stands for the layer.

    >>> torch_name("layers/mlp/up_proj/kernel")
    'model.layers.{}.mlp.up_proj.weight'
    """
    name = path.rpartition("/")[0] + ("/bias" if path.endswith("/bias") else "/weight")
    name = name.replace("layers/", "layers/{}/", 1).replace("/", ".")
    return name if name.startswith("lm_head") else f"model.{name}"
