"""Low-rank values combined with other arrays: concatenated, selected by an index, scaled by channel, padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import jax.numpy as jnp
from jax import lax

from lojax.lowrank.frozen import DenseWeight, FrozenWeight
from lojax.lowrank.named_array import RANK, Name, NamedArray, cast
from lojax.lowrank.value import PATH_SEPARATOR, LowRank, NotFactored, Term
from lojax.types import Array, Path, Shape

Operand = LowRank | Array


def combine_frozen(f: Callable[..., Array], operands: Sequence[Operand]) -> FrozenWeight:
    """``f`` of the frozen parts of ``operands``, some of them plain arrays."""
    return DenseWeight(f(*(v.frozen.dense() if isinstance(v, LowRank) else v for v in operands)))


def concatenate(values: Sequence[Operand], frozen: FrozenWeight, axis: int) -> LowRank:
    """Weights side by side along ``axis``, some of them plain arrays.

    The ranks add up: ``x @ [W1 | W2] = x @ [w1 | w2] + (x @ [a1 | a2]) @ diag(b1, b2)``. Along a stack
    axis, the updates are stacked too, and smaller ranks are padded with zeros.
    """
    lows = [v for v in values if isinstance(v, LowRank)]
    if lows[0].probe:
        return _combine_probes(lows, frozen)
    if any(len(v.terms) != 1 or v.dropout is not None or v.gain is not None for v in lows):
        raise NotFactored("a concatenation of sums of updates, under dropout, or with DoRA")
    pairs = [_with_axis(v.terms[0], axis, v.shape) if isinstance(v, LowRank) else None for v in values]
    has_axis = [tuple(axis in x.dims for x in pair) for pair in pairs if pair is not None]
    if len(set(has_axis)) != 1:
        raise NotFactored("a concatenation of an in axis with an out axis")
    if len({tuple(frozenset(x.dims) for x in pair) for pair in pairs if pair is not None}) != 1:
        raise NotFactored("a concatenation of weights whose updates have different forms")
    # Each weight has a block of the ranks to itself. In the factor that has ``axis``, the block of one weight is zero
    # along the entries of the others; the other factor has the blocks side by side, without zeros: a product is zero if
    # one of its factors is. In a stack each entry has its own two factors, so all blocks start at rank 0, and the
    # padding of the smaller ones is zero in both.
    ranks = [0 if pair is None else pair[0].size(RANK) for pair in pairs]
    stacked = has_axis[0] == (True, True)
    total = max(ranks) if stacked else sum(ranks)
    starts = [0 if stacked else sum(ranks[:i]) for i in range(len(ranks))]
    dtype = jnp.result_type(*(x.array.dtype for v in lows for x in v.terms[0]))

    def join(i: int) -> NamedArray:
        """The ``i``-th factor of the concatenation."""
        dims = next(pair[i].dims for pair in pairs if pair is not None)
        blocks = []
        for v, pair, start in zip(values, pairs, starts, strict=True):
            if pair is not None:
                x = cast(pair[i], dtype).transpose_to(dims)
                blocks.append(_pad_rank(x, start, total) if has_axis[0][i] else x.array)
            elif has_axis[0][i]:
                # A plain array has no update, and no rank to itself: zeros along its entries.
                shape = [total if d == RANK else jnp.shape(v)[d] for d in dims]  # type: ignore[call-overload, arg-type]
                blocks.append(jnp.zeros(shape, dtype))
        return NamedArray(jnp.concatenate(blocks, dims.index(axis if has_axis[0][i] else RANK)), dims)

    return dataclasses.replace(lows[0], frozen=frozen, terms=((join(0), join(1)),), path=_join_paths(lows))


def _with_axis(term: Term, axis: int, shape: Shape) -> Term:
    """``term``, where an ``axis`` that neither factor has becomes a stack: an axis of both."""
    if any(axis in x.dims for x in term):
        return term
    return tuple(x.broadcast_axis(axis, shape[axis]) for x in term)


def _pad_rank(x: NamedArray, start: int, total: int) -> Array:
    """The array of a factor with ``total`` ranks: its own from ``start`` on, zeros elsewhere."""
    padding = [(0, 0, 0)] * x.array.ndim
    padding[x.axis(RANK)] = (start, total - start - x.size(RANK), 0)
    return lax.pad(x.array, jnp.zeros((), x.array.dtype), padding)


def add(left: LowRank, right: LowRank, frozen: FrozenWeight) -> LowRank:
    """The sum of two weights of equal shape: one weight with the updates of both as its terms."""
    if left.probe:
        return _combine_probes([left, right], frozen)
    plain = all(v.dropout is None and v.gain is None and not v.tap for v in (left, right))
    if not plain or left.shape != right.shape:
        raise NotFactored("a sum of two adapted weights of different shapes, under dropout, or with DoRA")
    terms = (*left.terms, *right.terms)
    return dataclasses.replace(left, frozen=frozen, terms=terms, path=_join_paths([left, right]))


def select(
    cases: Sequence[Operand],
    frozen: FrozenWeight,
    axes: Sequence[int],
    pick: Callable[[Sequence[Array], Sequence[Name]], Array],
) -> LowRank:
    """One of ``cases``, some of them plain arrays, by an index that varies along ``axes`` of the value only.

    The ranks add up, as in `concatenate`: every update is there, with zeros in one factor where another case is picked.

    Args:
        cases: The values to pick from.
        frozen: The choice among the frozen parts.
        axes: The axes along which the index varies. One factor must have all of those that either has.
        pick: ``pick(arrays, dims)``, the choice among arrays with axes ``dims``.
    """
    lows = [v for v in cases if isinstance(v, LowRank)]
    first = lows[0]
    if first.probe:
        return _combine_probes(lows, frozen)
    alike = len({_form(v) for v in lows}) == 1 and not first.tap
    if not alike or (len(lows) < len(cases) and first.gain is not None):
        raise NotFactored("a choice between weights whose updates have different forms")

    def mask(case: int, x: NamedArray, new_axes: Sequence[int]) -> Array:
        """``x`` where ``case`` is picked, zero elsewhere."""
        x = _broadcast_axes(x, new_axes, frozen.shape)
        return pick([x.array if i == case else jnp.zeros_like(x.array) for i in range(len(cases))], x.dims)

    terms = []
    for t, term in enumerate(first.terms):
        holder = _factor_along(term, axes)
        factors = []
        for j, factor in enumerate(term):
            dims = factor.dims
            # Only one factor is masked: zeros in it are enough, and the other factor may lack the axes of the index.
            new_axes = [d for d in axes if d not in dims] if j == holder else []
            aligned = [(k, v.terms[t][j].transpose_to(dims)) for k, v in enumerate(cases) if isinstance(v, LowRank)]
            arrays = [mask(k, x, new_axes) if j == holder else x.array for k, x in aligned]
            factors.append(NamedArray(jnp.concatenate(arrays, dims.index(RANK)), (*dims, *new_axes)))
        terms.append(tuple(factors))
    gain = first.gain
    if gain is not None:
        new_axes = [d for d in axes if d not in gain.dims]
        gains = [_broadcast_axes(v.gain.transpose_to(gain.dims), new_axes, frozen.shape) for v in lows if v.gain]
        gain = NamedArray(pick([x.array for x in gains], gains[0].dims), gains[0].dims)
    return dataclasses.replace(
        first,
        frozen=frozen,
        terms=tuple(terms),
        gain=gain,
        path=_join_paths(lows),
        fusible=all(v.fusible for v in lows),
    )


def scale_by_channel(value: LowRank, frozen: FrozenWeight, by: NamedArray) -> LowRank:
    """The value times an array that varies along some of its axes: the factor that has these axes is multiplied."""
    if value.probe:
        return value.with_frozen(frozen)
    axes: list[int] = list(by.dims)  # type: ignore[arg-type]
    terms = []
    for term in value.terms:
        factors, holder = list(term), _factor_along(term, axes)
        x = _broadcast_axes(factors[holder], [d for d in axes if d not in factors[holder].dims], value.shape)
        factors[holder] = NamedArray(x.array * by.broadcastable(x.dims).astype(x.array.dtype), x.dims)
        terms.append(tuple(factors))
    return dataclasses.replace(value, frozen=frozen, terms=tuple(terms))


def pad(value: LowRank, frozen: FrozenWeight, config: Sequence[tuple[int, int, int]]) -> LowRank:
    """The value padded along each axis by ``config`` (low, high, interior): the update by zero, the gain by one."""
    padded_axes = [d for d, amounts in enumerate(config) if any(amounts)]

    def pad_array(x: NamedArray, fill: float, repeated_axes: Sequence[int]) -> NamedArray:
        x = _broadcast_axes(x, repeated_axes, value.shape)
        amounts = [(0, 0, 0) if d == RANK else config[d] for d in x.dims]  # type: ignore[call-overload]
        return NamedArray(lax.pad(x.array, jnp.asarray(fill, x.array.dtype), amounts), x.dims)

    def pad_term(term: Term) -> Term:
        # Where the update repeats along a padded axis, one factor takes the axis on: zeros in one are enough.
        repeated = [] if value.probe else [d for d in padded_axes if not any(d in x.dims for x in term)]
        return tuple(pad_array(x, 0.0, repeated if x is term[-1] else []) for x in term)

    gain = value.gain
    if gain is not None:
        # Padding writes its fill value into the frozen part, and the gain is to leave that as it is.
        gain = pad_array(gain, 1.0, [d for d in padded_axes if d not in gain.dims])
    return dataclasses.replace(value, frozen=frozen, terms=tuple(pad_term(term) for term in value.terms), gain=gain)


def _factor_along(term: Term, axes: Sequence[int]) -> int:
    """The position of a factor that can vary along ``axes`` without an axis that only the other factor has."""
    for i in (1, 0):
        if all(d in term[i].dims or d not in term[1 - i].dims for d in axes):
            return i
    raise NotFactored("a choice or a scale that differs from element to element of the weight")


def _form(value: LowRank) -> Hashable:
    """What two values must have in common to be cases of one choice."""
    rate = None if value.dropout is None else value.dropout.rate
    return tuple(frozenset(x.dims) for x in value.named_arrays), (value.gain is None, value.gain_on_update), rate


def _broadcast_axes(x: NamedArray, names: Sequence[int], shape: Sequence[int]) -> NamedArray:
    for name in names:
        x = x.broadcast_axis(name, shape[name])
    return x


def _join_paths(values: Sequence[LowRank]) -> Path:
    return PATH_SEPARATOR.join(dict.fromkeys(v.path for v in values))


def _combine_probes(probes: Sequence[LowRank], frozen: FrozenWeight) -> LowRank:
    """One probe of several weights, whose axes must be in the same positions."""
    if len({tuple(x.dims for term in v.terms for x in term) for v in probes}) > 1:
        raise NotFactored("weights whose axes are in different places")
    factors = [
        NamedArray(jnp.ones([1 if d == RANK else frozen.shape[d] for d in x.dims]), x.dims)  # type: ignore[call-overload]
        for x in probes[0].terms[0]
    ]
    return dataclasses.replace(probes[0], frozen=frozen, terms=(tuple(factors),), path=_join_paths(probes))
