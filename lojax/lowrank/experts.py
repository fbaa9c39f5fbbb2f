"""`ragged_dot_general` with adapted experts: every row is multiplied by the factors of its own group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lojax.lowrank.factored import Tap, add_updates, completed
from lojax.lowrank.named_array import RANK, Name, NamedArray, Precision, cast
from lojax.lowrank.strategy import Product
from lojax.lowrank.value import LowRank, NotFactored, Term, array_bytes, compute_dtype
from lojax.types import Array, Dtype


@dataclasses.dataclass(frozen=True)
class Experts:
    """A ragged product.

    Attributes:
        x: The activation, its rows sorted by group.
        group_sizes: ``[groups]``, the number of rows of each.
        numbers: A `jax.lax.RaggedDotDimensionNumbers`; the group axis of the weight is a stack.
        bind: ``bind(w, x)``, the product with plain experts.
        precision: As in `jax.lax.ragged_dot_general`.
        dtype: The ``preferred_element_type``.
    """

    x: Array
    group_sizes: Array
    numbers: lax.RaggedDotDimensionNumbers
    bind: Callable[[Array, Array], Array]
    precision: Precision = None
    dtype: Dtype | None = None

    def contracted_axes(self, value: LowRank) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the weight that are summed; the group axis is shared with the rows."""
        (_, summed), (_, batch) = self.numbers.dot_dimension_numbers
        return tuple(summed), (*batch, *self.numbers.rhs_group_dimensions)

    def frozen(self, value: LowRank) -> Array:
        """The product with the frozen experts alone."""
        return value.frozen.product(self.bind, self.x)

    def compute(self, value: LowRank, execution: str) -> Product:
        """The product, with the cost of its update."""
        ((x_sum, w_sum), (x_batch, _)) = self.numbers.dot_dimension_numbers
        (ragged,), groups = self.numbers.lhs_ragged_dimensions, self.numbers.rhs_group_dimensions
        if value.active is not None:
            raise NotFactored("it tells no tokens apart")
        if len(value.terms) > 1:
            raise NotFactored("experts with a sum of updates")
        if x_batch or len(groups) != 1 or ragged in x_sum:
            raise NotFactored("a ragged product with batch axes, or ragged over a summed axis")
        group = groups[0]
        if value.gain is not None and set(value.gain.dims) != {*range(value.ndim)} - {*w_sum}:
            raise NotFactored("experts whose DoRA magnitude is not along their output features")
        value = completed(value)
        first, second = sorted(value.terms[0], key=lambda factor: not set(w_sum) <= set(factor.dims))
        first_axes, second_axes = ({*factor.dims} - {RANK, group} for factor in (first, second))
        if first_axes != set(w_sum) or first_axes & second_axes or not (group in first.dims and group in second.dims):
            raise NotFactored("experts whose group axis is no stack, or whose in axes are not the summed ones")
        free = [d for d in range(value.ndim) if d not in (group, *w_sum)]
        # The position of the ragged axis in the result, which lacks the summed axes before it.
        rows = ragged - sum(d < ragged for d in x_sum)
        x_free = self.x.ndim - len(x_sum)
        out: list[Name] = [*(("x", d) for d in range(x_free)), *free]

        def update(x: Array, term: Term, like: Array, tap: Tap) -> Array:
            kind = compute_dtype(self.x, self.dtype)
            middle = self._multiply(x.astype(kind), term[0], x_sum, [group, *w_sum, RANK], ragged)
            last = middle.ndim - 1
            return self._multiply(tap(middle).astype(kind), term[1], [last], [group, RANK, *free], rows).astype(
                like.dtype
            )

        gain = value.gain
        if gain is not None:  # [groups, n] to [T, n]: every row takes the gain of its own group
            by_group = gain.transpose_to([group, *free]).array
            # Group sizes are values, so under jit only `total_repeat_length` tells JAX how many rows there are.
            by_row = jnp.repeat(by_group, self.group_sizes, axis=0, total_repeat_length=self.x.shape[ragged])
            gain = NamedArray(by_row, (("x", rows), *free))
        y = add_updates(
            dataclasses.replace(value, terms=((first, second),), gain=gain),
            NamedArray(self.x, tuple(("in", d) for d in range(self.x.ndim))),
            out,
            base=lambda x: value.frozen.product(self.bind, x),
            update=update,
        )
        tokens, rank = self.x.size // math.prod(self.x.shape[d] for d in x_sum), first.size(RANK)
        m, n = math.prod(value.shape[d] for d in w_sum), math.prod(value.shape[d] for d in free)
        middle_bytes = tokens * rank * jnp.dtype(compute_dtype(self.x, self.dtype)).itemsize
        return Product(y, 2 * tokens * m * n, 2 * tokens * rank * (m + n), middle_bytes + array_bytes(y))

    def _multiply(
        self, lhs: Array, factor: NamedArray, lhs_sum: Sequence[int], dims: Sequence[Name], ragged: int
    ) -> Array:
        """``lhs`` times the factor with its axes in the order ``dims``: group, summed, free."""
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=((tuple(lhs_sum), tuple(range(1, 1 + len(lhs_sum)))), ((), ())),
            lhs_ragged_dimensions=(ragged,),
            rhs_group_dimensions=(0,),
        )
        weight: Any = cast(factor, lhs.dtype).transpose_to(dims).array
        return lax.ragged_dot_general(
            lhs, weight, self.group_sizes, numbers, precision=self.precision, preferred_element_type=self.dtype
        )
