"""The rule language between JAX paths and torch names. A map is data: one line a rule.

    layers/{i}/attn/query/kernel[in, out, out]    <-> model.layers.{i}.self_attn.q_proj
    layers/attn/kv[{i}, {p:k_proj,v_proj}, in, out] <-> model.layers.{i}.self_attn.{p}
    (model/)embed/embedding                       <-> (model.)embed_tokens

Left is the path of a leaf, right the torch *module* (its ``.weight`` or ``.bias`` is understood).

- ``{i}`` is a number, ``{m*}`` one level, ``{m**}`` several, ``{m:a,b=c}`` one of a few names (``a`` on
  both sides; ``b`` here, ``c`` in torch). ``(x)`` may be absent, then it is absent on both sides.
- A last level ``*`` stands for every leaf of the module: kernel, embedding, scale, weight, bias.
- ``[...]`` gives the role of each axis: ``in``, ``out``, ``in*`` (any number of them), ``expert``; ``{i}`` or
  ``{p:a,b}`` where each entry along the axis is a module of its own; ``{p:a=64,b=32}*out`` where modules lie
  side by side along one axis (sizes may be left out where all are alike). Without it a matrix is ``[in, out]``.
- ``: kind`` at the end: ``linear``, ``conv1d`` (GPT-2's), ``embedding``, ``conv``, ``experts`` (right is a
  parameter ``[expert, out, in]``), ``experts_t`` (``[expert, in, out]``), ``param`` (right is a parameter).

A leading ``params/`` of a Linen tree is understood. The first rule that fits a leaf's path and number of
axes wins.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

KINDS = ("linear", "conv1d", "embedding", "conv", "experts", "experts_t", "param")
WEIGHTS = ("kernel", "embedding", "scale", "weight", "w")
BIASES = ("bias", "b")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a leaf.

    Attributes:
        role: ``"in"``, ``"out"``, ``"stack"`` (each entry is a module) or ``"expert"``.
        var: The placeholder that the entries or parts of this axis fill, if any.
        parts: Their torch names and sizes (None where they are alike); empty for numbers.
        many: Whether it stands for any number of axes.
    """

    role: str
    var: str | None = None
    parts: tuple[tuple[str, int | None], ...] = ()
    many: bool = False


@dataclasses.dataclass(frozen=True)
class NameRule:
    """One parsed line.

    Attributes:
        text: The line itself, for errors.
        pattern: Matches the JAX path; its groups are the placeholders.
        axes: As in the brackets, or None.
        template: The torch name, a format string.
        spelled: Per placeholder, JAX spelling to torch spelling.
        kind: One of `KINDS`.
        leaf: The last level of the path as written.
    """

    text: str
    pattern: re.Pattern[str]
    axes: tuple[Axis, ...] | None
    template: str
    spelled: Mapping[str, Mapping[str, str]]
    kind: str
    leaf: str

    def match(self, path: str, ndim: int) -> tuple[dict[str, str], tuple[Axis, ...] | None] | None:
        """The values of the placeholders and the axes of a leaf, or None where the rule does not fit."""
        found = self.pattern.fullmatch(path)
        if not found:
            return None
        values = {}
        for var, text in found.groupdict().items():
            spelled = self.spelled.get(var, {})
            values[var] = spelled.get(text, text.replace("/", ".")) if text else ""
        for axes in self._axes(ndim, path.rpartition("/")[2]):
            if axes is None or len(axes) == ndim:
                return values, axes
        return None

    def _axes(self, ndim: int, leaf: str) -> list[tuple[Axis, ...] | None]:
        if self.axes is None and self.kind == "conv":
            return [_expand((Axis("in", many=True), Axis("out")), ndim)]
        if self.axes is None:
            return [{0: (), 1: (Axis("out"),), 2: (Axis("in"), Axis("out"))}.get(ndim)]
        whole = _expand(self.axes, ndim)
        if self.leaf != "*" or leaf in ("kernel", "embedding", "w"):
            return [whole]
        vector = _expand(tuple(axis for axis in self.axes if axis.role != "in"), ndim)  # beside such a weight
        return [whole, vector] if leaf == "weight" else [vector]

    def parameter(self, values: Mapping[str, str], leaf: str) -> str:
        """The torch parameter's name for these values of the placeholders."""
        name = self.template.format_map(dict(values))
        if self.kind in ("experts", "experts_t", "param"):
            return name
        return f"{name}.{'bias' if leaf in BIASES else 'weight'}"


def _expand(axes: tuple[Axis, ...], ndim: int) -> tuple[Axis, ...]:
    extra = ndim - sum(not axis.many for axis in axes)
    return tuple(one for axis in axes for one in ([Axis(axis.role)] * max(extra, 0) if axis.many else [axis]))


