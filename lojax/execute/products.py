"""What an adapted weight is for: products with an activation, computed without forming the update.

Each function returns the product with ``w + scale * a b`` as ``x@w + scale * (x@a)@b``, the scale on
the side of the rank, where it touches the fewest numbers. `NotFactored` is raised, with the reason,
where no cheap factored form exists. Pure maths: no jaxprs here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lojax.execute.lowrank import LowRank, NotFactored, complete
from lojax.execute.named import RANK, Name, Named, cast, multiply, multiply_flops


@dataclasses.dataclass(frozen=True)
class Product:
    """A product computed factored: its value, and what the update added to its cost."""

    value: Any
    flops: int
    """Floating-point operations of the frozen product."""
    extra_flops: int
    """Floating-point operations that the update added."""


def compute_dtype(x: Any, accumulated: Any) -> Any:
    """The dtype in which the factors meet ``x``: that of ``x``, but never less than 16 bits."""
    if jnp.dtype(x.dtype).itemsize >= 2:
        return x.dtype
    return accumulated if accumulated is not None else jnp.bfloat16


def apply_factors(
    x: Named, value: LowRank, out: Sequence[Name], *, precision: Any = None, dtype: Any = None
) -> tuple[Named, int]:
    """``scale * (x . first) . second`` summed over the axes of ``x`` that are not in ``out``.

    The first factor is the one that sums away the most. Returns the update of the product, axes in the
    order ``out``, and its floating-point operations.
    """
    value = complete(value)
    summed = [d for d in x.dims if d not in out]

    def alone(i: int) -> list[Name]:
        return [d for d in summed if d in value.factors[i].dims and d not in value.factors[1 - i].dims]

    weight = [math.prod(value.factors[i].size(d) for d in alone(i)) for i in (0, 1)]
    if max(weight) == 1 and not (alone(0) or alone(1)):
        raise NotFactored("no axis of one factor alone is summed")
    first, second = value.factors if weight[0] >= weight[1] else value.factors[::-1]
    gone = alone(0 if weight[0] >= weight[1] else 1)
    kind = compute_dtype(x.array, dtype)
    x, first, second = cast(_dropped_out(x, value), kind), cast(first, kind), cast(second, kind)
    middle = [d for d in dict.fromkeys((*x.dims, *first.dims)) if d not in gone and d != RANK] + [RANK]
    inner = multiply(x, first, middle, precision=precision, dtype=dtype)
    flops = multiply_flops(x, first)
    inner = cast(Named(rescaled(inner.array, value.scale), inner.dims), kind)
    outer = multiply(inner, second, out, precision=precision, dtype=dtype)
    return outer, flops + multiply_flops(inner, second)


def rescaled(x: Any, scale: float) -> Any:
    """``x * scale`` in the dtype of ``x``, and ``x`` itself for a scale of one."""
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def _dropped_out(x: Named, value: LowRank) -> Named:
    """``x`` with dropout, where the value asks for it (Srivastava et al. 2014, inverted)."""
    if value.key is None or not value.rate:
        return x
    keep = jax.random.bernoulli(value.key, 1 - value.rate, x.array.shape)
    return Named(jnp.where(keep, x.array / (1 - value.rate), jnp.zeros_like(x.array)), x.dims)


def dot(
    x: Any,
    value: LowRank,
    *,
    dimension_numbers: Any,
    weight_on_left: bool,
    base: Callable[[Any], Any],
    precision: Any = None,
    dtype: Any = None,
) -> Product:
    """`dot_general` of an activation with an adapted weight, on either side, over any axes.

    Args:
        x: The activation.
        value: The adapted weight.
        dimension_numbers: As in `jax.lax.dot_general`, for the operands in their order.
        weight_on_left: Whether the weight is the left operand.
        base: The frozen product, as a function of the frozen weight.
        precision: As in `jax.lax.dot_general`, for the operands in their order.
        dtype: The ``preferred_element_type``.
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    x_sum, w_sum = (rhs_sum, lhs_sum) if weight_on_left else (lhs_sum, rhs_sum)
    x_batch, w_batch = (rhs_batch, lhs_batch) if weight_on_left else (lhs_batch, rhs_batch)
    if not w_sum:
        raise NotFactored("an outer product sums no axis")
    dims: list[Name] = [("x", i) for i in range(x.ndim)]
    for i, d in zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True):
        dims[i] = d
    free_w = [d for d in range(value.w.ndim) if d not in (*w_sum, *w_batch)]
    free_x = [d for d in dims if isinstance(d, tuple)]
    out = (*w_batch, *free_w, *free_x) if weight_on_left else (*w_batch, *free_x, *free_w)
    if weight_on_left and isinstance(precision, tuple):
        precision = precision[::-1]
    update, extra = apply_factors(Named(x, tuple(dims)), value, out, precision=precision, dtype=dtype)
    y = base(value.w)
    flops = multiply_flops(Named(x, tuple(dims)), Named(value.w, tuple(range(value.w.ndim))))
    return Product(y + update.array.astype(y.dtype), flops, extra)


