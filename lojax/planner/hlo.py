"""A reader for the text of a compiled XLA program that knows how often each instruction runs.

`cost_analysis` counts the body of a loop once. Here every instruction comes with the iterations of the loops around it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TypeAlias

from lojax.types import Shape

Shaped: TypeAlias = tuple[str, Shape]
"""The dtype and the shape of an array, as HLO writes them."""

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
        opcode: Its operation.
        shapes: The arrays that it returns.
        operands: The names of its operands.
        text: The line after ``name =``.
        root: Whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shaped, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of ``name=`` up to the next comma outside of braces, or None."""
        match = re.search(rf"[,\s]{name}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^,]*)", self.text)
        return match.group(1).strip().lstrip("%") if match else None


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program, by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def runs(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction with the name of its computation and how often one step runs it."""
        yield from self._runs(self.entry, 1)

    def _runs(self, name: str, count: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction, count
            if instruction.opcode in _NO_CALLS:
                continue
            inner = count * self.iterations(name, instruction) if instruction.opcode == "while" else count
            for name_called in called(instruction):
                yield from self._runs(name_called, inner)

    def iterations(self, computation: str, loop: Instruction) -> int:
        """How often the body of a loop runs; 1 where it cannot be read."""
        if known := _TRIPS.search(loop.text):
            return int(known.group(1))
        # CPU and GPU note the count. The TPU compiler does not, but its counted loops compare an integer of the
        # loop's state with a constant, and the body adds constants to it.
        condition = self.computations.get(loop.attribute("condition") or "", {})
        body = self.computations.get(loop.attribute("body") or "", {})
        test = next((i for i in condition.values() if i.root), None)
        if test is None or test.opcode != "compare" or len(test.operands) != 2:
            return 1
        counter, limit = (condition.get(name) for name in test.operands)
        stop, index = _constant(limit), counter.attribute("index") if counter else None
        if stop is None or index is None:
            return 1
        start = self._counter_start(computation, loop, int(index))
        step = _counter_step(body, int(index))
        return max(1, -(-(stop - start + ("direction=LE" in test.text)) // step))

    def _counter_start(self, computation: str, loop: Instruction, index: int) -> int:
        instructions = self.computations[computation]
        state = instructions.get(loop.operands[0])
        return (_constant(instructions.get(state.operands[index])) or 0) if state and state.opcode == "tuple" else 0


# What these call is a scalar function such as a sum, without collectives, run once for each element.
_NO_CALLS = frozenset(
    {"all-reduce", "all-reduce-start", "reduce-scatter", "reduce", "reduce-window", "scatter", "select-and-scatter"}
    | {"sort", "map", "custom-call"}
)


def _counter_step(body: dict[str, Instruction], index: int) -> int:
    """How much the body of a loop adds to its counter; 1 where it cannot be read."""
    root = next((i for i in body.values() if i.root and i.opcode == "tuple"), None)
    total, value = 0, body.get(root.operands[index]) if root and index < len(root.operands) else None
    while value is not None and value.opcode in ("add", "copy", "bitcast"):  # an unrolled body adds several times
        operands = [body.get(name) for name in value.operands]
        total += sum(_constant(operand) or 0 for operand in operands)
        value = next((operand for operand in operands if operand and operand.opcode != "constant"), None)
    return max(1, total)


def _constant(instruction: Instruction | None) -> int | None:
    match = re.search(r"constant\((-?\d+)\)", instruction.text) if instruction else None
    return int(match.group(1)) if instruction and match and instruction.opcode == "constant" else None


def called(instruction: Instruction) -> list[str]:
    """The names of the computations that an instruction calls."""
    names = list(_CALLED.findall(instruction.text))
    for branches in _BRANCHES.findall(instruction.text):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return list(dict.fromkeys(names))


def parse(text: str) -> Program:
    """Reads the text that ``compiled.as_text()`` returns.

    Raises:
        ValueError: ``text`` is not an HLO program.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (match := _LINE.match(line)):
            instruction = _parse_instruction(match.group(2), match.group(3), match.group(1) is not None)
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("This is not a compiled HLO program: it has no ENTRY computation. Pass compiled.as_text().")
    return Program(computations, entry)


def _parse_instruction(name: str, text: str, root: bool) -> Instruction | None:
    opcode = _OPCODE.search(text)
    if not opcode:
        return None
    shapes = tuple((dtype, _dimensions(dims)) for dtype, dims in _SHAPE.findall(text[: opcode.start(1)]))
    operands = tuple(re.findall(r"%([\w.\-]+)", text[opcode.end() : _closing_parenthesis(text, opcode.end())]))
    return Instruction(name, opcode.group(1), shapes, operands, text, root)


def _dimensions(text: str) -> Shape:
    return tuple(int(n) for n in text.replace("<=", "").split(",") if n)  # "<=8" is a dynamic dimension's bound


def _closing_parenthesis(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one before ``start``."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return len(text)
