"""Where the axes of a weight are while a program still makes it of codes.

Codes may be packed two to a byte, flattened for a look-up in a code book, or split into tiles that share a scale. A
low-rank update cannot follow that. So the update waits, and what is followed is the *layout*: for each axis of the
value the pieces of axes that it runs over, the slowest first. When the program uses the value, the update is brought
into its layout (`lowrank.attach`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lojax.types import Shape

Piece = tuple[int | None, int, int]
"""The axis of the codes that it is a part of, its length, and its stride along that axis. The axis is None for entries
of one code, such as the two halves of a byte."""

Layout = tuple[tuple[Piece, ...], ...]
"""The pieces of each axis of a value. An axis of length one has none."""


def initial_layout(shape: Shape) -> Layout:
    """The layout of the codes themselves.

    >>> initial_layout((8, 1, 4))
    (((0, 8, 1),), (), ((2, 4, 1),))
    """
    return tuple(((axis, n, 1),) if n != 1 else () for axis, n in enumerate(shape))


def reshape(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout of a reshaped value; None if an axis of it would be a part of a piece that the length does not divide.

    >>> reshape((((0, 8, 1),), ((1, 6, 1),)), (2, 4, 6))
    (((0, 2, 4),), ((0, 4, 1),), ((1, 6, 1),))
    """
    pieces = [piece for axis in layout for piece in axis][::-1]
    result: list[tuple[Piece, ...]] = []
    for length in shape:
        axis: list[Piece] = []
        while length > 1:
            if not pieces:
                return None
            origin, n, stride = pieces.pop()
            part = math.gcd(n, length)
            if part == 1 or (part != n and part != length):
                return None
            if part != n:
                pieces.append((origin, n // part, stride))
            axis.append((origin, part, stride * (n // part)))
            length //= part
        result.append(tuple(axis))
    return tuple(result)


def broadcast(layout: Layout, old: Shape, new: Sequence[int], dimensions: Sequence[int]) -> Layout:
    """The layout of a value that repeats along the axes of ``new`` that are not in ``dimensions``, or stretched.

    >>> broadcast((((0, 8, 1),), ()), (8, 1), (8, 2), (0, 1))
    (((0, 8, 1),), ((None, 2, 1),))
    """
    result: list[tuple[Piece, ...]] = [((None, n, 1),) if n != 1 else () for n in new]
    for i, d in enumerate(dimensions):
        if old[i] == new[d]:
            result[d] = layout[i]
    return tuple(result)


def take_first(layout: Layout, lengths: Sequence[int], shape: Shape) -> Layout | None:
    """The layout of the first ``lengths`` entries of each axis; None if an axis that is cut is made of several.

    >>> take_first((((0, 8, 1), (None, 2, 1)),), (15,), (16,))
    (((0, 15, 1),),)
    """
    result = []
    for axis, length, n in zip(layout, lengths, shape, strict=True):
        origins = {origin for origin, _, _ in axis} - {None}
        if length == n:
            result.append(axis)
        elif len(origins) == 1:
            result.append(((origins.pop(), length, 1),))
        else:
            return None
    return tuple(result)


def concatenate(layout: Layout, axis: int, count: int) -> Layout:
    """The layout of ``count`` values of one layout, one after the other along an axis."""
    return (*layout[:axis], ((None, count, 1), *layout[axis]), *layout[axis + 1 :])


def stack(layout: Layout, axis: int, count: int) -> Layout:
    """The layout of ``count`` values of one layout along a new axis."""
    return (*layout[:axis], ((None, count, 1),), *layout[axis:])


def lengths(layout: Layout, shape: Shape) -> dict[int, int]:
    """The length of each axis of the codes that is one axis of the value, as it is now.

    >>> lengths((((0, 8, 1),), ((1, 4, 1), (None, 2, 1))), (8, 8))
    {0: 8, 1: 8}
    """
    origins = [{origin for origin, _, _ in axis} - {None} for axis in layout]
    everywhere = [origin for found in origins for origin in found]
    single = {i: next(iter(found)) for i, found in enumerate(origins) if len(found) == 1}
    return {origin: shape[i] for i, origin in single.items() if origin is not None and everywhere.count(origin) == 1}


@dataclasses.dataclass(frozen=True)
class Pending:
    """How far a program is with making a weight of codes.

    Attributes:
        layout: Where the axes of the codes are; None while the update still goes along with every move.
        scaled: Whether the codes were multiplied by a scale.
    """

    layout: Layout | None = None
    scaled: bool = False
