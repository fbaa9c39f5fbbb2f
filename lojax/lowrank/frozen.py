"""The frozen weight ``W0``: the one protocol through which every product and every carrier uses it.

A weight is stored as an array (`DenseWeight`), or is computed from what is stored (`RecomputedWeight`): a cast, a
dequantization, any chain of cheap operations on frozen arrays. Plain automatic differentiation of ``x @ cast(w)``
saves the result of the cast for the backward pass, an array of the size of the weight for every layer. A recomputed
weight saves what is stored, which is an argument of the program anyway, and computes the chain once more in the
backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

from lojax.lowrank import steps
from lojax.lowrank.factor_product import is_symbolic_zero
from lojax.lowrank.steps import IDENTITY, Step
from lojax.quantized.formats import Format
from lojax.quantized.quantized import Quantized
from lojax.types import Array, Dtype, Shape


class FrozenWeight(Protocol):
    """A frozen weight, a pytree node whose leaves are what is stored."""

    @property
    def aval(self) -> Any:
        """The type of the value: its shape, dtype and sharding."""
        ...

    @property
    def shape(self) -> Shape:
        """The shape of the value."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        ...

    def dense(self) -> Array:
        """The value itself."""
        ...

    def map(self, f: Callable[[Array], Array]) -> FrozenWeight:
        """The weight ``f(value)``, for an ``f`` that moves, casts or slices the value: a *carrier*."""
        ...

    def entries(self) -> FrozenWeight:
        """A weight whose leaves all have the first axis of the value, for a loop over the entries along that axis.

        With each leaf cut to one entry of its first axis, it is that entry of the value.
        """
        ...

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """``f(value, *operands)``, for an ``f`` that is linear in the operands."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseWeight:
    """A frozen weight that is stored as an array."""

    array: Any  # an array; in the specs of a shard_map a PartitionSpec

    @property
    def aval(self) -> Any:
        """The type of the array."""
        return jax.typeof(self.array)

    @property
    def shape(self) -> Shape:
        """The shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.array.dtype

    def dense(self) -> Array:
        """The array."""
        return self.array

    def map(self, f: Callable[[Array], Array]) -> DenseWeight:
        """``f`` of the array, as a weight."""
        return DenseWeight(f(self.array))

    def entries(self) -> DenseWeight:
        """The weight itself."""
        return self

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """``f`` of the array and the operands."""
        return f(self.array, *operands)


# --- weights that are computed from what is stored ---


@functools.lru_cache(maxsize=4096)
def _result_type(compute: Step, operands: tuple[ShapedArray, ...]) -> Any:
    return jax.eval_shape(compute, *operands)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecomputedWeight:
    """A frozen weight that is computed from others, at each use anew.

    Attributes:
        operands: What it is computed from.
        compute: The last step of the computation, from the values of the operands.
    """

    operands: tuple[Any, ...]  # of FrozenWeight
    compute: Step = dataclasses.field(metadata={"static": True})

    @property
    def aval(self) -> Any:
        """The type of the value."""
        return _result_type(self.compute, tuple(operand.aval for operand in self.operands))

    @property
    def shape(self) -> Shape:
        """The shape of the value."""
        return self.aval.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        return self.aval.dtype

    def dense(self) -> Array:
        """The value, computed."""
        return self.compute(*(operand.dense() for operand in self.operands))

    @property
    def stored_bytes(self) -> int:
        """The bytes of what is stored."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def map(self, f: Callable[[Array], Array]) -> FrozenWeight:
        """``f`` of the value: one more step if ``f`` is a `Step`, else an array."""
        return RecomputedWeight((self,), f) if isinstance(f, Step) else DenseWeight(f(self.dense()))

    def entries(self) -> FrozenWeight:
        """The weight with steps for one entry, or its value as an array if a step has no form for one entry."""
        if self.compute.by_entry is None:
            return DenseWeight(self.dense())

        def entries_of(operand: FrozenWeight) -> FrozenWeight:
            if operand.shape[:1] == self.shape[:1]:
                return operand.entries()
            # A scalar, or an array that repeats along the first axis: once for each entry.
            return DenseWeight(jnp.broadcast_to(operand.dense(), (self.shape[0], *operand.shape[1:])))

        return RecomputedWeight(tuple(map(entries_of, self.operands)), self.compute.by_entry)

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """``f`` of the value and the operands. For the backward pass, what is stored is saved, and not the value."""
        return recomputed_product(f, self, operands) if operands else f(self.dense())


def frozen_weight(leaf: Array | Quantized) -> FrozenWeight:
    """A frozen leaf of a parameter tree as a weight."""
    if not isinstance(leaf, Quantized):
        return DenseWeight(leaf)
    format, shape = leaf.format, leaf.shape
    names = tuple(sorted(leaf.arrays.keys() - {"codes"}))
    stored = tuple(DenseWeight(leaf.arrays[name]) for name in names)
    decode = _decoding(format, names, format.leading_of_scales(shape))
    dequantize = _dequantization(format, shape, leaf.dtype, format.leading(shape))
    return RecomputedWeight((DenseWeight(leaf.arrays["codes"]), RecomputedWeight(stored, decode)), dequantize)


def _decoding(format: Format, names: tuple[str, ...], leading: int) -> Step:
    """The decoding of scales from arrays that have ``leading`` of the weight's axes."""
    entry = _decoding(format, names, leading - 1) if leading > 0 else None
    return Step(_decode_scales, (("format", format), ("names", names)), entry=entry)


