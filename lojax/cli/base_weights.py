"""The weights of a model on disk, read one at a time; 4-bit ones of bitsandbytes are dequantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lojax.base.bitsandbytes_files import STATE, State, from_tensors, part_names, read_state, weight_names
from lojax.files import safetensors
from lojax.types import Shape


@dataclasses.dataclass(frozen=True)
class BaseWeights:
    """What the files of a model hold.

    Attributes:
        files: The files.
        specs: The dtype and shape of each weight, of 4-bit ones what they stand for.
        quantized: A function that reads each 4-bit weight, by name.
        owners: The file of each tensor.
    """

    files: Sequence[safetensors.File]
    specs: Mapping[str, tuple[np.dtype, Shape]]
    quantized: Mapping[str, Callable[[], np.ndarray]]
    owners: Mapping[str, safetensors.File]

    def read(self, name: str) -> np.ndarray:
        """A weight by name."""
        return self.quantized[name]() if name in self.quantized else self.owners[name].read(name)


def open_weights(base: Path, paths: Sequence[Path]) -> BaseWeights:
    """The weights in the files ``paths`` of a model.

    Args:
        base: The model, for errors.
        paths: Its files of weights.

    Raises:
        ValueError: A file is damaged, or two of them hold a tensor of one name.
    """
    files = [safetensors.open_file(path) for path in paths]
    owners = {name: file for file in files for name in file.entries}
    if len(owners) < sum(len(file.entries) for file in files):
        raise ValueError(f"{base}: two of its files hold a tensor of the same name.")
    weights = {name: _open_quantized(name, owners) for name in weight_names(owners)}
    inside = {part for name in weights for part in part_names(name, owners)} - set(weights)
    specs = {
        name: (file.entries[name].dtype, file.entries[name].shape)
        for name, file in owners.items()
        if name not in inside
    }
    specs |= {name: (state.dtype, state.shape) for name, (state, _) in weights.items()}
    return BaseWeights(files, specs, {name: read for name, (_, read) in weights.items()}, owners)


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
