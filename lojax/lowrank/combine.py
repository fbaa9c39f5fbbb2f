"""Low-rank values joined with other arrays: side by side, one of them by an index, scaled by channel, padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lojax.lowrank.named_array import RANK, Name, Named, cast
from lojax.lowrank.value import SIDE_BY_SIDE, LowRank, NotFactored


def concatenate(values: Sequence[Any], w: Any, axis: int) -> LowRank:
    """Weights side by side along ``axis``, some of them plain arrays.

    The ranks add up: ``x @ [W1 | W2] = x @ [w1 | w2] + (x @ [a1 | a2]) @ diag(b1, b2)``. Along a stack
    axis, the updates are stacked too, the smaller ranks padded with zeros.
    """
    lows = [v for v in values if isinstance(v, LowRank)]
    if lows[0].probe:
        return _probed(lows, w)
    if any(len(v.factors) != 2 or v.rate or v.gain is not None for v in lows):
        raise NotFactored("a concatenation of sums of updates, under dropout, or with DoRA")
    along = [tuple(axis in x.dims for x in complete_units(v, axis).factors) for v in lows]
    if len(set(along)) != 1:
        raise NotFactored("a concatenation of an in axis with an out axis")
    ranks = [v.factors[0].size(RANK) if isinstance(v, LowRank) else 0 for v in values]
    total, stacked = (max(ranks), True) if along[0] == (True, True) else (sum(ranks), False)
    dtype = jnp.result_type(*(x.array.dtype for v in lows for x in v.factors))
    factors = []
    for i in (0, 1):
        dims = next(complete_units(v, axis).factors[i].dims for v in lows)
        blocks, before = [], 0
        for v, rank in zip(values, ranks, strict=True):
            start = 0 if stacked else before
            before += rank
            if isinstance(v, LowRank):
                x = cast(complete_units(v, axis).factors[i], dtype).ordered(dims)
                blocks.append(_padded_rank(x, start, total) if along[0][i] else x.array)
            elif along[0][i]:
                shape = [total if d == RANK else jnp.shape(v)[d] for d in dims]  # type: ignore[call-overload]
                blocks.append(jnp.zeros(shape, dtype))
        position = dims.index(axis if along[0][i] else RANK)
        factors.append(Named(jnp.concatenate(blocks, position), dims))
    return dataclasses.replace(lows[0], w=w, factors=tuple(factors), path=_paths(lows))


def complete_units(value: LowRank, axis: int) -> LowRank:
    """The same value; an ``axis`` of neither factor becomes one of both, a stack."""
    if any(axis in x.dims for x in value.factors):
        return value
    return dataclasses.replace(value, factors=tuple(x.extended(axis, value.shape[axis]) for x in value.factors))


def _padded_rank(x: Named, start: int, total: int) -> Any:
    """The array of a factor with its ranks at ``start`` of ``total``, zeros elsewhere."""
    room = [(0, 0, 0)] * x.array.ndim
    room[x.axis(RANK)] = (start, total - start - x.size(RANK), 0)
    return lax.pad(x.array, jnp.zeros((), x.array.dtype), room)


def select(
    cases: Sequence[Any], w: Any, axes: Sequence[int], pick: Callable[[Sequence[Any], Sequence[Name]], Any]
) -> LowRank:
    """One of ``cases``, some of them plain arrays, by an index that varies along ``axes`` of the value only.

    The ranks add up, as in `concatenate`: every update is there, with zeros in one factor where another is picked.

    Args:
        cases: What may be picked.
        w: What the frozen parts give.
        axes: The axes along which the index varies. One factor must have them all, but for those that neither has.
        pick: ``pick(arrays, dims)``, the choice among arrays with axes ``dims``.
    """
    lows = [v for v in cases if isinstance(v, LowRank)]
    first = lows[0]
    if first.probe:
        return _probed(lows, w)
    alike = len({_form(v) for v in lows}) == 1 and not first.watching
    if not alike or (len(lows) < len(cases) and first.gain is not None):
        raise NotFactored("a choice between weights whose updates are not alike")

    def masked(k: int, i: int, new: Sequence[int]) -> Any:
        x = _extended(cases[k].factors[i].ordered(first.factors[i].dims), new, w.shape)
        return pick([x.array if case == k else jnp.zeros_like(x.array) for case in range(len(cases))], x.dims)

    factors = []
    for i in range(0, len(first.factors), 2):
        held = i + _holder([x.dims for x in first.factors[i : i + 2]], axes)
        for j in (i, i + 1):
            dims = first.factors[j].dims
            new = [d for d in axes if d not in dims] if j == held else []
            arrays = [
                masked(k, j, new) if j == held else v.factors[j].ordered(dims).array
                for k, v in enumerate(cases)
                if isinstance(v, LowRank)
            ]
            factors.append(Named(jnp.concatenate(arrays, dims.index(RANK)), (*dims, *new)))
    gain = first.gain
    if gain is not None:
        gains = [_extended(v.gain.ordered(gain.dims), [d for d in axes if d not in gain.dims], w.shape) for v in cases]
        gain = Named(pick([x.array for x in gains], gains[0].dims), gains[0].dims)
    return dataclasses.replace(
        first, w=w, factors=tuple(factors), gain=gain, path=_paths(lows), fusible=all(v.fusible for v in lows)
    )


def scaled(value: LowRank, w: Any, by: Named) -> LowRank:
    """The value times an array that varies along some of its axes, which goes on the factor that has them."""
    if value.probe:
        return value.with_w(w)
    factors = list(value.factors)
    for i in range(0, len(factors), 2):
        held = i + _holder([x.dims for x in factors[i : i + 2]], by.dims)  # type: ignore[arg-type]
        x = _extended(factors[held], [d for d in by.dims if d not in factors[held].dims], value.shape)  # type: ignore[misc]
        factors[held] = Named(x.array * by.spread(x.dims).astype(x.array.dtype), x.dims)
    return dataclasses.replace(value, w=w, factors=tuple(factors))


def padded(value: LowRank, w: Any, room: Sequence[tuple[int, int, int]]) -> LowRank:
    """The value with ``room`` (low, high, interior) along each axis, where the update is zero and the gain one."""
    new = [d for d, amounts in enumerate(room) if any(amounts)]

    def padding(x: Named, filling: float) -> Named:
        amounts = [(0, 0, 0) if d == RANK else room[d] for d in x.dims]  # type: ignore[call-overload]
        return Named(lax.pad(x.array, jnp.asarray(filling, x.array.dtype), amounts), x.dims)

    parts: list[Named] = []
    for i in range(0, len(value.factors), 2):
        pair = value.factors[i : i + 2]
        repeated = [] if value.probe else [d for d in new if not any(d in x.dims for x in pair)]
        parts += [padding(_extended(x, repeated if x is pair[-1] else [], value.shape), 0.0) for x in pair]
    if value.gain is not None:
        repeated = [d for d in new if d not in value.gain.dims]
        parts.append(padding(_extended(value.gain, repeated, value.shape), 1.0))
    return value.with_parts(parts, w=w)


def _holder(dims: Sequence[Sequence[Name]], axes: Sequence[int]) -> int:
    """Which of two factors can vary along ``axes`` without taking on an axis of the other."""
    for held in (1, 0):
        if all(d in dims[held] or d not in dims[1 - held] for d in axes):
            return held
    raise NotFactored("a choice or scale by element of the weight")


def _form(value: LowRank) -> Any:
    """What two values must have in common for one to stand where the other may."""
    return tuple(frozenset(x.dims) for x in value.parts), value.gain is None, value.rate


def _extended(x: Named, names: Sequence[int], shape: Sequence[int]) -> Named:
    for name in names:
        x = x.extended(name, shape[name])
    return x


def _paths(values: Sequence[LowRank]) -> str:
    return SIDE_BY_SIDE.join(dict.fromkeys(v.path for v in values))


def _probed(probes: Sequence[LowRank], w: Any) -> LowRank:
    """Probes whose axes lie alike, as one of all their weights."""
    if len({tuple(x.dims for x in v.factors) for v in probes}) > 1:
        raise NotFactored("weights whose axes lie unlike each other")
    factors = [
        Named(jnp.ones([1 if d == RANK else w.shape[d] for d in x.dims]), x.dims)  # type: ignore[call-overload]
        for x in probes[0].factors
    ]
    return dataclasses.replace(probes[0], w=w, factors=tuple(factors), path=_paths(probes))
