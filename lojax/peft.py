"""Hugging Face PEFT adapters, both ways: `load`, `save`, and the name maps between JAX paths and torch names."""

from lojax.store.peft.config import Config, read_config
from lojax.store.peft.families import name_map, name_maps
from lojax.store.peft.load import freeze, load
from lojax.store.peft.namemap import NameMap, Slot, Table
from lojax.store.peft.save import save

__all__ = ["Config", "NameMap", "Slot", "Table", "freeze", "load", "name_map", "name_maps", "read_config", "save"]
