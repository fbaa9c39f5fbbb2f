"""Name maps, and what one gives for a real tree: where each torch parameter lives."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from lojax.adapters.axes import Axes
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.peft.rule_language import BIASES, Axis, NameRule, parse_rule
from lojax.types import Params, Path, Shape

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class TorchParameter:
    """Where one torch parameter lives in a tree.

    Attributes:
        name: The torch parameter, ``encoder.layer.0.query.weight``.
        kind: How torch stores it (see `lojax.peft.rule_language`).
        path: The path of the leaf that holds it.
        shape: The whole shape of that leaf.
        axes: The role of each axis of the leaf; None where the map does not say.
        index: By axis of the leaf, the entry (int) or the part (slice) that this parameter is. It has all of the
            other axes.
        rule: The text of the rule that says so.
        order: The position of that rule in the map.
    """

    name: str
    kind: str
    path: Path
    shape: Shape
    axes: tuple[str, ...] | None
    index: Mapping[int, int | slice]
    rule: str
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
        return len(self.own_axes()) >= 2 and not self.is_bias and self.kind != "param"

    @property
    def is_experts(self) -> bool:
        """Whether it is a parameter of experts, which PEFT reaches through ``target_parameters``."""
        return self.kind in ("experts", "experts_t")

    @property
    def config_key(self) -> str:
        """The name by which PEFT looks up its rank and alpha: the module, or the parameter itself."""
        return self.name if self.is_experts else self.module

    def roles(self) -> tuple[str, ...]:
        """The role of each axis of the leaf: ``"in"``, ``"out"``, ``"stack"`` or ``"expert"``.

        Raises:
            ValueError: The map does not say, and the leaf is not a matrix.
        """
        if self.axes is None:
            raise ValueError(
                f"{self.path} has shape {self.shape}, and the name rule {self.rule!r} does not say which axes are in "
                "and out. Spell them, as in kernel[in, out, out]."
            )
        return self.axes

    def adapter_axes(self) -> Axes:
        """The axes of an adapter of the leaf, for which experts are a stack."""
        return tuple("stack" if role == "expert" else role for role in self.roles())  # type: ignore[return-value]

    def own_axes(self, role: str | None = None) -> list[int]:
        """The axes of the leaf that the parameter has too: all, or those with one role."""
        axes = range(len(self.shape)) if role is None else [i for i, r in enumerate(self.roles()) if r == role]
        return [i for i in axes if not isinstance(self.index.get(i), int)]

    def sizes(self, role: str) -> Shape:
        """The sizes of its own axes with this role."""
        return tuple(len(range(self.shape[i])[self.index.get(i, slice(None))]) for i in self.own_axes(role))  # type: ignore

    def at(self, axes: Iterable[int]) -> tuple[int | slice, ...]:
        """The index of the parameter in an array that has these axes of the leaf."""
        return tuple(self.index.get(i, slice(None)) for i in axes)


@dataclasses.dataclass(frozen=True)
class Table:
    """A map applied to a tree: every torch parameter by name, and the paths that no rule fits."""

    parameters: Mapping[str, TorchParameter]
    unmapped: tuple[Path, ...]

    @property
    def slots(self) -> Mapping[str, TorchParameter]:
        """``parameters``, by the name they had in lojax 0.1."""
        return self.parameters

    def by_path(self) -> dict[Path, list[TorchParameter]]:
        """The parameters of each leaf, in the order of its entries."""
        return group_by(self.parameters.values(), lambda parameter: parameter.path)

    def weights(self) -> dict[str, list[TorchParameter]]:
        """The parameters that can take an adapter, by module."""
        weights = (parameter for parameter in self.parameters.values() if parameter.is_weight)
        return group_by(weights, lambda parameter: parameter.module)

    def __str__(self) -> str:
        lines = [f"{p.path}{_index_text(p)} <-> {p.name}" for p in self.parameters.values()]
        return "\n".join([*lines, *(f"{path} is not mapped" for path in self.unmapped)])


def group_by(items: Iterable[Item], key: Callable[[Item], Path]) -> dict[Path, list[Item]]:
    """The items by key, in order.

    >>> group_by(["ab", "c", "ad"], lambda text: text[0])
    {'a': ['ab', 'ad'], 'c': ['c']}
    """
    groups: dict[Path, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _index_text(parameter: TorchParameter) -> str:
    if not parameter.index:
        return ""
    index = parameter.at(range(max(parameter.index) + 1))
    texts = (f"{i.start or ''}:{i.stop or ''}" if isinstance(i, slice) else str(i) for i in index)
    return f"[{', '.join(texts)}]"


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

    def table(self, params: Params) -> Table:
        """Applies the map to a tree of arrays, shapes or adapters.

        Raises:
            ValueError: Two leaves would be one torch parameter, or the sizes of parts do not fit.
        """
        parameters: dict[str, TorchParameter] = {}
        unmapped = []
        for path, leaf in flatten(params).items():
            if leaf is None:
                continue
            leaf_parameters = list(self._parameters(path, tuple(unbox(leaf).shape)))
            if not leaf_parameters:
                unmapped.append(path)
            for parameter in leaf_parameters:
                if parameter.name in parameters:
                    raise _duplicate(parameters[parameter.name], parameter)
                parameters[parameter.name] = parameter
        return Table(parameters, tuple(unmapped))

    def _parameters(self, path: Path, shape: Shape) -> Iterator[TorchParameter]:
        """The torch parameters of one leaf, by the first rule that fits it."""
        for order, rule in enumerate(self.rules):
            match = rule.match(path, len(shape))
            if match:
                values, axes = match
                roles = None if axes is None else tuple(axis.role for axis in axes)
                leaf = path.rpartition("/")[2]
                for choices in itertools.product(*_choices(rule, axes or (), shape)):
                    index = {choice.axis: choice.entry for choice in choices}
                    name = rule.parameter(values | {choice.var: choice.name for choice in choices}, leaf)
                    yield TorchParameter(name, _kind(rule, leaf), path, shape, roles, index, rule.text, order)
                return


def _kind(rule: NameRule, leaf: str) -> str:
    if rule.leaf == "*" and leaf == "embedding":
        return "embedding"
    return "linear" if leaf in BIASES else rule.kind


class _Choice(NamedTuple):
    """One entry or part along an axis: what its placeholder is in the torch name, and where it lies."""

    axis: int
    var: str
    name: str
    entry: int | slice


def _choices(rule: NameRule, axes: tuple[Axis, ...], shape: Shape) -> list[list[_Choice]]:
    """For each axis with a placeholder, what may fill it."""
    choices = []
    for i, (axis, size) in enumerate(zip(axes, shape, strict=False)):
        if axis.var is None:
            continue
        if axis.role != "stack":
            names, entries = [name for name, _ in axis.parts], _slices(rule, axis, size)
        elif axis.parts and len(axis.parts) != size:
            raise ValueError(f"Name rule {rule.text!r} names {len(axis.parts)} entries of an axis of size {size}.")
        else:
            names, entries = [name for name, _ in axis.parts] or [str(n) for n in range(size)], range(size)
        choices.append([_Choice(i, axis.var, name, entry) for name, entry in zip(names, entries, strict=True)])
    return choices


def _slices(rule: NameRule, axis: Axis, size: int) -> list[slice]:
    """Where the parts that lie side by side along an axis begin and end."""
    sizes = [part if part is not None else size // len(axis.parts) for _, part in axis.parts]
    if sum(sizes) != size:
        raise ValueError(f"Name rule {rule.text!r} splits an axis of size {size} into {sizes}, {sum(sizes)} in all.")
    stops = list(itertools.accumulate(sizes))
    return [slice(stop - length, stop) for stop, length in zip(stops, sizes, strict=True)]


def _duplicate(first: TorchParameter, second: TorchParameter) -> ValueError:
    return ValueError(
        f"Two leaves map to one torch parameter, {first.name}: {first.path} by the rule {first.rule!r}, and "
        f"{second.path} by {second.rule!r}. Narrow one of the rules."
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
