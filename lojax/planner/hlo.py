"""The text of a compiled XLA program, read just far enough to know how often each instruction runs.

`cost_analysis` counts the body of a loop once; here every instruction carries the number of trips of the
loops around it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s})])([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\]")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: Its name.
        opcode: What it does.
        shapes: The arrays that it makes, as ``(dtype, dimensions)``.
        operands: The names of its operands.
        text: The line.
        root: Whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of ``name=`` up to the next comma outside of braces, or None."""
        found = re.search(rf"[,\s]{name}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^,]*)", self.text)
        return found.group(1).strip().lstrip("%") if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program, by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def runs(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction with its computation and how often one step runs it."""
        yield from self._runs(self.entry, 1)

    def _runs(self, name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction, times
            inner = times * self.trips(name, instruction) if instruction.opcode == "while" else times
            if instruction.opcode in _NO_CALLS:
                continue
            for called in _called(instruction.text):
                yield from self._runs(called, inner)

    def trips(self, computation: str, loop: Instruction) -> int:
        """How often the body of a loop runs: what the compiler noted, or read off its counter."""
        if noted := _TRIPS.search(loop.text):
            return int(noted.group(1))
        condition = self.computations.get(loop.attribute("condition") or "", {})
        body = self.computations.get(loop.attribute("body") or "", {})
        test = next((i for i in condition.values() if i.root), None)
        if test is None or test.opcode != "compare" or len(test.operands) != 2:
            return 1
        counter, limit = (condition.get(name) for name in test.operands)
        if counter is None or limit is None:
            return 1
        stop, index = _constant(limit), counter.attribute("index")
        if stop is None or index is None:
            return 1
        start = self._start(computation, loop, int(index))
        step = _step(body, int(index))
        return max(1, -(-(stop - start + ("direction=LE" in test.text)) // step))

    def _start(self, computation: str, loop: Instruction, index: int) -> int:
        here = self.computations[computation]
        state = here.get(loop.operands[0])
        first = here.get(state.operands[index]) if state and state.opcode == "tuple" else None
        value = _constant(first) if first else None
        return value or 0


_NO_CALLS = frozenset(
    {"all-reduce", "all-reduce-start", "reduce-scatter", "reduce", "reduce-window", "scatter", "select-and-scatter"}
    | {"sort", "map", "custom-call"}
)


def _step(body: dict[str, Instruction], index: int) -> int:
    """By how much a loop's body raises its counter; 1 where that cannot be seen."""
    root = next((i for i in body.values() if i.root and i.opcode == "tuple"), None)
    total, at = 0, body.get(root.operands[index]) if root and index < len(root.operands) else None
    while at is not None and at.opcode in ("add", "copy", "bitcast"):
        parts = [body.get(name) for name in at.operands]
        total += sum(_constant(p) or 0 for p in parts if p is not None)
        at = next((p for p in parts if p is not None and p.opcode != "constant"), None)
    return max(1, total)


def _constant(instruction: Instruction) -> int | None:
    found = re.search(r"constant\((-?\d+)\)", instruction.text)
    return int(found.group(1)) if found and instruction.opcode == "constant" else None


def _called(text: str) -> list[str]:
    names = list(_CALLED.findall(text))
    for group in _BRANCHES.findall(text):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return list(dict.fromkeys(names))


def parse(text: str) -> Program:
    """Reads what ``compiled.as_text()`` gives.

    Raises:
        ValueError: ``text`` is no HLO program.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (found := _LINE.match(line)):
            instruction = _instruction(found.group(2), found.group(3), found.group(1) is not None)
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("This is no compiled HLO program: it has no ENTRY computation. Pass compiled.as_text().")
    return Program(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction | None:
    found = _OPCODE.search(rest)
    if not found:
        return None
    shapes = tuple((kind, _dimensions(dims)) for kind, dims in _SHAPE.findall(rest[: found.start(1)]))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[found.end() : _closing(rest, found.end())]))
    return Instruction(name, found.group(1), shapes, operands, rest, root)


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace("<=", "").split(",") if n)


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one before ``start``."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return len(text)
