"""lojax: LoRA as a pure JAX function transform, on any model, without touching its code."""

import importlib
from typing import TYPE_CHECKING

from lojax import peft, sharding
from lojax.adapters.adapter import Adapter
from lojax.adapters.algebra import combine, rescale, resize, subtract
from lojax.adapters.bank import Bank
from lojax.adapters.conform import conform
from lojax.adapters.intruders import tame
from lojax.adapters.invocation import active_tokens
from lojax.adapters.rule import Rule
from lojax.adapters.stack import stack, unstack
from lojax.adapters.truncation import extract, trim
from lojax.analysis.advice import Advice, advise
from lojax.analysis.analyze import Analysis, analyze
from lojax.analysis.similarity import Similarity, similarity
from lojax.base.load_bitsandbytes import load_bitsandbytes
from lojax.base.quantize import quantize
from lojax.lowrank.merge import merge, requantization_loss, unmerge
from lojax.quantized.quantized import Quantized
from lojax.report.summary import summary
from lojax.rewrite.transform import transform
from lojax.training import remat
from lojax.training.eva import eva
from lojax.training.lora_ga import lora_ga
from lojax.training.optimizer import optimizer
from lojax.training.sweep import Sweep, SweepState, sweep
from lojax.wrap import Model, init, wrap

if TYPE_CHECKING:
    from lojax.checkpoint.save_restore import read_metadata, restore, save

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Advice",
    "Analysis",
    "Bank",
    "Model",
    "Quantized",
    "Rule",
    "Similarity",
    "Sweep",
    "SweepState",
    "active_tokens",
    "advise",
    "analyze",
    "combine",
    "conform",
    "eva",
    "extract",
    "init",
    "load_bitsandbytes",
    "lora_ga",
    "merge",
    "optimizer",
    "peft",
    "quantize",
    "read_metadata",
    "remat",
    "requantization_loss",
    "rescale",
    "resize",
    "restore",
    "save",
    "sharding",
    "similarity",
    "stack",
    "subtract",
    "summary",
    "sweep",
    "tame",
    "transform",
    "trim",
    "unmerge",
    "unstack",
    "wrap",
]


def __dir__() -> list[str]:
    """The public names, without the modules that importing them leaves here."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


_ON_FIRST_USE = dict.fromkeys(("read_metadata", "restore", "save"), "lojax.checkpoint.save_restore")
"""Names whose modules are imported when they are first asked for: orbax takes a seventh of the whole import."""


def __getattr__(name: str) -> object:
    """Imports what is imported on first use, and says where a name of earlier versions is now."""
    if name in _ON_FIRST_USE:
        value = getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
        globals()[name] = value
        return value
    hint = " lojax.scale is now lojax.sharding; its plans are in lojax.planner." if name == "scale" else ""
    raise AttributeError(f"module 'lojax' has no attribute {name!r}.{hint}")
