"""What the engine did with each use of an adapted weight."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one adapted weight in the traced program.

    Attributes:
        path: The path of the weight.
        primitive: The JAX primitive that consumed it.
        how: ``"factored"``, ``"fused"`` or ``"materialized"``.
        flops: Floating-point operations of the frozen product, all trips of enclosing scans together.
        extra_flops: Floating-point operations that the update added, likewise.
        extra_bytes: Bytes of the arrays that the update made on the way, likewise: the activation at rank size and the
            update of the result where it is factored, the weight where it is fused or materialized.
        reason: Why it was materialized, or "".
        where: The user's source line, as ``file:line (function)``, or "".
    """

    path: str
    primitive: str
    how: Literal["factored", "fused", "materialized"]
    flops: int = 0
    extra_flops: int = 0
    extra_bytes: int = 0
    reason: str = ""
    where: str = ""


class MaterializedError(ValueError):
    """Strict mode met a use that has no factored form."""

    def __init__(self, use: Use, shape: tuple[int, ...]):
        at = f" at {use.where}" if use.where else ""
        super().__init__(
            f"{use.path} (shape {shape}) is used by {use.primitive!r}{at}, which has no factored form: "
            f"{use.reason}. Take the weight out of targets, train it in full, or allow this use to form "
            "W0 + scale*A*B with strict=False."
        )
