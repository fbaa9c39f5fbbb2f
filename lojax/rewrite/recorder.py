"""The record of uses of adapted weights: what the engine did with each of them, and strict mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jax.extend import source_info_util

from lojax.lowrank.strategy import Product
from lojax.lowrank.value import PATH_SEPARATOR, LowRank
from lojax.types import Array, Eqn, Path, Shape


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one adapted weight in the traced program.

    Attributes:
        path: The path of the weight.
        primitive: The JAX primitive that consumed it.
        how: ``"factored"``, ``"fused"``, ``"kernel"`` or ``"materialized"``.
        flops: Floating-point operations of the frozen product, all trips of enclosing scans together.
        extra_flops: Floating-point operations that the update added, likewise.
        extra_bytes: Bytes of the intermediate arrays of the update, likewise: ``x A`` and the update of the result
            for a factored use, the weight for a fused or materialized one.
        reason: Why it was materialized, or why no kernel computes it where one was asked for, or "".
        where: The user's source line, as ``file:line (function)``, or "".
    """

    path: Path
    primitive: str
    how: str
    flops: int = 0
    extra_flops: int = 0
    extra_bytes: int = 0
    reason: str = ""
    where: str = ""


COUNTS = ("flops", "extra_flops", "extra_bytes")
"""The fields of a `Use` that add up over trips, and that weights share if they were combined into one."""


class MaterializedError(ValueError):
    """In strict mode, a use that has no factored form."""

    def __init__(self, use: Use, shape: Shape):
        at = f" at {use.where}" if use.where else ""
        super().__init__(
            f"{use.path} (shape {shape}) is used by {use.primitive!r}{at}, which has no factored form: "
            f"{use.reason}. Take the weight out of targets, train it in full, or allow this use to materialize "
            "W0 + scale*A*B with strict=False."
        )


@dataclasses.dataclass
class Recorder:
    """The uses of one evaluation, in program order.

    Attributes:
        strict: Whether a materialized use is an error.
        uses: The uses so far; None for no record.
    """

    strict: bool = False
    uses: list[Use] | None = None

    def product(self, value: LowRank, eqn: Eqn, product: Product, reason: str = "") -> None:
        """Records a product with a weight that was not materialized."""
        use = Use(
            value.path,
            eqn.primitive.name,
            product.strategy,
            product.flops,
            product.extra_flops,
            product.extra_bytes,
            reason,
            _source_line(eqn),
        )
        self._add(use)

    def no_kernel(self, value: LowRank, eqn: Eqn, product: Product) -> None:
        """Records a product that is not computed by a kernel although one was asked for, or refuses it if strict.

        Raises:
            ValueError: Strict mode forbids it.
        """
        reason = product.no_kernel or f"there is none for {eqn.primitive.name!r}"
        if self.strict:
            at = f" at {where}" if (where := _source_line(eqn)) else ""
            raise ValueError(
                f"{value.path}: execution='kernel' asks for a kernel, and the product {eqn.primitive.name!r}{at} has "
                f"none: {reason}. Use strict=False, which computes it factored, or execution='auto'."
            )
        self.product(value, eqn, product, reason)

    def materialize(self, value: LowRank, eqn: Eqn | str, reason: str) -> Array:
        """The dense array of ``value``, recorded as a materialized use, or refused if strict.

        Args:
            value: The value; uses of a probe are not recorded.
            eqn: The equation that consumes it, or a name where there is none.
            reason: Why it has no factored form.

        Raises:
            MaterializedError: Strict mode forbids it.
        """
        if not value.probe:
            name = eqn if isinstance(eqn, str) else eqn.primitive.name
            flops, size = 2 * value.size * value.rank, value.size * value.frozen.dtype.itemsize
            use = Use(value.path, name, "materialized", 0, flops, size, reason, _source_line(eqn))
            if value.active is not None:
                at = f" at {use.where}" if use.where else ""
                raise ValueError(
                    f"{value.path}: active= makes the update act on some tokens only, and this use of the weight by "
                    f"{name!r}{at} has no such form: {reason}. Take the weight out of targets."
                )
            if self.strict:
                raise MaterializedError(use, value.shape)
            self._add(use)
        return value.dense()

    def _add(self, use: Use) -> None:
        """Adds ``use``. Weights that were combined into one get equal shares of its counts."""
        if self.uses is None:
            return
        paths = use.path.split(PATH_SEPARATOR)
        shares = {name: getattr(use, name) // len(paths) for name in COUNTS}
        self.uses += [dataclasses.replace(use, path=path, **shares) for path in paths]

    @contextmanager
    def collect(self, into: list[Use]) -> Iterator[None]:
        """Uses recorded inside go to ``into`` alone, and replace what is there.

        JAX may trace the body of a loop or of a branch more than once; `replay` then counts the last trace.
        """
        outer, self.uses = self.uses, None if self.uses is None else []
        try:
            yield
        finally:
            # In place: the caller has the list already, and reads it after JAX has traced the body for the last time.
            into[:] = self.uses or []
            self.uses = outer

    def replay(self, uses: Sequence[Use], trips: int = 1) -> None:
        """Records the collected uses of a body that runs ``trips`` times."""
        if self.uses is not None:
            self.uses += [dataclasses.replace(u, **{name: getattr(u, name) * trips for name in COUNTS}) for u in uses]


def _source_line(eqn: Eqn | str) -> str:
    return "" if isinstance(eqn, str) else source_info_util.summarize(eqn.source_info)
