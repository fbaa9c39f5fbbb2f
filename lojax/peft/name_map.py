"""Name maps, and what one gives for a real tree: where each torch parameter lives."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lojax.adapters.axes import Axes
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.peft.rule_language import BIASES, Axis, NameRule, parse_rule


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one torch parameter lives in a tree.

    Attributes:
        name: The torch parameter, ``encoder.layer.0.query.weight``.
        kind: How torch stores it (see `lojax.peft.rule_language`).
        path: The leaf.
        shape: The leaf's whole shape.
        axes: The role of each axis of the leaf; None where the map does not say.
        entry: By axis, the entry (int) or the part (slice) that this parameter is.
        text: The rule that says so.
        order: The place of that rule in the map.
    """

    name: str
    kind: str
    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    entry: Mapping[int, int | slice]
    text: str
    order: int = 0

    @property
    def module(self) -> str:
        """The torch module that owns the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        """Whether the parameter is a bias."""
        return self.name.endswith(".bias")

    @property
    def is_weight(self) -> bool:
        """Whether the parameter can take an adapter."""
        free = sum(not isinstance(self.entry.get(i), int) for i in range(len(self.shape)))
        return free >= 2 and not self.is_bias and self.kind != "param"


def roles(slot: Slot) -> Axes:
    """The axes of an adapter for the leaf of ``slot``.

    Raises:
        ValueError: The map does not say, and the leaf is no matrix.
    """
    if slot.axes is None:
        raise ValueError(
            f"{slot.path} has shape {slot.shape}, and the name rule {slot.text!r} does not say which axes are in "
            "and out. Spell them, as in kernel[in, out, out]."
        )
    return tuple("stack" if role == "expert" else role for role in slot.axes)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Table:
    """A map applied to a tree: every torch parameter, and the leaves that no rule fits."""

    slots: Mapping[str, Slot]
    unmapped: tuple[str, ...]

    def by_path(self) -> dict[str, list[Slot]]:
        """The slots of each leaf, in the order of its entries."""
        found: dict[str, list[Slot]] = {}
        for slot in self.slots.values():
            found.setdefault(slot.path, []).append(slot)
        return found

    def __str__(self) -> str:
        lines = [f"{slot.path}{_where(slot)} <-> {slot.name}" for slot in self.slots.values()]
        return "\n".join([*lines, *(f"{path} is not mapped" for path in self.unmapped)])


def _where(slot: Slot) -> str:
    if not slot.entry:
        return ""
    entries = (slot.entry.get(i, slice(None)) for i in range(max(slot.entry) + 1))
    spelled = (f"{e.start or ''}:{e.stop or ''}" if isinstance(e, slice) else str(e) for e in entries)
    return f"[{', '.join(spelled)}]"


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Rules between JAX paths and torch names, in order; the first that fits a leaf wins.

    >>> names = NameMap.parse('''
    ...     layers/{i}/{m:query,value}/kernel <-> encoder.layer.{i}.{m}   # one module a layer
    ...     layers/mlp/kernel[{i}, in, out]   <-> encoder.layer.{i}.mlp   # scanned layers
    ... ''')
    >>> import jax.numpy as jnp
    >>> print(names.table({"layers": {"0": {"query": {"kernel": jnp.ones((4, 4))}},
    ...                               "mlp": {"kernel": jnp.ones((2, 4, 8))}}, "step": jnp.ones(())}))
    layers/0/query/kernel <-> encoder.layer.0.query.weight
    layers/mlp/kernel[0] <-> encoder.layer.0.mlp.weight
    layers/mlp/kernel[1] <-> encoder.layer.1.mlp.weight
    step is not mapped
    """

    rules: tuple[NameRule, ...]

    @classmethod
    def parse(cls, text: str) -> NameMap:
        """The map that lines of text spell; ``#`` starts a comment.

        Raises:
            ValueError: A line is not of the language, or there is none.
        """
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        rules = tuple(parse_rule(line) for line in lines if line)
        if not rules:
            raise ValueError("A name map needs at least one rule, such as 'dense/kernel <-> dense'.")
        return cls(rules)

    def __or__(self, other: NameMap) -> NameMap:
        """This map, and where no rule of it fits, the other."""
        return NameMap(self.rules + other.rules)

    def prefixed(self, path: str = "", name: str = "") -> NameMap:
        """The same rules under a prefix of the paths (``"text/"``) and of the names (``"text."``)."""
        lines = (rule.text.split("<->") for rule in self.rules)
        return NameMap(tuple(parse_rule(f"{path}{left.strip()} <-> {name}{right.strip()}") for left, right in lines))

    def scanned(self, var: str = "i") -> NameMap:
        """The rules of numbered layers, for layers scanned over a leading axis: ``layers/{i}/x`` as ``layers/x``."""
        numbered = re.compile(rf"[/_]\{{{var}\}}(?=/)")
        return NameMap(
            tuple(parse_rule(_stacked(r.text, numbered, var)) for r in self.rules if numbered.search(r.text))
        )

    def table(self, params: Any) -> Table:
        """Applies the map to a tree of arrays, shapes or adapters.

        Raises:
            ValueError: Two leaves would be one torch parameter, or the sizes of parts do not fit.
        """
        slots: dict[str, Slot] = {}
        unmapped = []
        for path, leaf in flatten(params).items():
            if leaf is None:
                continue
            shape = tuple(unbox(leaf).shape)
            found = list(self._slots(path, shape))
            if not found:
                unmapped.append(path)
            for slot in found:
                if slot.name in slots:
                    raise _duplicate(slots[slot.name], slot)
                slots[slot.name] = slot
        return Table(slots, tuple(unmapped))

    def _slots(self, path: str, shape: tuple[int, ...]) -> Iterator[Slot]:
        for order, rule in enumerate(self.rules):
            hit = rule.match(path, len(shape))
            if hit:
                values, axes = hit
                roles = None if axes is None else tuple(axis.role for axis in axes)
                leaf = path.rpartition("/")[2]
                for choice in itertools.product(*_choices(rule, axes or (), shape)):
                    chosen = {axis: (value, entry) for axis, value, entry in choice}
                    filled = values | {axes[axis].var: value for axis, (value, _) in chosen.items()}  # type: ignore
                    entry = {axis: e for axis, (_, e) in chosen.items()}
                    name = rule.parameter(filled, leaf)
                    yield Slot(name, _kind(rule, leaf), path, shape, roles, entry, rule.text, order)
                return


