"""The frozen weight ``W0``: the one protocol through which every product and every carrier meets it.

An adapted weight holds its ``W0`` as a `FrozenWeight` and never as a bare array. Today there is one kind,
`DenseWeight`. A weight that is stored in another form (quantized, or computed again from other leaves) is one more
class with the same five members: nothing else in the engine would change.
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
        """The weight ``f(value)``, for what moves, casts or cuts the value: a *carrier*."""
        ...

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """``f(value, *operands)``, for what multiplies the value with an activation.

        A weight that is stored in another form runs ``f`` on its dense value for the moment, and again in the
        backward pass: only what is stored is kept.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseWeight:
    """A frozen weight that is stored as it is used: an array."""

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
