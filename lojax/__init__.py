"""lojax: LoRA as a pure JAX function transform, on any model, without touching its code."""

from lojax import peft, sharding
from lojax.adapters.adapter import Adapter
from lojax.adapters.algebra import combine, rescale, resize, subtract
from lojax.adapters.rule import Rule
from lojax.base.load_bitsandbytes import load_bitsandbytes
from lojax.base.quantize import quantize
from lojax.checkpoint.save_restore import read_metadata, restore, save
from lojax.lowrank.merge import merge, requantization_loss, unmerge
from lojax.quantized.quantized import Quantized
from lojax.report.summary import summary
from lojax.rewrite.transform import transform
from lojax.training import remat
from lojax.training.eva import eva
from lojax.training.lora_ga import lora_ga
from lojax.training.optimizer import optimizer
from lojax.wrap import Model, init, wrap

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Model",
    "Quantized",
    "Rule",
    "combine",
    "eva",
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
    "subtract",
    "summary",
    "transform",
    "unmerge",
    "wrap",
]


def __dir__() -> list[str]:
    """The public names, without the modules that importing them leaves here."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


def __getattr__(name: str) -> object:
    """Says where a name of earlier versions is now."""
    hint = " lojax.scale is now lojax.sharding; its plans are in lojax.planner." if name == "scale" else ""
    raise AttributeError(f"module 'lojax' has no attribute {name!r}.{hint}")
