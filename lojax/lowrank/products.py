"""What an adapted weight is for: products with an activation, computed without forming the update.

Each function returns the product with ``w + a b`` as ``x@w + (x@a)@b`` (the scale is in ``b``, see
`lowrank.from_adapter`); `dot` may take the `fused` way instead. `NotFactored` is raised, with the reason, where
no cheap factored form exists. Pure maths: no jaxprs here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from lojax.adapters.matrices import at_least_float32
from lojax.lowrank import fused
from lojax.lowrank.factored import apply_factors, compute_dtype, dropped_out, low_rank_bytes, low_rank_flops
from lojax.lowrank.named_array import RANK, Name, Named, cast, lying_as, multiply, multiply_flops
from lojax.lowrank.second_moment import echo
from lojax.lowrank.strategy import Work, choose
from lojax.lowrank.value import LowRank, NotFactored, complete


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with an adapted weight: its value, and what the update added to its cost."""

    value: Any
    flops: int
    """Floating-point operations of the frozen product."""
    extra_flops: int
    """Floating-point operations that the update added."""
    extra_bytes: int
    """Bytes of the arrays that the update made on the way."""
    how: Literal["factored", "fused"] = "factored"
    """How it was computed."""


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def dot(
    x: Any,
    value: LowRank,
    *,
    dimension_numbers: Any,
    weight_on_left: bool,
    base: Callable[[Any, Any], Any],
    precision: Any = None,
    dtype: Any = None,
    execution: str = "factored",
    apart: Any = None,
    given: Any = None,
) -> Product:
    """`dot_general` of an activation with an adapted weight, on either side, over any axes.

    Args:
        x: The activation.
        value: The adapted weight.
        dimension_numbers: As in `jax.lax.dot_general`, for the operands in their order.
        weight_on_left: Whether the weight is the left operand.
        base: The frozen product, as a function of the frozen weight and the activation.
        precision: As in `jax.lax.dot_general`, for the operands in their order.
        dtype: The ``preferred_element_type``.
        execution: ``"factored"``, ``"fused"`` or ``"auto"`` (see `cost`). A sum of updates, and one under dropout,
            is factored whatever is asked for.
        apart: ``x`` as the factors are to meet it (see `apart`); None for ``x`` itself.
        given: The update, where it was computed with those of other weights (see `siblings`).
    """
    met = meeting(x.ndim, value.w.ndim, dimension_numbers, weight_on_left, precision)
    out = met.out
    named, gain = _gained_input(Named(x, met.dims), value.gain, out)
    settings = {"precision": met.precision, "dtype": dtype}
    work, way = chosen(named, value, out, execution, **settings)

    def update(x: Any, term: LowRank, like: Any, opaque: bool = False) -> Any:
        return apply_factors(Named(x, met.dims), term, out, **settings, like=like, opaque=opaque).array

    if way == "fused":
        y = fused.product(named.array, value, base=base, update=update)
        return Product(gained(y, gain, out), work.base, work.forming, _bytes(value.w), "fused")
    y = base(value.w, named.array)
    made = sum(low_rank_bytes(named, term, out, y) for term in value.terms())
    own = named if apart is None else _gained_input(Named(apart, met.dims), value.gain, out)[0]
    for term in value.terms():
        y = y + (update(own.array, term, y, opaque=True) if given is None else given)
    return Product(gained(y, gain, out), work.base, work.low_rank, made)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """How an activation meets a weight in a `dot_general`.

    Attributes:
        dims: The names of the activation's axes: an axis of the weight where they meet, else ``("x", i)``.
        out: The names of the result's axes.
        precision: Of the activation and the weight, in this order.
    """

    dims: tuple[Name, ...]
    out: tuple[Name, ...]
    precision: Any


