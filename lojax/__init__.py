"""lojax: LoRA as a pure JAX function transform, on any model, without touching its code."""

from lojax.adapt.adapter import Adapter
from lojax.adapt.rule import Rule
from lojax.deploy.merge import merge, unmerge
from lojax.execute.transform import transform
from lojax.report.summary import summary
from lojax.store.checkpoint import restore, save
from lojax.train.optimizer import optimizer
from lojax.wrap import Model, init, wrap

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Model",
    "Rule",
    "init",
    "merge",
    "optimizer",
    "restore",
    "save",
    "summary",
    "transform",
    "unmerge",
    "wrap",
]
