"""The report of how each adapted weight is executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from lojax.adapters.adapter import is_adapter
from lojax.adapters.axes import Axes
from lojax.adapters.metadata import unbox
from lojax.adapters.trees import check_pair
from lojax.quantized.quantized import Quantized
from lojax.report.table import html_table, rank_text, table
from lojax.rewrite.recorder import Use
from lojax.types import Leaf, Params, Path, Shape

_COUNTS = ("extra FLOPs", "of frozen", "extra bytes")
_HEADER = ("weight", "shape", "axes", "rank", "parameters", "uses", "execution", *_COUNTS)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One adapted weight and everything the program does with it.

    ``requested_rank`` is the rank that was asked for, where it was above min(m, n): the table says ``8 → 3``.
    ``stored`` says in which form the weight is stored, if not as itself.
    """

    path: Path
    shape: Shape
    axes: Axes
    rank: int
    parameters: int
    uses: tuple[Use, ...]
    requested_rank: int | None = None
    stored: str = ""

    @property
    def how(self) -> str:
        """``"factored"``, ``"fused"``, ``"kernel"``, several of them, ``"materialized"``, ``"both"`` or ``"unused"``.

        ``"both"``: some uses are materialized and others are not.
        """
        strategies = sorted({use.how for use in self.uses})
        if len(strategies) > 1 and "materialized" in strategies:
            return "both"
        return ", ".join(strategies) or "unused"

    @property
    def flops(self) -> int:
        """The floating-point operations of the frozen weight in one forward pass."""
        return sum(use.flops for use in self.uses)

    @property
    def extra_flops(self) -> int:
        """The floating-point operations that the update adds to one forward pass."""
        return sum(use.extra_flops for use in self.uses)

    @property
    def extra_bytes(self) -> int:
        """The bytes of the intermediate arrays that the update adds to one forward pass."""
        return sum(use.extra_bytes for use in self.uses)


@dataclasses.dataclass(frozen=True)
class Report:
    """How every adapted weight is executed: the data in ``weights``. It shows as a table, as `Summary` does."""

    weights: tuple[Weight, ...]

    @property
    def factored(self) -> int:
        """The number of weights of which no use is materialized."""
        return sum(weight.how not in ("materialized", "both", "unused") for weight in self.weights)

    @property
    def extra_flops(self) -> int:
        """The floating-point operations that the updates add to one forward pass."""
        return sum(weight.extra_flops for weight in self.weights)

    @property
    def extra_bytes(self) -> int:
        """The bytes of the intermediate arrays that the updates add to one forward pass."""
        return sum(weight.extra_bytes for weight in self.weights)

    def __str__(self) -> str:
        return "\n".join([table(_HEADER, list(map(_row, self.weights))), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, list(map(_row, self.weights)), self._notes())

    def _notes(self) -> list[str]:
        notes = []
        for weight in self.weights:
            notes += [_materialized(weight, use) for use in weight.uses if use.how == "materialized"]
            notes += [_no_kernel(weight, use) for use in weight.uses if use.reason and use.how != "materialized"]
            if not weight.uses:
                notes.append(
                    f"{weight.path} is never used by this program: its adapter gets no gradient. "
                    "Take it out of targets, or report on the inputs that use it."
                )
        computed = [weight for weight in self.weights if weight.how not in ("materialized", "both", "unused")]
        for stored in sorted({weight.stored for weight in computed} - {""}):
            count = sum(weight.stored == stored for weight in computed)
            notes.append(
                f"{count} of {len(self.weights)} adapted weights stored as {stored}: their values are computed at each "
                "product, forward and again backward, and not kept"
            )
        words = {"fused": " or fused", "kernel": " or by kernels"}
        others = [text for how, text in words.items() if any(how in weight.how for weight in self.weights)]
        return [*notes, f"{self.factored} of {len(self.weights)} adapted weights fully factored{''.join(others)}"]


def _row(weight: Weight) -> tuple[str, ...]:
    primitives = ", ".join(dict.fromkeys(use.primitive for use in weight.uses))
    return (
        weight.path,
        str(weight.shape),
        " ".join(weight.axes),
        rank_text(weight.rank, weight.requested_rank),
        f"{weight.parameters:,}",
        f"{len(weight.uses)} {primitives}",
        weight.how,
        f"{weight.extra_flops:,}",
        f"{100 * weight.extra_flops / weight.flops:.1f}%" if weight.flops else "",
        f"{weight.extra_bytes:,}",
    )


def _materialized(weight: Weight, use: Use) -> str:
    at = f" at {use.where}" if use.where else ""
    return (
        f"{weight.path} is materialized for {use.primitive!r}{at}: {use.reason}. "
        "This costs a temporary and a gradient of the weight's size; take it out of targets if that matters."
    )


def _no_kernel(weight: Weight, use: Use) -> str:
    at = f" at {use.where}" if use.where else ""
    return f"{weight.path} has no kernel for {use.primitive!r}{at}: {use.reason}. It is computed {use.how}."


def _storage(weight: Leaf) -> str:
    """What is stored where that is not the weight itself: the kind of quantization, or the dtype of codes."""
    if isinstance(weight, Quantized):
        return f"{weight.kind} ({8 * weight.nbytes / max(weight.size, 1):.3g} bits)"
    return "" if jnp.issubdtype(weight.dtype, jnp.inexact) else f"{weight.dtype} codes"


def report(frozen: Params, lora: Params, uses: Sequence[Use]) -> Report:
    """Joins what was adapted with what the engine did."""
    frozen_leaves, lora_leaves = check_pair(frozen, lora)
    weights = []
    for path, adapter in lora_leaves.items():
        if is_adapter(adapter):
            weight = unbox(frozen_leaves[path])
            shape = tuple(weight.shape)
            own_uses = tuple(use for use in uses if use.path == path)
            weights.append(
                Weight(
                    path,
                    shape,
                    adapter.axes,
                    adapter.rank,
                    adapter.parameters,
                    own_uses,
                    adapter.requested_rank,
                    _storage(weight),
                )
            )
    return Report(tuple(weights))
