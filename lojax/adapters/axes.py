"""What the axes of a weight mean: each one is an input, an output, or a stack of weights.

Every adapted weight is a linear map from its *in* axes to its *out* axes, repeated along its
*stack* axes (scanned layers, experts). With ``m`` the product of the in axes and ``n`` that of the
out axes, one rank-``r`` update has ``r * (m + n)`` parameters for each entry of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

Role = Literal["in", "out", "stack"]
Axes = tuple[Role, ...]


def convention(ndim: int) -> Axes:
    """The axes assumed when no use of the weight was seen: the last one is out, the others in.

    That is the layout of every Flax, Haiku and Keras kernel with a single output axis: dense
    ``[in, out]``, convolution ``[*window, in, out]``, embedding ``[vocabulary, width]``.

    >>> convention(2)
    ('in', 'out')
    """
    return ("in",) * (ndim - 1) + ("out",)


def check(axes: Sequence[str], shape: Sequence[int], path: str) -> Axes:
    """Returns ``axes`` as a tuple, or raises if they cannot describe a weight of ``shape``."""
    axes = tuple(axes)
    unknown = [axis for axis in axes if axis not in get_args(Role)]
    if unknown:
        raise ValueError(f"{path}: axes {axes} hold {unknown[0]!r}; each must be 'in', 'out' or 'stack'.")
    if len(axes) != len(shape):
        raise ValueError(
            f"{path}: axes {axes} describe {len(axes)} axes, but the weight has shape {tuple(shape)} "
            f"({len(shape)} axes). Give one role per axis."
        )
    if "in" not in axes or "out" not in axes:
        raise ValueError(
            f"{path}: axes {axes} need at least one 'in' and one 'out'. "
            "A low-rank update is a map from in axes to out axes."
        )
    return axes  # type: ignore[return-value]


def positions(axes: Axes, role: Role) -> tuple[int, ...]:
    """The positions of the axes with this role, in order."""
    return tuple(i for i, axis in enumerate(axes) if axis == role)


def size(axes: Axes, shape: Sequence[int], role: Role) -> int:
    """The product of the sizes of the axes with this role.

    >>> size(("in", "out", "out"), (512, 8, 64), "out")
    512
    """
    return math.prod(shape[i] for i in positions(axes, role))


def factor_shapes(axes: Axes, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of ``a`` ``[*stack, *in, r]`` and ``b`` ``[*stack, r, *out]``.

    >>> factor_shapes(("stack", "in", "out", "out"), (12, 512, 8, 64), 4)
    ((12, 512, 4), (12, 4, 8, 64))
    """
    shapes = array_shapes(axes, shape, rank)
    return shapes["a"], shapes["b"]


def array_axes(axes: Axes) -> dict[str, tuple[int | None, ...]]:
    """For each axis of every array that an adapter may hold, the axis of the weight that it is; None for none.

    >>> array_axes(("in", "out", "out"))["b"]
    (None, 1, 2)
    """
    stack, ins, outs = (positions(axes, role) for role in ("stack", "in", "out"))
    return {
        "a": (*stack, *ins, None),
        "b": (*stack, None, *outs),
        "magnitude": (*stack, *outs),
        "rows": (None, *outs),
    }


def array_shapes(axes: Axes, shape: Sequence[int], rank: int, tokens: int = 0) -> dict[str, tuple[int, ...]]:
    """The shape of every array that an adapter may hold, by field (see `lojax.Adapter`)."""
    lengths = {"a": rank, "b": rank, "rows": tokens}
    return {
        name: tuple(lengths[name] if d is None else shape[d] for d in dims) for name, dims in array_axes(axes).items()
    }