def meeting(x_ndim: int, w_ndim: int, dimension_numbers: Any, weight_on_left: bool, precision: Any) -> Meeting:
    """The `Meeting` of operands with so many axes; arguments as in `dot`."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    x_sum, w_sum = (rhs_sum, lhs_sum) if weight_on_left else (lhs_sum, rhs_sum)
    x_batch, w_batch = (rhs_batch, lhs_batch) if weight_on_left else (lhs_batch, rhs_batch)
    if not w_sum:
        raise NotFactored("an outer product sums no axis")
    dims: list[Name] = [("x", i) for i in range(x_ndim)]
    for i, d in zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True):
        dims[i] = d
    free_w = [d for d in range(w_ndim) if d not in (*w_sum, *w_batch)]
    free_x = [d for d in dims if isinstance(d, tuple)]
    out = (*w_batch, *free_w, *free_x) if weight_on_left else (*w_batch, *free_x, *free_w)
    reverse = weight_on_left and isinstance(precision, tuple)
    return Meeting(tuple(dims), out, precision[::-1] if reverse else precision)


def chosen(
    x: Named, value: LowRank, out: Sequence[Name], execution: str, *, precision: Any, dtype: Any
) -> tuple[Work, str]:
    """The work of a product each way, and which way it takes."""
    extra = sum(low_rank_flops(x, term, out) for term in value.terms())
    flops = multiply_flops(x, Named(value.w, tuple(range(value.w.ndim))))
    work = Work(flops, extra, 2 * value.w.size * value.factors[0].size(RANK))
    if len(value.factors) > 2 or value.key is not None or not value.fusible:
        return work, "factored"
    dtypes = (value.w.dtype, x.array.dtype, dtype or x.array.dtype)
    return work, choose(execution, work, dtypes=dtypes, precision=precision)


def gained(y: Any, gain: Named | None, dims: Sequence[Name]) -> Any:
    """``y``, with axes called ``dims``, times ``gain`` (DoRA): in float32 or wider, rounded once."""
    if gain is None:
        return y
    wide = at_least_float32(y.dtype)
    return (y.astype(wide) * lying_as(gain.spread(dims), y).astype(wide)).astype(y.dtype)


def _gained_input(x: Named, gain: Named | None, out: Sequence[Name]) -> tuple[Named, Named | None]:
    """``x`` times the gain where the product sums the gain's axes (a tied head), and what is left for the result."""
    if gain is None or set(gain.dims) <= set(out):
        return x, gain
    if not set(gain.dims) <= set(x.dims):
        raise NotFactored("a product that sums some of the axes of a DoRA magnitude")
    return Named(gained(x.array, gain, x.dims), x.dims), None


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
    touched = addressed(value, dimension_numbers, slice_sizes, options["mode"])
    found = look_up(
        value, indices, dimension_numbers=dimension_numbers, slice_sizes=slice_sizes, base=base, options=options
    )
    if all(touched <= {*x.dims} for x in value.factors):  # only stack axes are addressed
        return found
    y, flops, made = base, 0, 0
    for term in found.terms():
        a, b = (cast(x, base.dtype) for x in complete(term).factors)
        y = y + multiply(a, b, range(base.ndim)).array
        flops += multiply_flops(a, b)
        made += _bytes(a.array) + _bytes(y)
    return Product(gained(y, found.gain, range(base.ndim)), 0, flops, made)


def addressed(
    value: LowRank, numbers: lax.GatherDimensionNumbers, slice_sizes: Sequence[int], mode: lax.GatherScatterMode
) -> set[int]:
    """The axes along which a look-up chooses. What is taken whole is no choice, unless it may be out of bounds."""
    strict = mode == lax.GatherScatterMode.FILL_OR_DROP
    return {d for d in numbers.start_index_map if strict or slice_sizes[d] != value.shape[d]}


def look_up(
    value: LowRank,
    indices: Any,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    base: Any,
    options: dict[str, Any],
) -> LowRank:
    """The look-up itself, in each factor that has an axis it addresses. Arguments as in `gather`."""
    numbers = dimension_numbers
    batch: list[Name] = [("i", j) for j in range(indices.ndim - 1)]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = iter(d for d in range(value.w.ndim) if d not in gone)
    spread = iter(batch)
    places: dict[Name, Name] = {
        next(kept) if position in numbers.offset_dims else next(spread): position for position in range(base.ndim)
    }

    chosen = addressed(value, numbers, slice_sizes, options["mode"])

    def follow(x: Named) -> Named:
        return _gather_factor(x, indices, numbers, chosen, slice_sizes, batch, options).renamed(places)

    if value.probe or not _fills(options):
        return value.with_parts([follow(x) for x in value.parts], w=base)
    pairs = (complete(single, chosen).factors for single in value.terms())  # zero where the look-up fills
    gain = value.gain
    if gain is not None:  # and one
        inside = follow(Named(jnp.ones([value.shape[d] for d in chosen], gain.array.dtype), tuple(chosen)))
        gain = follow(gain)
        dims = tuple(dict.fromkeys((*inside.dims, *gain.dims)))
        gain = Named(jnp.where(inside.spread(dims) > 0, gain.spread(dims), 1), dims)
    return dataclasses.replace(value, w=base, factors=tuple(follow(x) for pair in pairs for x in pair), gain=gain)


