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
from jax.core import ShapedArray

from lojax.lowrank.factor_product import is_symbolic_zero
from lojax.lowrank.steps import IDENTITY, Step
from lojax.types import Array, Shape


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
        """The weight with steps that compute one entry, or its value where there is no such step."""
        if self.compute.by_entry is None:
            return DenseWeight(self.dense())
        entries = tuple(operand.entries() for operand in self.operands)
        return RecomputedWeight(entries, self.compute.by_entry)

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """``f`` of the value and the operands. For the backward pass, what is stored is saved, and not the value."""
        return recomputed_product(f, self, operands) if operands else f(self.dense())


def is_frozen(value: object) -> TypeGuard[DenseWeight | RecomputedWeight]:
    """Whether ``value`` is a frozen weight by itself, without an update."""
    return isinstance(value, (DenseWeight, RecomputedWeight))


def recomputed(weight: FrozenWeight) -> RecomputedWeight:
    """``weight`` in the form that puts off all that is done to it."""
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
