"""The report of how each adapted weight is executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lojax.adapters.adapter import is_adapter
from lojax.adapters.axes import Axes
from lojax.adapters.metadata import unbox
from lojax.adapters.trees import check_pair
from lojax.report.table import table
from lojax.rewrite.recorder import Use


@dataclasses.dataclass(frozen=True)
class Weight:
    """One adapted weight and everything the program does with it."""

    path: str
    shape: tuple[int, ...]
    axes: Axes
    rank: int
    parameters: int
    uses: tuple[Use, ...]

    @property
    def how(self) -> str:
        """``"factored"``, ``"fused"``, ``"factored, fused"``, ``"materialized"``, ``"both"`` or ``"unused"``.

        ``"both"``: some uses are materialized and others are not.
        """
        kinds = sorted({use.how for use in self.uses})
        if len(kinds) > 1 and "materialized" in kinds:
            return "both"
        return ", ".join(kinds) or "unused"


@dataclasses.dataclass(frozen=True)
class Report:
    """How every adapted weight is executed. Printing it gives a table; the data are in ``weights``."""

    weights: tuple[Weight, ...]

    @property
    def factored(self) -> int:
        """The number of weights all of whose uses are factored, or fused."""
        return sum(weight.how in ("factored", "fused", "factored, fused") for weight in self.weights)

    @property
    def extra_flops(self) -> int:
        """The floating-point operations that the updates add to one forward pass."""
        return sum(use.extra_flops for weight in self.weights for use in weight.uses)

    @property
    def extra_bytes(self) -> int:
        """The bytes of the arrays that the updates make on the way in one forward pass."""
        return sum(use.extra_bytes for weight in self.weights for use in weight.uses)

    def __str__(self) -> str:
        counts = ("extra FLOPs", "of frozen", "extra bytes")
        header = ("weight", "shape", "axes", "rank", "parameters", "uses", "executed", *counts)
        lines = [table(header, [_row(weight) for weight in self.weights])]
        for weight in self.weights:
            lines += [_note(weight, use) for use in weight.uses if use.how == "materialized"]
            if not weight.uses:
                lines.append(
                    f"{weight.path} is never used by this program: its adapter gets no gradient. "
                    "Take it out of targets, or report on the inputs that use it."
                )
        fused = any("fused" in weight.how for weight in self.weights)
        lines.append(
            f"{self.factored} of {len(self.weights)} adapted weights fully factored{' or fused' if fused else ''}"
        )
        return "\n".join(lines)


def _row(weight: Weight) -> tuple[str, ...]:
    extra, base = sum(u.extra_flops for u in weight.uses), sum(u.flops for u in weight.uses)
    uses = ", ".join(dict.fromkeys(u.primitive for u in weight.uses))
    return (
        weight.path,
        str(weight.shape),
        " ".join(weight.axes),
        str(weight.rank),
        f"{weight.parameters:,}",
        f"{len(weight.uses)} {uses}",
        weight.how,
        f"{extra:,}",
        f"{100 * extra / base:.1f}%" if base else "",
        f"{sum(u.extra_bytes for u in weight.uses):,}",
    )


def _note(weight: Weight, use: Use) -> str:
    at = f" at {use.where}" if use.where else ""
    return (
        f"{weight.path} is formed for {use.primitive!r}{at}: {use.reason}. "
        "This costs a weight-sized temporary and gradient; leave it out of targets if that matters."
    )


def report(frozen: Any, lora: Any, uses: Sequence[Use]) -> Report:
    """Joins what was adapted with what the engine did."""
    left, right = check_pair(frozen, lora)
    weights = []
    for path, adapter in right.items():
        if not is_adapter(adapter):
            continue
        size = adapter.parameters
        mine = tuple(use for use in uses if use.path == path)
        weights.append(Weight(path, tuple(unbox(left[path]).shape), adapter.axes, adapter.rank, size, mine))
    return Report(tuple(weights))
