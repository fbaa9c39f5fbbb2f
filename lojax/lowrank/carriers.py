"""Carriers: functions from one low-rank value to another that do not materialize the update.

Every carrier maps the axes of the value, and does the same to each factor on the axes that it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lojax.lowrank import steps
from lojax.lowrank.frozen import FrozenWeight
from lojax.lowrank.named_array import RANK, Name, NamedArray
from lojax.lowrank.value import LowRank, NotFactored
from lojax.types import Array

Groups = list[tuple[list[int], list[int]]]
"""Runs of old axes, each with the run of new axes that it becomes in a reshape."""


def map_arrays(value: LowRank, f: Callable[[Array], Array]) -> LowRank:
    """``f`` of every array of the value: the frozen part, the factors, and the gain."""
    return value.carry(f, lambda x: NamedArray(f(x.array), x.dims))


def transpose(value: LowRank, permutation: Sequence[int]) -> LowRank:
    """The axes in another order."""
    names = {old: new for new, old in enumerate(permutation)}
    return value.carry(steps.transpose(permutation), lambda x: x.rename(names))


def squeeze(value: LowRank, dimensions: Sequence[int]) -> LowRank:
    """The value without ``dimensions``, axes of length one."""
    removed = {d % value.ndim for d in dimensions}
    names = {old: new for new, old in enumerate(d for d in range(value.ndim) if d not in removed)}

    def follow(x: NamedArray) -> NamedArray:
        return x.squeeze([d for d in x.dims if d in removed]).rename(names)

    return value.carry(steps.squeeze(sorted(removed)), follow)


def broadcast(value: LowRank, frozen: FrozenWeight, dimensions: Sequence[int]) -> LowRank:
    """Axis ``i`` becomes axis ``dimensions[i]`` of ``frozen``; along the others the value repeats."""
    names = dict(enumerate(dimensions))
    # A factor repeats along every axis that it lacks, so it drops an axis that the broadcast stretches: nothing of the
    # broadcast's size is computed.
    stretched = {i for i, d in enumerate(dimensions) if value.shape[i] != frozen.shape[d]}

    def follow(x: NamedArray) -> NamedArray:
        return x.squeeze([d for d in x.dims if d in stretched]).rename(names)

    return value.with_frozen(frozen).with_named_arrays([follow(x) for x in value.named_arrays])


def slice_axes(
    value: LowRank, f: Callable[[Array], Array], along: Callable[[Array, tuple[int, ...]], Array]
) -> LowRank:
    """A slice of the value along its axes.

    Args:
        value: The value.
        f: Slices the frozen weight.
        along: ``along(array, axes)`` slices an array that has these axes of the value. The axis `RANK` is passed
            as -1, and must not be sliced.
    """

    def follow(x: NamedArray) -> NamedArray:
        return NamedArray(along(x.array, tuple(-1 if d == RANK else d for d in x.dims)), x.dims)  # type: ignore[misc]

    return value.carry(f, follow)


def scale_by_scalar(value: LowRank, frozen: FrozenWeight, factor: Array) -> LowRank:
    """The value times a scalar: every ``b`` is multiplied."""

    def scaled(x: NamedArray) -> NamedArray:
        return NamedArray(x.array * factor.astype(x.array.dtype), x.dims)

    # All of a term but its first factor is b. A probe has a factor for each axis, and its values do not matter.
    terms = tuple((first, *map(scaled, rest)) for first, *rest in value.terms)
    return dataclasses.replace(value, frozen=frozen, terms=terms)


def negate(value: LowRank) -> LowRank:
    """Minus the value."""
    return scale_by_scalar(value, value.frozen.map(lambda w: -w), jnp.asarray(-1.0))


def reshape(value: LowRank, shape: Sequence[int]) -> LowRank:
    """The value in another shape. Axes that merge into one, or that one splits into, must be axes of one factor."""
    groups = reshape_groups(value.shape, shape)
    factor_axes = {d for term in value.terms for x in term for d in x.dims}
    arrays = [_reshape_array(value, x, groups, shape, factor_axes) for term in value.terms for x in term]
    if value.gain is not None:  # it repeats along every axis that it does not have, so it may take on any
        arrays.append(_reshape_array(value, value.gain, groups, shape, set()))
    arrays += [value.mix] if value.mix is not None else []
    return value.map_frozen(steps.reshape(value.shape, shape)).with_named_arrays(arrays)


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> Groups:
    """The finest pairing of runs of old axes with runs of new axes of equal size.

    >>> reshape_groups((512, 8, 64), (512, 512)), reshape_groups((1, 2, 2), (1, 4))
    ([([0], [0]), ([1, 2], [1])], [([0], []), ([], [0]), ([1, 2], [1])])
    """
    if 0 in old:  # every run with that axis has size zero, so equal sizes pair nothing
        raise NotFactored("a reshape of an empty weight")
    groups: Groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        # An axis of length one is a group without an opposite. As part of a longer group it would make a reshape that
        # JAX refuses where axes are sharded over explicit mesh axes.
        if i < len(old) and old[i] == 1:
            groups.append(([i], []))
            i += 1
            continue
        if j < len(new) and new[j] == 1:
            groups.append(([], [j]))
            j += 1
            continue
        left, right = [], []
        size_left = size_right = 1
        while not (left or right) or size_left != size_right:
            # The shorter side takes its next axis until the sizes agree.
            if (size_left <= size_right and i < len(old)) or j >= len(new):
                left.append(i)
                size_left *= old[i]
                i += 1
            else:
                right.append(j)
                size_right *= new[j]
                j += 1
        groups.append((left, right))
    return groups


def _reshape_array(
    value: LowRank, x: NamedArray, groups: Groups, shape: Sequence[int], taken_axes: set[Name]
) -> NamedArray:
    """``x`` in the new shape. It may repeat along axes that it lacks, except ``taken_axes``, those of factors."""
    for left, _ in groups:  # an axis of length one has no entries to move
        x = x.squeeze([d for d in left if d in x.dims and value.shape[d] == 1])
    order: list[Name] = [RANK] * (RANK in x.dims)
    dims: list[Name] = [RANK] * (RANK in x.dims)
    for left, right in groups:
        long_axes = [d for d in left if value.shape[d] != 1]
        absent = [d for d in long_axes if d not in x.dims]
        if not long_axes or len(absent) == len(long_axes):
            continue
        # The merged axis would run over entries of both factors, and no longer belong to one of them: w[i, j] = a[i]
        # b[j] as one vector is not low-rank.
        if taken_axes & {*absent} and not value.probe:
            raise NotFactored("a reshape that merges in axes with out axes")
        for d in absent:
            x = x.broadcast_axis(d, value.shape[d])
        order += long_axes
        dims += right
    lengths: Any = [x.size(RANK) if d == RANK else shape[d] for d in dims]  # type: ignore[index]
    return NamedArray(lax.reshape(x.transpose_to(order).array, lengths), tuple(dims))
