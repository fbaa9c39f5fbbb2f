"""Kinds of TPU chips, the slices they come in, and what a topology such as ``v5e:16x16`` means."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from lojax.text import suggest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip, with the numbers that its maker publishes.

    Attributes:
        name: As in the name of a topology.
        memory: Bytes of high-bandwidth memory.
        flops: bfloat16 operations a second.
        bandwidth: Bytes a second that a chip can receive from its neighbors, all links together.
        slices: The shapes that can be rented, smallest first.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    slices: tuple[str, ...]

    @property
    def usable_memory(self) -> int:
        """The bytes that a program can have: the runtime reserves a quarter of a GiB."""
        return self.memory - 2**28


# From the system architecture pages of Cloud TPU (cloud.google.com/tpu/docs), one page a chip.
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
    """A slice of a pod: ``v5e:4x4`` is a square of sixteen v5e chips, which JAX sees as sixteen devices."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """The topology with a name such as ``v5e:16x16``.

    Raises:
        ValueError: The name has another form, or there is no such chip or slice.

    >>> parse_topology("v5e:4x4").devices
    16
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if not match:
        raise ValueError(f"topology={text!r}; expected CHIP:SHAPE, such as v5e:4x4 or v5p:4x4x4.")
    name, shape = match.groups()
    if name not in CHIPS:
        raise ValueError(f"topology={text!r}: unknown chip {name!r}; expected one of {', '.join(CHIPS)}.")
    slices = [f"{name}:{slice_shape}" for slice_shape in CHIPS[name].slices]
    if text not in slices:
        raise ValueError(f"topology={text!r}; expected one of {', '.join(slices)}.{suggest(text, slices)}")
    return Topology(CHIPS[name], tuple(map(int, shape.split("x"))))


AXES = ("data", "fsdp", "tensor")
"""The mesh axes that the decoder is sharded over: the batch alone, batch and weights, and single products."""


def parse_mesh(text: str | Mapping[str, int], devices: int) -> dict[str, int]:
    """The mesh that ``data=..,fsdp=..,tensor=..`` spells; axes that it leaves out have size one.

    Raises:
        ValueError: The text has another form, or the product of the sizes is not ``devices``.

    >>> parse_mesh("fsdp=4,tensor=2", 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    if isinstance(text, str):
        entries = [entry.partition("=") for entry in text.split(",") if entry]
        if not entries or not all(size.isdigit() and int(size) for _, _, size in entries):
            raise ValueError(f"mesh={text!r}; expected AXIS=SIZE,..., such as fsdp=4,tensor=2.")
        sizes = {name.strip(): int(size) for name, _, size in entries}
    else:
        sizes = dict(text)
    for name in sizes:
        if name not in AXES:
            raise ValueError(f"mesh={text!r} has an axis {name!r}; expected {', '.join(AXES)}.{suggest(name, AXES)}")
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh={text!r} needs {math.prod(sizes.values())} devices, but there are {devices}. "
            f"Choose sizes whose product is {devices}."
        )
    return {name: sizes.get(name, 1) for name in AXES}
