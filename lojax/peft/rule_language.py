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
        is_repeated: Whether it stands for any number of axes.
    """

    role: str
    var: str | None = None
    parts: tuple[tuple[str, int | None], ...] = ()
    is_repeated: bool = False


@dataclasses.dataclass(frozen=True)
class NameRule:
    """One parsed line.

    Attributes:
        text: The line itself, for errors.
        pattern: Matches the JAX path; its groups are the placeholders.
        axes: As in the brackets, or None.
        template: The torch name, a format string.
        torch_spelling: Per placeholder, JAX spelling to torch spelling.
        kind: One of `KINDS`.
        leaf: The last level of the path as written.
    """

    text: str
    pattern: re.Pattern[str]
    axes: tuple[Axis, ...] | None
    template: str
    torch_spelling: Mapping[str, Mapping[str, str]]
    kind: str
    leaf: str

    def match(self, path: str, ndim: int) -> tuple[dict[str, str], tuple[Axis, ...] | None] | None:
        """The values of the placeholders and the axes of a leaf, or None where the rule does not fit."""
        match = self.pattern.fullmatch(path)
        if match is None:
            return None
        values = {}
        for var, text in match.groupdict().items():
            values[var] = self.torch_spelling.get(var, {}).get(text, text.replace("/", ".")) if text else ""
        for axes in self._axes(ndim, path.rpartition("/")[2]):
            if axes is None or len(axes) == ndim:
                return values, axes
        return None

    def _axes(self, ndim: int, leaf: str) -> list[tuple[Axis, ...] | None]:
        if self.axes is None and self.kind == "conv":
            return [_expand((Axis("in", is_repeated=True), Axis("out")), ndim)]
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
    extra = ndim - sum(not axis.is_repeated for axis in axes)
    return tuple(one for axis in axes for one in ([Axis(axis.role)] * max(extra, 0) if axis.is_repeated else [axis]))


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
        raise _syntax_error(line, "expected one '<->' between a JAX path and a torch name")
    left, right = (side.strip() for side in sides)
    right, _, kind = (part.strip() for part in right.partition(" : "))
    path, bracket = left, None
    if left.endswith("]"):
        path, _, bracket = left[:-1].rpartition("[")
    axes = None if bracket is None else tuple(_axis(line, text) for text in _split(bracket))
    leaf = re.split(r"[/)]", path.strip())[-1]
    if kind and kind not in KINDS:
        raise _syntax_error(line, f"kind {kind!r} is not one of {', '.join(KINDS)}")
    pattern, torch_spelling = _pattern(line, path.strip())
    template = _template(right)
    for k, (jax, torch) in enumerate(zip(_OPTIONAL.findall(path), _OPTIONAL.findall(right), strict=False)):
        torch_spelling[f"opt{k}"] = {jax: torch}
    _check_holes(line, pattern, axes, template)
    return NameRule(line, pattern, axes, template, torch_spelling, kind or _kind(leaf), leaf)


def _kind(leaf: str) -> str:
    return "embedding" if leaf == "embedding" else "linear"


def _syntax_error(line: str, reason: str) -> ValueError:
    return ValueError(f"Name rule {line!r}: {reason}. See lojax.peft.rule_language for the language.")


def _split(bracket: str) -> list[str]:
    return [text.strip() for text in re.split(r",(?![^{]*\})", bracket) if text.strip()]


def _axis(line: str, text: str) -> Axis:
    if text in ("in", "out", "expert"):
        return Axis(text)
    if text in ("in*", "out*"):
        return Axis(text[:-1], is_repeated=True)
    match = re.fullmatch(r"\{(\w+)(?::([^}]*))?\}(?:\*(in|out))?", text)
    if match is None:
        raise _syntax_error(
            line, f"axis {text!r} is not one of in, out, in*, out*, expert, {{i}}, {{p:a,b}}, {{p:a,b}}*out"
        )
    var, names, role = match.groups()
    if role and not names:
        raise _syntax_error(line, f"axis {text!r} needs the names of its parts, as in {{p:a,b}}*{role}")
    pairs = [name.strip().partition("=") for name in names.split(",")] if names else []
    if any(size and not size.isdigit() for _, _, size in pairs):
        raise _syntax_error(line, f"axis {text!r}: sizes are numbers, as in {{p:a=64,b=32}}*out")
    parts = tuple((name.strip(), int(size) if size else None) for name, _, size in pairs)
    return Axis(role or "stack", var, parts)


_OPTIONAL = re.compile(r"\(([^)]*)\)")
_HOLE = re.compile(r"\{(\w+)(\*{0,2})(?::([^}]*))?\}|\(([^)]*)\)|\*")


def _pattern(line: str, path: str) -> tuple[re.Pattern[str], dict[str, dict[str, str]]]:
    torch_spelling: dict[str, dict[str, str]] = {}
    optional = 0

    def regex(hole: re.Match[str]) -> str:
        nonlocal optional
        var, stars, names, optional_text = hole.groups()
        if optional_text is not None:
            optional += 1
            return f"(?P<opt{optional - 1}>{re.escape(optional_text)})?"
        if var is None:
            return f"(?P<leaf>{'|'.join((*WEIGHTS, *BIASES))})"
        if names:
            pairs = [name.strip().partition("=") for name in names.split(",")]
            torch_spelling[var] = {jax: torch or jax.replace("/", ".") for jax, _, torch in pairs}
            return f"(?P<{var}>{'|'.join(map(re.escape, torch_spelling[var]))})"
        return f"(?P<{var}>{['[0-9]+', '[^/]+', '.+'][len(stars)]})"

    pieces, end = [], 0
    for hole in _HOLE.finditer(path):
        pieces += [re.escape(path[end : hole.start()]), regex(hole)]
        end = hole.end()
    pieces.append(re.escape(path[end:]))
    try:
        return re.compile("(?:params/)?" + "".join(pieces)), torch_spelling
    except re.error as error:
        raise _syntax_error(line, f"the path does not parse ({error})") from None


def _template(right: str) -> str:
    numbers = iter(range(100))
    text = _OPTIONAL.sub(lambda _: f"{{opt{next(numbers)}}}", right)
    return re.sub(r"\{(\w+)[^}]*\}", r"{\1}", text)


def _check_holes(line: str, pattern: re.Pattern[str], axes: tuple[Axis, ...] | None, template: str) -> None:
    path_holes = set(pattern.groupindex) - {"leaf"} | {axis.var for axis in axes or () if axis.var}
    name_holes = set(re.findall(r"\{(\w+)\}", template))
    for var in sorted(path_holes ^ name_holes):
        side, other = ("left", "right") if var in path_holes else ("right", "left")
        what = "an optional (...)" if var.startswith("opt") else f"placeholder {{{var}}}"
        raise _syntax_error(line, f"{what} is on the {side} but not on the {other}")
