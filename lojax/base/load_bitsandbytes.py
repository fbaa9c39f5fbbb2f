"""Loading what bitsandbytes or ``lojax quantize`` quantized to 4 bits."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp

from lojax.base.bitsandbytes_files import from_tensors, part_names, weight_names
from lojax.files import safetensors
from lojax.files.model_files import weight_files
from lojax.quantized.quantized import Quantized
from lojax.types import Array


def load_bitsandbytes(path: str | os.PathLike[str]) -> dict[str, Array | Quantized]:
    """The tensors of a checkpoint by name, its 4-bit weights as `Quantized`, bit for bit.

    The names and shapes are those of the file: a linear map is ``[out, in]`` as in torch, and a net that multiplies
    with it takes it transposed. The tensors are read one after another.

    Args:
        path: A ``.safetensors`` file, or the directory of a model, its files as the hub holds them.

    Returns:
        A flat tree. Under the names that the net gives its parameters (`lojax.adapters.paths.unflatten` nests them)
        it is a base as `lojax.quantize` returns one.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A file is damaged or contradicts itself, or two files hold a tensor of one name.

    >>> import tempfile
    >>> from lojax.base.bitsandbytes_files import to_tensors
    >>> from lojax.base.quantize import quantize
    >>> weight = quantize({"w": jnp.ones((64, 64))}, "nf4")["w"]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     safetensors.write_all(Path(directory, "model.safetensors"), to_tensors("up.weight", weight), {})
    ...     load_bitsandbytes(directory)
    {'up.weight': Quantized((64, 64), nf4, float32, 4.14 bits)}
    """
    files = [safetensors.open_file(file) for file in weight_files(Path(path).expanduser())]
    owners = {name: file for file in files for name in file.entries}
    if len(owners) < sum(len(file.entries) for file in files):
        raise ValueError(f"{path}: two of its files hold a tensor of the same name. Fetch the model again.")
    # A shard may end between the parts of a weight.
    parts_of = {name: part_names(name, owners) for name in weight_names(owners)}
    inside = {part for parts in parts_of.values() for part in parts}
    tree: dict[str, Array | Quantized] = {}
    for name, file in owners.items():
        if name not in inside:
            tree[name] = jnp.asarray(file.read(name))
    for name, parts in parts_of.items():
        where = owners[parts[0]].path
        tree[name] = from_tensors(name, {part: owners[part].read(part) for part in parts}, where=where)
    return {name: tree[name] for name in sorted(tree)}
