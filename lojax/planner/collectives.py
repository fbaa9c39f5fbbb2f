"""What a compiled program sends between chips: every collective, how often it runs, and how many bytes it moves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from lojax.planner.hlo import Instruction, Program, parse
from lojax.report.table import table

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
"""Bytes a number, where the digits of its name do not say it."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: One of `KINDS`.
        arrays: The arrays that it carries, whole: what an all-gather makes, what a reduction takes.
        group: How many chips take part with each other.
        count: How often a step runs it.
        source: The operation of the traced program that it came from.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    count: int
    source: str = ""

    @property
    def payload(self) -> int:
        """The bytes of the arrays it carries."""
        return sum(nbytes(kind, shape) for kind, shape in self.arrays)

    @property
    def moved(self) -> int:
        """The bytes that each chip receives in one run, by the ring algorithm."""
        if self.kind == "collective-permute":
            return self.payload
        share = self.payload * (self.group - 1) // max(self.group, 1)
        return 2 * share if self.kind == "all-reduce" else share

    @property
    def reduces(self) -> bool:
        """Whether it sums, as the reduction of a gradient does."""
        return self.kind in ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a program. Printing it gives a table by kind."""

    collectives: tuple[Collective, ...]

    @property
    def moved(self) -> int:
        """The bytes that each chip receives in a step."""
        return sum(c.moved * c.count for c in self.collectives)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """For each kind that occurs, how many run in a step and how many bytes each chip receives."""
        found: dict[str, tuple[int, int]] = {}
        for kind in KINDS:
            these = [c for c in self.collectives if c.kind == kind]
            if these:
                found[kind] = (sum(c.count for c in these), sum(c.count * c.moved for c in these))
        return found

    def beyond(self, other: Traffic) -> Traffic:
        """The collectives that ``other`` has not, or has fewer of. Arrays are compared by dtype and size."""
        have = Counter[object]()
        for c in other.collectives:
            have.update(dict.fromkeys(_pieces(c), c.count) if len(c.arrays) == 1 else {})
            if len(c.arrays) != 1:
                for piece in _pieces(c):
                    have[piece] += c.count
        added = []
        for c in self.collectives:
            for array, piece in zip(c.arrays, _pieces(c), strict=True):
                known = min(have[piece], c.count)
                have[piece] -= known
                if c.count > known:
                    added.append(dataclasses.replace(c, arrays=(array,), count=c.count - known))
        return Traffic(tuple(added))

    def __str__(self) -> str:
        rows = [(kind, f"{count:,}", f"{moved:,}") for kind, (count, moved) in self.by_kind().items()]
        return table(("collective", "runs a step", "bytes a chip"), rows)


def _pieces(c: Collective) -> list[object]:
    return [(c.reduces, c.kind if not c.reduces else "", kind, math.prod(shape)) for kind, shape in c.arrays]


def nbytes(kind: str, shape: Sequence[int]) -> int:
    """The bytes of an array of an HLO dtype.

    >>> nbytes("bf16", (2, 3))
    12
    """
    digits = re.search(r"\d+", kind)
    size = SIZES.get(kind, int(digits.group()) / 8 if digits else 4)
    return int(math.prod(shape) * size)


def traffic(hlo: str) -> Traffic:
    """Reads the collectives off a compiled program.

    Loops count as often as they turn. An asynchronous collective that the compiler cut into several
    instructions of one channel counts once, and an all-reduce of which only a shard is kept counts as the
    reduce-scatter that it is.

    Args:
        hlo: What ``jax.jit(f).lower(...).compile().as_text()`` gives.

    >>> import jax, jax.numpy as jnp
    >>> traffic(jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile().as_text()).moved
    0
    """
    program = parse(hlo)
    chips = _chips(hlo)
    found: dict[object, Collective] = {}
    for n, (where, instruction, times) in enumerate(program.runs()):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = instruction.attribute("channel_id")
        one = _collective(program, where, instruction, times, chips)
        chained = "chain_id" in instruction.text  # cut into a start, steps inside of other loops, and an end
        key = (kind, channel) if channel else n
        if key not in found or (found[key].count > one.count) == chained:
            found[key] = one
    return Traffic(tuple(c for c in found.values() if c.group > 1 or c.kind == "collective-permute"))


def _chips(hlo: str) -> int:
    head = hlo.partition("\n")[0]
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)]
    return max([1, *counts])


def _collective(program: Program, where: str, instruction: Instruction, times: int, chips: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    group = _group(instruction, chips)
    arrays = [(k, s) for k, s in instruction.shapes if k != "token"]
    here = program.computations[where]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, ...)
        arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[:1]
    if kind == "reduce-scatter":
        given = [here[name].shapes for name in instruction.operands if name in here]
        arrays = [shape for shapes in given for shape in shapes] or [(k, (group, *s)) for k, s in arrays]
    if kind == "all-reduce" and _keeps_a_shard(program, where, instruction, group):
        kind = "reduce-scatter"
    name = re.search(r'op_name="([^"]*)"', instruction.text)
    return Collective(kind, tuple(arrays), group, times, name.group(1) if name else "")


def _keeps_a_shard(program: Program, where: str, instruction: Instruction, group: int) -> bool:
    """Whether an all-reduce is followed by nothing but a slice of one shard (a fused reduce-scatter)."""
    if group > 1 and "reduce-scatter" in where.replace("_", "-") + instruction.name:
        return True
    return "all-reduce-scatter" in where


def _group(instruction: Instruction, chips: int) -> int:
    """How many chips take part with each other."""
    text = instruction.text
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(found.group(2))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        return math.prod(
            int(_axis_size(axis, sizes)) for axis in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[2])
        )
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found.group(1).split(","))
    return chips


def _axis_size(axis: Iterable[str], sizes: dict[str, str]) -> str:
    name, _, part = axis
    return part or sizes[name]
