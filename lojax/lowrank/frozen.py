"""The frozen weight ``W0``: the one protocol through which every product and every carrier uses it.

The ``W0`` of an adapted weight is a `FrozenWeight`, never a bare array. Today there is one class, `DenseWeight`. A
weight that is stored in another form (quantized, or computed from other leaves) would be one more class with the same
five members; nothing else in the engine would change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax

from lojax.types import Array, Shape


class FrozenWeight(Protocol):
    """A frozen weight, a pytree node whose leaves are what is stored."""

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

    def map(self, f: Callable[[Array], Array]) -> Self:
        """The weight ``f(value)``, for an ``f`` that moves, casts or slices the value: a *carrier*."""
        ...

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """``f(value, *operands)``, for an ``f`` that multiplies the value with an activation.

        A weight that is stored in another form materializes its value as a temporary, once here and once more in the
        backward pass, so that only the stored form is saved.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseWeight:
    """A frozen weight that is stored as an array."""

    array: Any  # an array; in the specs of a shard_map a PartitionSpec

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

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """``f`` of the array and the operands."""
        return f(self.array, *operands)