def _kind(rule: NameRule, leaf: str) -> str:
    if rule.leaf == "*" and leaf == "embedding":
        return "embedding"
    return "linear" if leaf in BIASES else rule.kind


def _choices(rule: NameRule, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> list[list[Any]]:
    """Per axis with a placeholder, the ``(axis, torch text, entry)`` it can take."""
    choices = []
    for axis, (role, size) in enumerate(zip(axes, shape, strict=False)):
        if not role.var:
            continue
        if role.role != "stack":
            choices.append(list(_parts(rule, axis, role, size)))
        elif role.parts and len(role.parts) != size:
            raise ValueError(f"Name rule {rule.text!r} names {len(role.parts)} entries of an axis of size {size}.")
        else:
            names = [name for name, _ in role.parts] or [str(i) for i in range(size)]
            choices.append([(axis, name, i) for i, name in enumerate(names)])
    return choices


def _parts(rule: NameRule, axis: int, role: Axis, size: int) -> Iterator[Any]:
    sizes = [part if part is not None else size // len(role.parts) for _, part in role.parts]
    if sum(sizes) != size:
        raise ValueError(f"Name rule {rule.text!r} splits an axis of size {size} into {sizes}, {sum(sizes)} in all.")
    start = 0
    for (name, _), length in zip(role.parts, sizes, strict=True):
        yield axis, name, slice(start, start + length)
        start += length


def _duplicate(first: Slot, second: Slot) -> ValueError:
    return ValueError(
        f"Two leaves map to one torch parameter, {first.name}: {first.path} by the rule {first.text!r}, and "
        f"{second.path} by {second.text!r}. Narrow one of the rules."
    )


def _stacked(line: str, numbered: re.Pattern[str], var: str) -> str:
    left, _, right = line.partition("<->")
    left = numbered.sub("", left).strip()
    if left.endswith("]"):
        path, _, bracket = left[:-1].rpartition("[")
    else:
        path = left
        bracket = "in*, out" if right.strip().endswith(": conv") else "in, out"
        bracket = "out" if re.search(r"/(bias|b|scale)$", path) else bracket
    return f"{path}[{{{var}}}, {bracket}] <-> {right.strip()}"
