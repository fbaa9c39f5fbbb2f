"""Hugging Face PEFT adapters, both ways: `load`, `save`, and the name maps between JAX paths and torch names."""

from lojax.peft.config import Config, read_config
from lojax.peft.model_families import name_map, name_maps
from lojax.peft.name_map import NameMap, Table, TorchParameter
from lojax.peft.read_adapter import freeze, load
from lojax.peft.write_adapter import save

__all__ = [
    "Config",
    "NameMap",
    "Table",
    "TorchParameter",
    "freeze",
    "load",
    "name_map",
    "name_maps",
    "read_config",
    "save",
]

Slot = TorchParameter
"""Its name in lojax 0.1."""
