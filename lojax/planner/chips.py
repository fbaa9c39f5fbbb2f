"""The chips that can be rented, the slices they come in, and what a topology such as ``v5e:16x16`` means."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip, by its maker's published numbers.

    Attributes:
        name: As in a topology's name.
        memory: Bytes of high-bandwidth memory.
        flops: bfloat16 operations a second.
        link: Bytes a second that a chip can receive from its neighbours, all links together.
        slices: The shapes that can be had, smallest first.
    """

    name: str
    memory: int
    flops: float
    link: float
    slices: tuple[str, ...]

    @property
    def usable(self) -> int:
        """The bytes that a program can have: the system keeps a quarter GiB."""
        return self.memory - 2**28


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    *("16x16x16", "16x16x24"),
)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 275e12, 300e9, _CUBES[:-1]),
        Chip("v5e", 16 * 2**30, 197e12, 200e9, _FLAT),
        Chip("v5p", 95 * 2**30, 459e12, 600e9, _CUBES),
        Chip("v6e", 32 * 2**30, 918e12, 448e9, _FLAT),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod: ``v5e:4x4`` is sixteen v5e chips in a square."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The topology of a name such as ``v5e:16x16``.

    Raises:
        ValueError: The name has another form, or there is no such chip or slice.

    >>> parse_topology("v5e:4x4").chips
    16
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if not found:
        raise ValueError(f"topology={text!r}; expected CHIP:SHAPE, such as v5e:4x4 or v5p:4x4x4.")
    chip, shape = found.groups()
    if chip not in CHIPS:
        raise ValueError(f"topology={text!r}: there is no chip {chip!r} here; expected one of {', '.join(CHIPS)}.")
    if shape not in CHIPS[chip].slices:
        near = difflib.get_close_matches(shape, CHIPS[chip].slices, n=1)
        hint = f" Did you mean {chip}:{near[0]}?" if near else ""
        raise ValueError(f"topology={text!r}: {chip} comes in {', '.join(CHIPS[chip].slices)}.{hint}")
    return Topology(CHIPS[chip], tuple(map(int, shape.split("x"))))


AXES = ("data", "fsdp", "tensor")
"""The mesh axes that the decoder lies over: copies of the weights, slices of them, and slices of each product."""


def parse_mesh(text: str | Mapping[str, int], chips: int) -> dict[str, int]:
    """The mesh that ``data=..,fsdp=..,tensor=..`` spells; axes left out have size one.

    Raises:
        ValueError: The text has another form, or the sizes do not multiply to ``chips``.

    >>> parse_mesh("fsdp=4,tensor=2", 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    if isinstance(text, str):
        parts = [part.partition("=") for part in text.split(",") if part]
        if not parts or not all(size.isdigit() and int(size) for _, _, size in parts):
            raise ValueError(f"mesh={text!r}; expected AXIS=SIZE,..., such as fsdp=4,tensor=2.")
        sizes = {name.strip(): int(size) for name, _, size in parts}
    else:
        sizes = dict(text)
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise ValueError(f"mesh={text!r} has an axis {unknown[0]!r}; expected {', '.join(AXES)}.")
    if math.prod(sizes.values()) != chips:
        raise ValueError(f"mesh={text!r} has {math.prod(sizes.values())} places, but there are {chips} chips.")
    return {name: sizes.get(name, 1) for name in AXES}
