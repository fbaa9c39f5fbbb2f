"""What the axes of a weight mean: each one is an input, an output, or a stack of weights.

Every adapted weight is a linear map from its *in* axes to its *out* axes, repeated along its
*stack* axes (scanned layers, experts). With ``m`` the product of the in axes and ``n`` that of the
out axes, one rank-``r`` update has ``r * (m + n)`` parameters for each entry of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from lojax.types import Path, Shape

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


def check(axes: Sequence[str], shape: Shape, path: Path) -> Axes:
    """Returns ``axes`` as a tuple, or raises if they cannot describe a weight of ``shape``."""
    roles = check_roles(axes, path)
    if len(roles) != len(shape):
        raise ValueError(
            f"{path}: axes {roles} describe {len(roles)} axes, but the weight has shape {tuple(shape)} "
            f"({len(shape)} axes). Give one role per axis."
        )
    return roles


def check_roles(axes: Sequence[str], where: str) -> Axes:
    """Returns ``axes`` as a tuple, or raises if they cannot describe a weight of any shape.

    >>> check_roles(["in", "out"], "kernel")
    ('in', 'out')
    """
    if not isinstance(axes, Sequence) or isinstance(axes, str):
        raise TypeError(f"{where}: axes={axes!r}; expected one role per axis, such as axes=('in', 'out').")
    roles = tuple(axes)
    unknown = [role for role in roles if role not in get_args(Role)]
    if unknown:
        raise ValueError(f"{where}: axes {roles} hold {unknown[0]!r}; each must be 'in', 'out' or 'stack'.")
    if "in" not in roles or "out" not in roles:
        raise ValueError(
            f"{where}: axes {roles} need at least one 'in' and one 'out'. "
            "A low-rank update is a map from in axes to out axes."
        )
    return roles  # type: ignore[return-value]


def positions(axes: Axes, role: Role) -> tuple[int, ...]:
    """The positions of the axes with this role, in order."""
    return tuple(i for i, axis in enumerate(axes) if axis == role)


def size(axes: Axes, shape: Shape, role: Role) -> int:
    """The product of the sizes of the axes with this role.

    >>> size(("in", "out", "out"), (512, 8, 64), "out")
    512
    """
    return math.prod(shape[i] for i in positions(axes, role))