def gather(
    value: LowRank,
    indices: Any,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    base: Any,
    options: dict[str, Any],
) -> Product | LowRank:
    """A look-up in an adapted weight: an embedding, or the choice of entries of a stack.

    Where only stack axes are addressed the result is again an adapted weight; otherwise the rows of
    one factor are looked up and multiplied by the other.

    Args:
        value: The adapted weight.
        indices: ``[*batch, k]``, as in `jax.lax.gather`.
        dimension_numbers: As in `jax.lax.gather`.
        slice_sizes: As in `jax.lax.gather`.
        base: The look-up in the frozen weight.
        options: The other parameters of `jax.lax.gather`.
    """
    numbers = dimension_numbers
    if numbers.operand_batching_dims:
        raise NotFactored("a look-up with batched operands")
    value = complete(value)
    batch: list[Name] = [("i", j) for j in range(indices.ndim - 1)]
    kept = [d for d in range(value.w.ndim) if d not in numbers.collapsed_slice_dims]
    names: list[Name] = []
    kept_names, batch_names = iter(kept), iter(batch)
    for position in range(base.ndim):
        names.append(next(kept_names) if position in numbers.offset_dims else next(batch_names))
    touched = set(numbers.start_index_map)
    looked_up = [_gather_factor(x, indices, numbers, slice_sizes, batch, options) for x in value.factors]
    if all(touched <= set(x.dims) for x in value.factors):  # only stack axes are addressed
        new: dict[Name, Name] = {name: i for i, name in enumerate(names)}
        return dataclasses.replace(value, w=base, factors=tuple(x.renamed(new) for x in looked_up))
    a, b = (cast(x, base.dtype) for x in looked_up)
    a = Named(rescaled(a.array, value.scale), a.dims)
    return Product(base + multiply(a, b, names).array, 0, multiply_flops(a, b))


def _gather_factor(
    x: Named,
    indices: Any,
    numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    batch: Sequence[Name],
    options: dict[str, Any],
) -> Named:
    columns = [i for i, d in enumerate(numbers.start_index_map) if d in x.dims]
    cut = [d for d in x.dims if d != RANK and slice_sizes[d] != x.size(d)]  # type: ignore[call-overload]
    if not columns and not cut:
        return x
    x = x.ordered([*sorted(d for d in x.dims if d != RANK), RANK])  # type: ignore[type-var]
    collapsed = [d for d in x.dims if d in numbers.collapsed_slice_dims]
    kept = [d for d in x.dims if d not in collapsed]
    array = lax.gather(
        x.array,
        jnp.take(indices, jnp.asarray(columns), axis=-1) if len(columns) < indices.shape[-1] else indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(batch), len(batch) + len(kept))),
            collapsed_slice_dims=tuple(x.axis(d) for d in collapsed),
            start_index_map=tuple(x.axis(numbers.start_index_map[i]) for i in columns),
        ),
        slice_sizes=tuple(x.size(d) if d == RANK else slice_sizes[d] for d in x.dims),  # type: ignore[call-overload]
        **(options | {"fill_value": 0} if options.get("fill_value") is not None else options),
    )
    return Named(array, (*batch, *kept))


def conv(
    x: Any,
    value: LowRank,
    *,
    base: Any,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    options: dict[str, Any],
) -> Product:
    """A convolution with an adapted kernel: one to ``r`` channels, then one of window 1 to the outputs.

    Args:
        x: The activation.
        value: The kernel; its input-feature and window axes belong to one factor, its output axis to
            the other.
        base: The convolution with the frozen kernel.
        dimension_numbers: As in `jax.lax.conv_general_dilated`.
        feature_group_count: As in `jax.lax.conv_general_dilated`.
        batch_group_count: As in `jax.lax.conv_general_dilated`.
        options: Strides, padding, dilations, precision and ``preferred_element_type``.
    """
    if batch_group_count != 1:
        raise NotFactored("a convolution with batch groups")
    out_axis, in_axis, *window = dimension_numbers.rhs_spec
    value = complete(value)
    inner, outer = sorted(value.factors, key=lambda f: out_axis in f.dims)
    if out_axis in inner.dims or set(outer.dims) != {RANK, out_axis}:
        raise NotFactored("a convolution whose window or input features lie in the out axes")
    kind = compute_dtype(x, options.get("preferred_element_type"))
    groups, rank = feature_group_count, inner.size(RANK)
    # The first kernel has the rank as its output features, once for each group of input features.
    first = cast(inner, kind).ordered([d if d != out_axis else RANK for d in range(value.w.ndim)])
    kernel = jnp.concatenate([first.array] * groups, axis=out_axis) if groups > 1 else first.array
    x_kind = _dropped_out(Named(x.astype(kind), tuple(range(x.ndim))), value).array
    numbers: Any = dimension_numbers
    shared = {k: options[k] for k in ("precision", "preferred_element_type")}
    middle = lax.conv_general_dilated(
        x_kind,
        kernel,
        options["window_strides"],
        options["padding"],
        lhs_dilation=options["lhs_dilation"],
        rhs_dilation=options["rhs_dilation"],
        dimension_numbers=numbers,
        feature_group_count=groups,
        **shared,
    )
    middle_kind = rescaled(middle, value.scale).astype(kind)
    point = cast(outer, kind).ordered([out_axis if d == out_axis else RANK for d in sorted((in_axis, out_axis))])
    ones = jnp.expand_dims(point.array, tuple(window))
    update = lax.conv_general_dilated(
        middle_kind,
        ones,
        [1] * len(window),
        [(0, 0)] * len(window),
        dimension_numbers=numbers,
        feature_group_count=groups,
        **shared,
    )
    outputs = base.size // base.shape[dimension_numbers.out_spec[1]]
    taps = math.prod(value.shape[d] for d in (in_axis, *window))
    extra = 2 * outputs * rank * (taps * groups + value.shape[out_axis])
    return Product(base + update.astype(base.dtype), 2 * base.size * taps, extra)
