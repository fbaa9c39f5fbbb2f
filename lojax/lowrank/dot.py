"""`dot_general` with an adapted weight on either side, over any axes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lojax.lowrank.factored import add_updates, apply_term, completed, term_bytes, term_flops
from lojax.lowrank.fused import fused_product
from lojax.lowrank.named_array import RANK, Name, NamedArray, Precision, multiply_flops
from lojax.lowrank.strategy import Product, Strategy, Work, choose_strategy
from lojax.lowrank.value import LowRank, NotFactored, Term, complete_term
from lojax.types import Array, Dtype


@dataclasses.dataclass(frozen=True)
class Dot:
    """The product of an activation with an adapted weight.

    Attributes:
        x: The activation.
        x_dims: The names of its axes: the axis of the weight that it is paired with, else ``("x", i)``.
        out: The names of the result's axes.
        bind: ``bind(w, x)``, the product with a plain weight.
        precision: Of the activation and the weight, in this order.
        dtype: The ``preferred_element_type``.
        batch: The axes of the weight that are batch axes of the product.
        factor_input: ``x`` for the products with factors; None for ``x`` itself.
        weight_on_left: Whether the weight is the left operand.
        update: The update, if it was computed together with those of other weights.
        total: The product with its update, before any gain, if it was computed so.
        no_kernel: Why no kernel computes ``total``; "" if one does.
    """

    x: Array
    x_dims: tuple[Name, ...]
    out: tuple[Name, ...]
    bind: Callable[[Array, Array], Array]
    precision: Precision = None
    dtype: Dtype | None = None
    batch: tuple[int, ...] = ()
    factor_input: Array | None = None
    weight_on_left: bool = False
    update: Array | None = None
    total: Array | None = None
    no_kernel: str = "it is not a product of an activation [T, m] with one update, without dropout, on one device"

    @property
    def named_x(self) -> NamedArray:
        """The activation with its names."""
        return NamedArray(self.x, self.x_dims)

    def contracted_axes(self, value: LowRank) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the weight that are summed, and those that are shared with a batch."""
        summed = tuple(d for d in self.x_dims if isinstance(d, int) and d not in self.out)
        return summed, self.batch

    def frozen(self, value: LowRank) -> Array:
        """The product with the frozen part alone."""
        return value.frozen.product(self.bind, self.x)

    def choose(self, value: LowRank, execution: str) -> tuple[Work, Strategy]:
        """The operations of the product, and the strategy to compute it with."""
        update = sum(term_flops(self.named_x, term, self.out) for term in completed(value).terms)
        base = multiply_flops(self.named_x, NamedArray(value.frozen, tuple(range(value.ndim))))
        work = Work(base, update, 2 * value.size * value.terms[0][0].size(RANK))
        if len(value.terms) != 1 or value.dropout is not None or not value.fusible:
            return work, "factored"
        dtypes = (value.frozen.dtype, self.x.dtype, self.dtype or self.x.dtype)
        return work, choose_strategy(execution, work, dtypes=dtypes, precision=self.precision)

    def compute(self, value: LowRank, execution: str) -> Product:
        """The product, with the cost of its update."""
        work, strategy = self.choose(value, execution)
        # JAX may cache these functions beyond the trace, so they close over shapes and names only, never over a tracer.
        settings: dict[str, Any] = {"precision": self.precision, "dtype": self.dtype}
        x_dims, out, shape, active = self.x_dims, self.out, value.shape, value.active

        def update(x: Array, term: Term, like: Array, **options: Any) -> Array:
            return apply_term(
                NamedArray(x, x_dims),
                complete_term(term, shape),
                out,
                **settings,
                like=jax.typeof(like),
                active=active,
                **options,
            ).array

        if strategy == "fused":
            in_fused = functools.partial(update, opaque=False)
            y = add_updates(
                # The base below includes the update already, so there is no term to add. A gain still applies.
                value.with_terms(()),
                self.named_x,
                self.out,
                base=lambda x: fused_product(x, value, base=self.bind, update=in_fused),
                update=lambda x, term, like, tap: like,  # never called
            )
            return Product(y, work.base, work.materializing, value.size * value.frozen.dtype.itemsize, "fused")
        total = self.total
        y = add_updates(
            value if total is None else value.with_terms(()),
            self.named_x,
            self.out,
            base=lambda x: value.frozen.product(self.bind, x) if total is None else total,
            update=lambda x, term, like, tap: update(x, term, like, tap=tap),
            factor_input=self.factor_input,
            precomputed=self.update,
        )
        made = sum(term_bytes(self.named_x, term, self.out, y) for term in completed(value).terms)
        strategy = "factored" if self.no_kernel else "kernel"
        return Product(y, work.base, work.low_rank, 0 if strategy == "kernel" else made, strategy, self.no_kernel)


def dot(
    x: Array,
    w_ndim: int,
    dimension_numbers: Any,
    *,
    weight_on_left: bool,
    bind: Callable[[Array, Array], Array],
    precision: Precision = None,
    dtype: Dtype | None = None,
) -> Dot:
    """The `Dot` of a `dot_general`.

    Args:
        x: The activation.
        w_ndim: The number of axes of the weight.
        dimension_numbers: As in `jax.lax.dot_general`, for the operands in their order.
        weight_on_left: Whether the weight is the left operand.
        bind: ``bind(w, x)``, the product with a plain weight.
        precision: As in `jax.lax.dot_general`, for the operands in their order.
        dtype: The ``preferred_element_type``.
    """
    # JAX may number axes by NumPy integers, which do not compare with the tuples that name other axes.
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = (
        tuple(tuple(int(d) for d in dims) for dims in pair) for pair in dimension_numbers
    )
    x_sum, w_sum = (rhs_sum, lhs_sum) if weight_on_left else (lhs_sum, rhs_sum)
    x_batch, w_batch = (rhs_batch, lhs_batch) if weight_on_left else (lhs_batch, rhs_batch)
    if not w_sum:
        raise NotFactored("an outer product sums no axis")
    dims: list[Name] = [("x", i) for i in range(x.ndim)]
    for i, d in zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True):
        dims[i] = d
    free_w = [d for d in range(w_ndim) if d not in (*w_sum, *w_batch)]
    free_x = [d for d in dims if isinstance(d, tuple)]
    out = (*w_batch, *free_w, *free_x) if weight_on_left else (*w_batch, *free_x, *free_w)
    if weight_on_left and isinstance(precision, tuple):
        precision = precision[::-1]
    return Dot(x, tuple(dims), out, bind, precision, dtype, tuple(w_batch), weight_on_left=weight_on_left)
