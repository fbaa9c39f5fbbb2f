"""The trainable data of one adapted weight."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from lojax.adapters.axes import Axes
from lojax.adapters.metadata import rebox, unbox


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update ``scale * a @ b`` of one weight (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    A pytree node: its arrays are leaves, the rest is static. It sits in the ``lora`` tree where the
    weight sits in ``params``. The members of the LoRA family differ in which fields are there:

    ============== ======================================================================
    LoRA, rsLoRA   ``a``, ``b``; they differ in the rule that gave ``scale``
    DoRA           ``magnitude`` as well
    LoRA-FA        ``frozen_a``
    token rows     ``rows`` and ``tokens``, with ``a`` and ``b`` or, in their place, None
    ============== ======================================================================

    Attributes:
        a: ``[*stack, *in, r]``, random at the start. PEFT's ``lora_A`` transposed.
        b: ``[*stack, r, *out]``, zero at the start. PEFT's ``lora_B`` transposed.
        scale: The factor on the update, ``alpha / r`` (or ``alpha / sqrt(r)`` for rsLoRA). One number, or one
            for each entry of the stack.
        axes: The role of each axis of the weight: ``"in"``, ``"out"`` or ``"stack"``.
        dropout: The rate of dropout on the input of the update, where a key is given to apply.
        magnitude: ``[*stack, *out]``: the length of each column of the weight, which DoRA trains apart from its
            direction (Liu et al. 2024, arXiv:2402.09353, eq. 5). None for any other variant.
        rows: ``[k, *out]``: what is added to the rows ``tokens`` of an embedding. None without such rows.
        tokens: The ``k`` rows of the embedding that train.
        ranks: The rank of each entry of the stack, where they differ; what is above it in ``a`` and ``b`` is zero,
            has no gradient and stays zero.
        frozen_a: Whether ``a`` stays as it is (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303): no gradient reaches
            it, and the input of the weight is not kept for the backward pass. `lojax.optimizer` leaves it alone.
    """

    a: Any
    b: Any
    scale: float | tuple[float, ...] = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    magnitude: Any = None
    rows: Any = None
    tokens: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    ranks: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    frozen_a: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank ``r`` of the update, the largest of a stack; 0 where only token rows train."""
        return 0 if self.a is None else unbox(self.a).shape[-1]

    @property
    def one_scale(self) -> float:
        """The scale, where it is the same for every entry of the stack."""
        assert not isinstance(self.scale, tuple)
        return self.scale

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, by field, out of their boxes."""
        named = {name: getattr(self, name) for name in ("a", "b", "magnitude", "rows")}
        return {name: unbox(x) for name, x in named.items() if x is not None}

    @property
    def parameters(self) -> int:
        """The number of parameters that train: without a frozen ``a``, and without the padding of ``ranks``."""
        total = 0
        for name, x in self.arrays.items():
            size = math.prod(x.shape)
            if name in ("a", "b") and self.ranks is not None:
                size = size * sum(self.ranks) // (len(self.ranks) * self.rank)
            total += 0 if name == "a" and self.frozen_a else size
        return total

    @property
    def extras(self) -> tuple[str, ...]:
        """What it holds beyond ``scale * a @ b`` with one scale: the names of those fields."""
        held = [name for name in ("magnitude", "rows", "ranks") if getattr(self, name) is not None]
        return (*held, *["scale"] * (isinstance(self.scale, tuple) and "ranks" not in held))

    @property
    def variant(self) -> str:
        """The member of the family, as `lojax.Rule` names it."""
        if self.a is None:
            return "tokens"
        return "dora" if self.magnitude is not None else "lora-fa" if self.frozen_a else "lora"


def is_adapter(node: Any) -> bool:
    """Whether ``node`` is an `Adapter`."""
    return isinstance(node, Adapter)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """``adapter`` with its update times ``factor``: a change of the scale, and of the token rows."""
    scale = adapter.scale
    scale = tuple(s * factor for s in scale) if isinstance(scale, tuple) else scale * factor
    rows = None if adapter.rows is None else rebox(adapter.rows, unbox(adapter.rows) * factor)
    return dataclasses.replace(adapter, scale=scale, rows=rows)
