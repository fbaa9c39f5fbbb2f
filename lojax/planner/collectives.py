"""What a compiled program sends between devices: every collective, how often it runs, and how many bytes it moves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from lojax.planner.hlo import Instruction, Program, Shaped, parse
from lojax.report.table import table
from lojax.types import Shape

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_SIZES = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
"""Bytes an element, for the dtypes whose name does not end with their number of bits."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: One of `KINDS`.
        arrays: The unsharded arrays, as ``(dtype, shape)``: the results of an all-gather, the operands of a reduction.
        group: How many devices take part together.
        count: How often one step runs it.
        members: The devices of one of its groups; () where the program does not say.
    """

    kind: str
    arrays: tuple[Shaped, ...]
    group: int
    count: int
    members: tuple[int, ...] = ()

    @property
    def payload(self) -> int:
        """The bytes of its arrays."""
        return sum(nbytes(dtype, shape) for dtype, shape in self.arrays)

    @property
    def bytes_received(self) -> int:
        """The bytes that each device receives in one run, by the ring algorithm."""
        if self.kind == "collective-permute":
            return self.payload
        # A ring passes on every shard but one's own. An all-reduce is a reduce-scatter and then an all-gather.
        once = self.payload * (self.group - 1) // max(self.group, 1)
        return 2 * once if self.kind == "all-reduce" else once

    def bytes_from_other_hosts(self, per_host: int) -> int:
        """The bytes that each device receives from other hosts in one run, if the devices of a host share the work.

        Args:
            per_host: Devices in a host; their numbers are consecutive.
        """
        hosts = len({member // per_host for member in self.members})
        if hosts < 2:
            return 0
        if self.kind == "collective-permute":  # whose pairs may all be of two hosts
            return self.bytes_received
        if self.kind == "all-to-all":  # what comes in is for one device alone
            return self.bytes_received * (self.group - self.group // hosts) // max(1, self.group - 1)
        # A host needs what it lacks once; its devices fetch it together and pass it on among themselves.
        once = self.payload * (hosts - 1) // self.group
        return 2 * once if self.kind == "all-reduce" else once

    @property
    def reduces(self) -> bool:
        """Whether it sums, as the reduction of a gradient does."""
        return self.kind in ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a program. Printing it gives a table by kind."""

    collectives: tuple[Collective, ...]

    @property
    def bytes_received(self) -> int:
        """The bytes that each device receives in a step."""
        return sum(c.bytes_received * c.count for c in self.collectives)

    def bytes_from_other_hosts(self, per_host: int) -> int:
        """The bytes that each device receives from other hosts in a step, where a host has ``per_host`` devices."""
        return sum(c.bytes_from_other_hosts(per_host) * c.count for c in self.collectives)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """For each kind that occurs, how many run in a step and how many bytes each device receives."""
        groups = {kind: [c for c in self.collectives if c.kind == kind] for kind in KINDS}
        return {
            kind: (sum(c.count for c in group), sum(c.count * c.bytes_received for c in group))
            for kind, group in groups.items()
            if group
        }

    def minus(self, other: Traffic) -> Traffic:
        """The collectives that ``other`` lacks, or runs less often. Arrays are compared by dtype and size."""
        # The combiner passes of XLA merge collectives of several arrays, differently in each program; and the same
        # sum is an all-reduce here and a reduce-scatter there. So single arrays are matched, not instructions.
        available = Counter[Hashable]()
        for c in other.collectives:
            for key in _array_keys(c):
                available[key] += c.count
        added = []
        for c in self.collectives:
            for array, key in zip(c.arrays, _array_keys(c), strict=True):
                matched = min(available[key], c.count)
                available[key] -= matched
                if c.count > matched:
                    added.append(dataclasses.replace(c, arrays=(array,), count=c.count - matched))
        return Traffic(tuple(added))

    def __str__(self) -> str:
        rows = [(kind, f"{count:,}", f"{received:,}") for kind, (count, received) in self.by_kind().items()]
        return table(("collective", "runs a step", "bytes a device"), rows)


def _array_keys(c: Collective) -> list[Hashable]:
    return [(c.reduces, "" if c.reduces else c.kind, dtype, math.prod(shape)) for dtype, shape in c.arrays]


def nbytes(dtype: str, shape: Shape) -> int:
    """The bytes of an array of an HLO dtype.

    >>> nbytes("bf16", (2, 3))
    12
    """
    bits = re.search(r"\d+", dtype)
    size = ITEM_SIZES.get(dtype, int(bits.group()) / 8 if bits else 4)
    return int(math.prod(shape) * size)