def _fills(options: dict[str, Any]) -> bool:
    """Whether entries out of bounds are a number of their own: not NaN, to which nothing can be added."""
    filling = options.get("fill_value")
    return options["mode"] == lax.GatherScatterMode.FILL_OR_DROP and filling is not None and filling == filling


def _gather_factor(
    x: Named,
    indices: Any,
    numbers: lax.GatherDimensionNumbers,
    chosen: set[int],
    slice_sizes: Sequence[int],
    batch: Sequence[Name],
    options: dict[str, Any],
) -> Named:
    if options.get("fill_value") is not None:
        options = options | {"fill_value": 0}
    columns = [i for i, d in enumerate(numbers.start_index_map) if d in x.dims and d in chosen]
    paired: dict[Name, int] = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    cut = [d for d in x.dims if d != RANK and d not in paired and slice_sizes[d] != x.size(d)]  # type: ignore[call-overload]
    if not columns and not cut:
        places: dict[Name, Name] = {d: batch[axis] for d, axis in paired.items()}
        return x.dropped([d for d in x.dims if d in numbers.collapsed_slice_dims]).renamed(places)
    x = x.ordered([*sorted(d for d in x.dims if d != RANK), *[RANK] * (RANK in x.dims)])  # type: ignore[type-var]
    collapsed = [d for d in x.dims if d in numbers.collapsed_slice_dims]
    batched = [d for d in x.dims if d in paired]
    kept = [d for d in x.dims if d not in (*collapsed, *batched)]
    array = lax.gather(
        x.array,
        jnp.take(indices, jnp.asarray(columns), axis=-1) if len(columns) < indices.shape[-1] else indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(batch), len(batch) + len(kept))),
            collapsed_slice_dims=tuple(x.axis(d) for d in collapsed),
            start_index_map=tuple(x.axis(numbers.start_index_map[i]) for i in columns),
            operand_batching_dims=tuple(x.axis(d) for d in batched),
            start_indices_batching_dims=tuple(paired[d] for d in batched),
        ),
        slice_sizes=tuple(x.size(d) if d == RANK else slice_sizes[d] for d in x.dims),  # type: ignore[call-overload]
        **options,
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
    if len(value.factors) > 2:
        raise NotFactored("a convolution with a sum of updates")
    out_axis, in_axis, *window = dimension_numbers.rhs_spec
    value = complete(value)
    inner, outer = sorted(value.factors, key=lambda f: out_axis in f.dims)
    if value.gain is not None and value.gain.dims != (out_axis,):
        raise NotFactored("a convolution whose DoRA magnitude is not along the output features")
    if out_axis in inner.dims or set(outer.dims) != {RANK, out_axis}:
        raise NotFactored("a convolution whose window or input features lie in the out axes")
    kind = compute_dtype(x, options.get("preferred_element_type"))
    groups, rank = feature_group_count, inner.size(RANK)
    # The first kernel has the rank as its output features, once for each group of input features.
    first = cast(inner, kind).ordered([d if d != out_axis else RANK for d in range(value.w.ndim)])
    kernel = jnp.concatenate([first.array] * groups, axis=out_axis) if groups > 1 else first.array
    x_kind = dropped_out(Named(x.astype(kind), tuple(range(x.ndim))), value).array
    numbers: Any = dimension_numbers
    again = numbers._replace(lhs_spec=numbers.out_spec)
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
    middle = (echo(middle) if value.watching else middle).astype(kind)
    point = cast(outer, kind).ordered([out_axis if d == out_axis else RANK for d in sorted((in_axis, out_axis))])
    ones = jnp.expand_dims(point.array, tuple(window))
    update = lax.conv_general_dilated(
        middle,
        ones,
        [1] * len(window),
        [(0, 0)] * len(window),
        dimension_numbers=again,
        feature_group_count=groups,
        **shared,
    )
    outputs = base.size // base.shape[dimension_numbers.out_spec[1]]
    taps = math.prod(value.shape[d] for d in (in_axis, *window))
    extra = 2 * outputs * rank * (taps * groups + value.shape[out_axis])
    dims = [out_axis if d == dimension_numbers.out_spec[1] else ("x", d) for d in range(base.ndim)]
    y = gained(base + update.astype(base.dtype), value.gain, dims)
    return Product(y, 2 * base.size * taps, extra, _bytes(middle) + _bytes(base))


