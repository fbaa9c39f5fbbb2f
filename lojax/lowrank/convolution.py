"""`conv_general_dilated` with an adapted kernel: a convolution to r channels, then one with a window of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from lojax.lowrank.factored import Tap, add_updates, completed
from lojax.lowrank.named_array import RANK, Name, NamedArray, cast
from lojax.lowrank.strategy import Product
from lojax.lowrank.value import LowRank, NotFactored, Term, array_bytes, compute_dtype
from lojax.types import Array


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution whose kernel has its input features and window in one factor, its output features in the other.

    Attributes:
        x: The activation.
        numbers: The ``dimension_numbers`` of `jax.lax.conv_general_dilated`.
        groups: The ``feature_group_count``.
        batch_groups: The ``batch_group_count``.
        bind: ``bind(w, x)``, the convolution with a plain kernel.
        options: Strides, padding, dilations, precision and ``preferred_element_type``.
    """

    x: Array
    numbers: lax.ConvDimensionNumbers
    groups: int
    batch_groups: int
    bind: Callable[[Array, Array], Array]
    options: dict[str, Any]

    def contracted_axes(self, value: LowRank) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Input features and window are summed."""
        return tuple(self.numbers.rhs_spec[1:]), ()

    def frozen(self, value: LowRank) -> Array:
        """The convolution with the frozen kernel alone."""
        return value.frozen.product(self.bind, self.x)

    def compute(self, value: LowRank, execution: str) -> Product:
        """The convolution, with the cost of its update."""
        if self.batch_groups != 1:
            raise NotFactored("a convolution with batch groups")
        if value.active is not None:
            raise NotFactored("it tells no tokens apart")
        if len(value.terms) > 1:
            raise NotFactored("a convolution with a sum of updates")
        out_axis, in_axis, *window = self.numbers.rhs_spec
        if value.gain is not None and value.gain.dims != (out_axis,):
            raise NotFactored("a convolution whose DoRA magnitude is not along the output features")
        value = completed(value)
        # The factors are told apart by their axes, not by their order: a program may use the kernel with in and out
        # exchanged.
        inner, outer = sorted(value.terms[0], key=lambda factor: out_axis in factor.dims)
        if out_axis in inner.dims or set(outer.dims) != {RANK, out_axis}:
            raise NotFactored("a convolution whose window or input features are out axes of the adapter")
        feature_axis = self.numbers.out_spec[1]
        out: list[Name] = [out_axis if d == feature_axis else ("x", d) for d in range(self.x.ndim)]
        y = add_updates(
            value.with_terms(((inner, outer),)),
            NamedArray(self.x, tuple(("x", d) for d in range(self.x.ndim))),
            out,
            base=lambda x: value.frozen.product(self.bind, x),
            update=self._update,
        )
        taps = math.prod(value.shape[d] for d in (in_axis, *window))
        positions, rank = y.size // y.shape[feature_axis], inner.size(RANK)
        middle_bytes = positions * rank * self.groups * jnp.dtype(self._kind()).itemsize
        extra = 2 * positions * rank * (taps * self.groups + value.shape[out_axis])
        return Product(y, 2 * y.size * taps, extra, middle_bytes + array_bytes(y))

    def _kind(self) -> Any:
        return compute_dtype(self.x, self.options.get("preferred_element_type"))

    def _update(self, x: Array, term: Term, like: Array, tap: Tap) -> Array:
        """The convolution with the update alone."""
        inner, outer = term
        out_axis, in_axis, *window = self.numbers.rhs_spec
        numbers: Any = self.numbers
        shared = {name: self.options[name] for name in ("precision", "preferred_element_type")}
        # The first kernel has the rank as its output features, once for each group of input features: all groups share
        # one A, because the in axis of a grouped kernel has the length of one group.
        down = cast(inner, self._kind()).transpose_to([d if d != out_axis else RANK for d in range(like.ndim)]).array
        # Strides, padding and dilations belong to the window, and the window is in this factor. The second convolution
        # only mixes channels, position by position.
        middle = lax.conv_general_dilated(
            x.astype(self._kind()),
            jnp.concatenate([down] * self.groups, axis=out_axis) if self.groups > 1 else down,
            self.options["window_strides"],
            self.options["padding"],
            lhs_dilation=self.options["lhs_dilation"],
            rhs_dilation=self.options["rhs_dilation"],
            dimension_numbers=numbers,
            feature_group_count=self.groups,
            **shared,
        )
        point = [out_axis if d == out_axis else RANK for d in sorted((in_axis, out_axis))]
        up = jnp.expand_dims(cast(outer, self._kind()).transpose_to(point).array, tuple(window))
        update = lax.conv_general_dilated(
            tap(middle).astype(self._kind()),
            up,
            [1] * len(window),
            [(0, 0)] * len(window),
            # Its input is the result of the first one, whose layout may differ from that of x.
            dimension_numbers=numbers._replace(lhs_spec=numbers.out_spec),
            feature_group_count=self.groups,
            **shared,
        )
        return update.astype(like.dtype)
