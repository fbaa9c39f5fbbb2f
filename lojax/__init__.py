"""lojax: LoRA as a pure JAX function transform, on any model, without touching its code."""

from lojax import peft
from lojax.adapt.adapter import Adapter
from lojax.adapt.rule import Rule
from lojax.deploy.compose import combine, rescale, resize, subtract
from lojax.deploy.merge import merge, unmerge
from lojax.execute.transform import transform
from lojax.report.summary import summary
from lojax.store.checkpoint import restore, save
from lojax.train import remat
from lojax.train.eva import eva
from lojax.train.lora_ga import lora_ga
from lojax.train.optimizer import optimizer
from lojax.wrap import Model, init, wrap

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Model",
    "Rule",
    "combine",
    "eva",
    "init",
    "lora_ga",
    "merge",
    "optimizer",
    "peft",
    "remat",
    "rescale",
    "resize",
    "restore",
    "save",
    "subtract",
    "summary",
    "transform",
    "unmerge",
    "wrap",
]