def ragged_dot(
    x: Any,
    value: LowRank,
    group_sizes: Any,
    *,
    dimension_numbers: Any,
    base: Any,
    precision: Any = None,
    dtype: Any = None,
) -> Product:
    """`ragged_dot_general` with adapted experts: every row meets the factors of its own group.

    Args:
        x: The activation, its rows sorted by group.
        value: The experts; the group axis is a stack.
        group_sizes: ``[groups]``, the number of rows of each.
        dimension_numbers: A `jax.lax.RaggedDotDimensionNumbers`.
        base: The product with the frozen experts.
        precision: As in `jax.lax.ragged_dot_general`.
        dtype: The ``preferred_element_type``.
    """
    ((x_sum, w_sum), (x_batch, _)) = dimension_numbers.dot_dimension_numbers
    (ragged,), groups = dimension_numbers.lhs_ragged_dimensions, dimension_numbers.rhs_group_dimensions
    if len(value.factors) > 2 or x_batch or len(groups) != 1 or ragged in x_sum:
        raise NotFactored("a ragged product with batch axes, or ragged over a summed axis")
    group = groups[0]
    value = complete(value)
    first, second = sorted(value.factors, key=lambda f: not set(w_sum) <= set(f.dims))
    inner, outer = set(first.dims) - {RANK, group}, set(second.dims) - {RANK, group}
    if value.gain is not None and set(value.gain.dims) != {*range(value.w.ndim)} - {*w_sum}:
        raise NotFactored("experts whose DoRA magnitude is not along their output features")
    if inner != set(w_sum) or inner & outer or not all(group in f.dims for f in value.factors):
        raise NotFactored("experts whose group axis is no stack, or whose in axes are not those summed")
    kind = compute_dtype(x, dtype)
    free = [d for d in range(value.w.ndim) if d not in (group, *w_sum)]

    def product(lhs: Any, factor: Named, lhs_sum: Sequence[int], dims: Sequence[Name], ragged: int) -> Any:
        """``lhs`` times the factor with its axes in the order group, summed, free."""
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=((tuple(lhs_sum), tuple(range(1, 1 + len(lhs_sum)))), ((), ())),
            lhs_ragged_dimensions=(ragged,),
            rhs_group_dimensions=(0,),
        )
        weight = cast(factor, kind).ordered([group, *dims]).array
        return lax.ragged_dot_general(
            lhs, weight, group_sizes, numbers, precision=precision, preferred_element_type=dtype
        )

    dropped = dropped_out(Named(x.astype(kind), tuple(range(x.ndim))), value).array
    middle = product(dropped, first, x_sum, [*w_sum, RANK], ragged)
    middle = (echo(middle) if value.watching else middle).astype(kind)
    moved = ragged - sum(d < ragged for d in x_sum)
    update = product(middle, second, [middle.ndim - 1], [RANK, *free], moved)
    rows, rank = x.size // math.prod(x.shape[d] for d in x_sum), first.size(RANK)
    m, n = math.prod(value.shape[d] for d in w_sum), math.prod(value.shape[d] for d in free)
    y = base + update.astype(base.dtype)
    if value.gain is not None:  # every row takes the gain of its own group
        by_group = value.gain.ordered([group, *free])
        repeated = jnp.repeat(by_group.array, group_sizes, axis=0, total_repeat_length=y.shape[moved])
        dims: list[Name] = [("x", d) for d in range(y.ndim - len(free))]
        dims += free
        y = gained(y, Named(repeated, (("x", moved), *free)), dims)
    return Product(y, 2 * rows * m * n, 2 * rows * rank * (m + n), _bytes(middle) + _bytes(base))
