"""The trainable data of one adapted weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lojax.adapt.axes import Axes
from lojax.adapt.boxes import unbox


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update ``scale * a @ b`` of one weight (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    A pytree node: ``a`` and ``b`` are its leaves, ``scale`` and ``axes`` are static. It sits in the
    ``lora`` tree where the weight sits in ``params``.

    Attributes:
        a: ``[*stack, *in, r]``, random at the start. PEFT's ``lora_A`` transposed.
        b: ``[*stack, r, *out]``, zero at the start. PEFT's ``lora_B`` transposed.
        scale: The factor on the update, ``alpha / r`` (or ``alpha / sqrt(r)`` for rsLoRA).
        axes: The role of each axis of the weight: ``"in"``, ``"out"`` or ``"stack"``.
        dropout: The rate of dropout on the input of the update, where a key is given to apply.
    """

    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank ``r`` of the update."""
        return unbox(self.a).shape[-1]


def is_adapter(node: Any) -> bool:
    """Whether ``node`` is an `Adapter`."""
    return isinstance(node, Adapter)