def _decode_scales(*arrays: Array, format: Format, names: tuple[str, ...]) -> Array:
    return format.decode_scales(dict(zip(names, arrays, strict=True)))


def _dequantization(format: Format, shape: Shape, dtype: Dtype, leading: int) -> Step:
    """The dequantization of a weight whose codes and scales have ``leading`` of its axes."""
    entry = _dequantization(format, shape[1:], dtype, leading - 1) if leading > 0 else None
    return Step(_dequantize, (("format", format), ("shape", shape), ("dtype", dtype)), entry=entry)


def _dequantize(codes: Array, scales: Array, *, format: Format, shape: Shape, dtype: Dtype) -> Array:
    return format.dequantize(codes, scales, shape, dtype)


def slice_entry(weight: FrozenWeight, index: Array | int, f: Callable[[Array], Array]) -> FrozenWeight:
    """One entry along the first axis, as an axis of length one; of a recomputed weight, only that entry is computed.

    Args:
        weight: The weight.
        index: The entry; one out of bounds is the nearest within.
        f: ``f(value)`` is that slice of the value.
    """
    entries = weight.entries() if isinstance(weight, RecomputedWeight) else weight
    if not isinstance(entries, RecomputedWeight):
        return weight.map(f)
    # The entries of what is stored are picked at each use as well: picked here, they would be saved, as copies.
    number = DenseWeight(jnp.asarray(index))
    one = jax.tree.map(
        lambda stored: RecomputedWeight((stored, number), Step(_pick)),
        entries,
        is_leaf=lambda node: isinstance(node, DenseWeight),
    )
    return one.map(steps.broadcast(one.shape, (1, *one.shape), range(1, len(one.shape) + 1)))


def _pick(x: Array, index: Array) -> Array:
    return lax.squeeze(lax.dynamic_slice_in_dim(x, jnp.clip(index, 0, x.shape[0] - 1), 1), (0,))


def is_frozen(value: object) -> TypeGuard[DenseWeight | RecomputedWeight]:
    """Whether ``value`` is a frozen weight by itself, without an update."""
    return isinstance(value, (DenseWeight, RecomputedWeight))


def recomputed(weight: FrozenWeight) -> RecomputedWeight:
    """``weight`` in the form that defers all that is done to it."""
    return weight if isinstance(weight, RecomputedWeight) else RecomputedWeight((weight,), IDENTITY)


def recomputed_product(f: Callable[..., Array], weight: RecomputedWeight, operands: Sequence[Array]) -> Array:
    """``f(weight, *operands)``, linear in the operands; its derivative computes the weight anew.

    A rule for tangents, so `jvp`, `vmap`, `scan`, `remat` and second derivatives follow from it. The weight is frozen:
    it has no tangent.
    """

    @jax.custom_jvp
    def product(weight: RecomputedWeight, *operands: Array) -> Array:
        return f(weight.dense(), *operands)

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        # In the open: a remat policy that saves products is to see and save this one.
        y = f(primals[0].dense(), *primals[1:])
        moving = {i: dot for i, dot in enumerate(tangents) if i and not is_symbolic_zero(dot)}
        if not moving:
            return y, jnp.zeros_like(y)

        # The derivative along one operand has the others in it, and not that operand: an activation that is alone with
        # the weight is not saved.
        others = {i: x for i, x in enumerate(primals) if i and any(i != j for j in moving)}

        # The barrier of `jax.checkpoint` keeps XLA from saving the value after all: without it, the two computations
        # of the weight are one to XLA.
        @jax.checkpoint
        def tangent(weight: RecomputedWeight, others: dict[int, Array], moving: dict[int, Array]) -> Array:
            w, count = weight.dense(), len(others.keys() | moving.keys())

            def along(i: int, dot: Array) -> Array:
                return f(w, *(dot if i == j else others[j] for j in range(1, count + 1)))

            first, *rest = (along(i, dot) for i, dot in moving.items())
            return functools.reduce(jnp.add, rest, first)

        return y, tangent(primals[0], others, moving)

    return product(weight, *operands)