def parse_rule(line: str) -> NameRule:
    """Parses one line.

    Raises:
        ValueError: The line is not of the language; the text says where.

    >>> rule = parse_rule("layer_{i}/query/kernel <-> encoder.layer.{i}.query")
    >>> values, axes = rule.match("params/layer_3/query/kernel", 2)
    >>> rule.parameter(values, "kernel"), [axis.role for axis in axes]
    ('encoder.layer.3.query.weight', ['in', 'out'])
    """
    sides = line.split("<->")
    if len(sides) != 2:
        raise _wrong(line, "expected one '<->' between a JAX path and a torch name")
    left, right = (side.strip() for side in sides)
    right, _, kind = (part.strip() for part in right.partition(" : "))
    path, bracket = left, None
    if left.endswith("]"):
        path, _, bracket = left[:-1].rpartition("[")
    axes = None if bracket is None else tuple(_axis(line, text) for text in _split(bracket))
    leaf = re.split(r"[/)]", path.strip())[-1]
    if kind and kind not in KINDS:
        raise _wrong(line, f"kind {kind!r} is none of {', '.join(KINDS)}")
    pattern, spelled = _pattern(line, path.strip())
    template = _template(right)
    for k, (here, there) in enumerate(zip(_OPTIONAL.findall(path), _OPTIONAL.findall(right), strict=False)):
        spelled[f"opt{k}"] = {here: there}
    _check_holes(line, pattern, axes, template)
    return NameRule(line, pattern, axes, template, spelled, kind or _kind(leaf), leaf)


def _kind(leaf: str) -> str:
    return "embedding" if leaf == "embedding" else "linear"


def _wrong(line: str, reason: str) -> ValueError:
    return ValueError(f"Name rule {line!r}: {reason}. See lojax.peft.rule_language for the language.")


def _split(bracket: str) -> list[str]:
    return [text.strip() for text in re.split(r",(?![^{]*\})", bracket) if text.strip()]


def _axis(line: str, text: str) -> Axis:
    if text in ("in", "out", "expert"):
        return Axis(text)
    if text in ("in*", "out*"):
        return Axis(text[:-1], many=True)
    found = re.fullmatch(r"\{(\w+)(?::([^}]*))?\}(?:\*(in|out))?", text)
    if not found:
        raise _wrong(line, f"axis {text!r} is none of in, out, in*, out*, expert, {{i}}, {{p:a,b}}, {{p:a,b}}*out")
    var, names, role = found.groups()
    if role and not names:
        raise _wrong(line, f"axis {text!r} needs the names of its parts, as in {{p:a,b}}*{role}")
    pairs = [name.strip().partition("=") for name in names.split(",")] if names else []
    if any(size and not size.isdigit() for _, _, size in pairs):
        raise _wrong(line, f"axis {text!r}: sizes are numbers, as in {{p:a=64,b=32}}*out")
    parts = tuple((name.strip(), int(size) if size else None) for name, _, size in pairs)
    return Axis(role or "stack", var, parts)


_OPTIONAL = re.compile(r"\(([^)]*)\)")
_HOLE = re.compile(r"\{(\w+)(\*{0,2})(?::([^}]*))?\}|\(([^)]*)\)|\*")


def _pattern(line: str, path: str) -> tuple[re.Pattern[str], dict[str, dict[str, str]]]:
    spelled: dict[str, dict[str, str]] = {}
    optional = 0

    def regex(found: re.Match[str]) -> str:
        nonlocal optional
        var, stars, names, maybe = found.groups()
        if maybe is not None:
            optional += 1
            return f"(?P<opt{optional - 1}>{re.escape(maybe)})?"
        if var is None:
            return f"(?P<leaf>{'|'.join((*WEIGHTS, *BIASES))})"
        if names:
            pairs = [name.strip().partition("=") for name in names.split(",")]
            spelled[var] = {jax: torch or jax.replace("/", ".") for jax, _, torch in pairs}
            return f"(?P<{var}>{'|'.join(map(re.escape, spelled[var]))})"
        return f"(?P<{var}>{['[0-9]+', '[^/]+', '.+'][len(stars)]})"

    pieces, end = [], 0
    for found in _HOLE.finditer(path):
        pieces += [re.escape(path[end : found.start()]), regex(found)]
        end = found.end()
    pieces.append(re.escape(path[end:]))
    try:
        return re.compile("(?:params/)?" + "".join(pieces)), spelled
    except re.error as error:
        raise _wrong(line, f"the path does not parse ({error})") from None


def _template(right: str) -> str:
    numbers = iter(range(100))
    text = _OPTIONAL.sub(lambda found: f"{{opt{next(numbers)}}}", right)
    return re.sub(r"\{(\w+)[^}]*\}", r"{\1}", text)


def _check_holes(line: str, pattern: re.Pattern[str], axes: Any, template: str) -> None:
    left = set(pattern.groupindex) - {"leaf"} | {axis.var for axis in axes or () if axis.var}
    right = set(re.findall(r"\{(\w+)\}", template))
    for var in sorted(left ^ right):
        side, other = ("left", "right") if var in left else ("right", "left")
        spelled = "an optional (...)" if var.startswith("opt") else f"placeholder {{{var}}}"
        raise _wrong(line, f"{spelled} is on the {side} but not on the {other}")