def traffic(hlo: str) -> Traffic:
    """Reads the collectives of a compiled program.

    A collective in a loop counts once for each iteration. An asynchronous collective that the compiler split into
    several instructions with one channel counts once. An all-reduce of which only a shard is used counts as
    reduce-scatter.

    Args:
        hlo: What ``jax.jit(f).lower(...).compile().as_text()`` returns.

    >>> import jax, jax.numpy as jnp
    >>> traffic(jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile().as_text()).bytes_received
    0
    """
    program = parse(hlo)
    devices = _device_count(hlo)
    collectives: dict[Hashable, Collective] = {}
    for position, (computation, instruction, count) in enumerate(program.runs()):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = instruction.attribute("channel_id")
        collective = _read_collective(program, computation, instruction, count, devices)
        # The TPU compiler splits a collective into a start, steps inside of other loops, and an end, all of one
        # channel and marked with a chain_id. The steps run once for each part, so the smallest count is the right one;
        # without a chain, instructions of one channel are copies in several branches, and the largest is.
        is_step = "chain_id" in instruction.text
        key = (kind, channel) if channel else position
        if key not in collectives or (collectives[key].count > collective.count) == is_step:
            collectives[key] = collective
    return Traffic(tuple(c for c in collectives.values() if c.group > 1 or c.kind == "collective-permute"))


def _device_count(hlo: str) -> int:
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo.partition("\n")[0])
    return max([1, *map(int, counts)])


def _read_collective(
    program: Program, computation: str, instruction: Instruction, count: int, devices: int
) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    members = _first_group(instruction, devices)
    group = len(members)
    arrays = [array for array in instruction.shapes if array[0] != "token"]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # its result is (operands, results, ...)
        arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[:1]
    if kind == "reduce-scatter":  # its operands are unsharded, its results are shards
        siblings = program.computations[computation]
        operands = [array for name in instruction.operands if name in siblings for array in siblings[name].shapes]
        arrays = operands or [(dtype, (group, *shape)) for dtype, shape in arrays]
    # The TPU compiler fuses an all-reduce with the slice of one shard; only the names still say so.
    if kind == "all-reduce" and "reduce-scatter" in computation.replace("_", "-") + instruction.name:
        kind = "reduce-scatter"
    return Collective(kind, tuple(arrays), group, count, members)


def _first_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The devices of the first group that take part together, from any of the three ways to write replica groups."""
    text = instruction.text
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        size, dims, order = iota.groups()
        return tuple(_device_order(dims, order)[: int(size)].tolist())
    if mesh := _MESH_GROUPS.search(text):
        return _first_group_of_mesh(*mesh.groups())
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return _numbers(listed.group(1))
    return tuple(range(devices))


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,? *device_ids=\((?:\[([\d,]*)\](?:T\(([\d,]+)\))?|([\d,]+))\))?\s*\{([^}]*)\}"
)


def _first_group_of_mesh(
    sizes: str, dims: str | None, order: str | None, ids: str | None, axes: str
) -> tuple[int, ...]:
    """The first group along ``axes`` of a mesh.

    Args:
        sizes: Its axes, ``'a'=4,'b'=4``.
        dims: With ``order``, where its devices are in another order: that of an array of these lengths,
        order: transposed so.
        ids: The same as a list.
        axes: Along which axes the group goes: ``'a':(2)2,'b'`` is the second half of ``a`` and all of ``b``.
    """
    size_by_name = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    matches: Sequence[tuple[str, str, str]] = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    parts = {name: (int(before or 1), int(size or size_by_name[name])) for name, before, size in matches}
    devices = np.asarray(_numbers(ids)) if ids else _device_order(dims or str(math.prod(size_by_name.values())), order)
    grid = devices.reshape(tuple(size_by_name.values()))
    for axis, (name, length) in enumerate(size_by_name.items()):
        before, size = parts.get(name, (1, 1))
        stride = length // (before * size)
        grid = grid.take(range(0, stride * size, stride), axis=axis)
    return tuple(grid.reshape(-1).tolist())


def _device_order(dims: str, order: str | None) -> np.ndarray:
    """``[2,4]T(1,0)``: the numbers of the devices as an array of lengths 2 and 4, transposed."""
    lengths = _numbers(dims)
    return np.arange(math.prod(lengths)).reshape(lengths).transpose(_numbers(order) if order else None).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
