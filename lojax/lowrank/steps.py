"""Steps of a computation that can be static in a pytree: a `RecomputedWeight` is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

from jax import lax

from lojax.types import Array


@dataclasses.dataclass(frozen=True)
class Step:
    """A function of arrays that equals another one if it computes the same.

    Attributes:
        function: A function of arrays and of the options.
        options: The names and values of its options.
        elementwise: Whether it computes each entry of the result from the same entry of its
            operands, which may repeat along axes.
        entry: If it is not elementwise: the step that computes one entry along the first axis of the result from the
            same entry of each operand; None if there is none.
    """

    function: Callable[..., Array]
    options: tuple[tuple[str, Hashable], ...] = ()
    elementwise: bool = False
    entry: Step | None = None

    def __call__(self, *arrays: Array) -> Array:
        """The result of the step."""
        return self.function(*arrays, **dict(self.options))

    @property
    def by_entry(self) -> Step | None:
        """The step that computes one entry along the first axis from one entry of each operand, or None."""
        return self if self.elementwise else self.entry


def _identity(w: Array) -> Array:
    return w


IDENTITY = Step(_identity, elementwise=True)


def transpose(permutation: Sequence[int]) -> Step:
    """`jax.lax.transpose`.

    >>> transpose((0, 2, 1)).by_entry == transpose((1, 0))
    True
    """
    order = tuple(int(d) for d in permutation)
    entry = transpose([d - 1 for d in order[1:]]) if order and order[0] == 0 else None
    return Step(lax.transpose, (("permutation", order),), entry=entry)


def reshape(old: Sequence[int], new: Sequence[int]) -> Step:
    """`jax.lax.reshape`."""
    keeps_first = len(old) > 0 and len(new) > 0 and old[0] == new[0] > 0
    return Step(lax.reshape, (("new_sizes", tuple(new)),), entry=reshape(old[1:], new[1:]) if keeps_first else None)


def squeeze(dimensions: Sequence[int]) -> Step:
    """`jax.lax.squeeze`, of axes that are counted from the front."""
    axes = tuple(int(d) for d in dimensions)
    return Step(lax.squeeze, (("dimensions", axes),), entry=None if 0 in axes else squeeze([d - 1 for d in axes]))


def broadcast(old: Sequence[int], shape: Sequence[int], dimensions: Sequence[int]) -> Step:
    """`jax.lax.broadcast_in_dim` of an array of shape ``old``."""
    axes = tuple(int(d) for d in dimensions)
    keeps_first = bool(axes) and axes[0] == 0 and old[0] == shape[0]
    entry = broadcast(old[1:], shape[1:], [d - 1 for d in axes[1:]]) if keeps_first else None
    options = (("shape", tuple(shape)), ("broadcast_dimensions", axes))
    return Step(lax.broadcast_in_dim, options, entry=entry)
