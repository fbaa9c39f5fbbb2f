"""Which rule each parameter gets. After this no pattern is seen again."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax.numpy as jnp

from lojax.adapters.metadata import unbox
from lojax.adapters.rule import Rule, Target, as_targets
from lojax.text import suggest
from lojax.types import Leaf, Path

BIASES = ("none", "all", "lora_only")
"""Which biases train beside the adapters, in PEFT's words."""


@functools.cache
def compile_glob(glob: str) -> re.Pattern[str]:
    """A glob over paths: ``*`` and ``?`` stay within a level, ``**/`` crosses any number of them.

    >>> bool(compile_glob("**/query/kernel").fullmatch("params/layer_0/query/kernel"))
    True
    >>> bool(compile_glob("*/kernel").fullmatch("params/layer_0/query/kernel"))
    False
    """
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = [
        meaning.get(token) or (token.replace("[!", "[^") if token[:1] == "[" else re.escape(token))
        for token in tokens
        if token
    ]
    return re.compile("".join(pieces))


def matches(target: Target, path: Path, leaf: Leaf) -> bool:
    """Whether one target picks the parameter at ``path``."""
    if isinstance(target, str):
        return compile_glob(target).fullmatch(path) is not None
    if isinstance(target, re.Pattern):
        return target.fullmatch(path) is not None
    return bool(target(path, leaf))


def assign_rules(
    params: Mapping[Path, Leaf],
    rules: Sequence[Rule],
    *,
    full: Sequence[Rule] = (),
    exclude: Sequence[Rule] = (),
    bias: str = "none",
) -> dict[Path, Rule]:
    """The rule of every parameter that trains: the first whose targets match, unless excluded.

    Args:
        params: The parameters by path (see `lojax.adapters.paths.flatten`).
        rules: In order of precedence.
        full: Rules of parameters trained in full, with no precedence over ``rules`` or under them.
        exclude: Rules whose matches stay frozen whatever the others say.
        bias: Which biases train in full as well: ``"none"``, ``"all"``, or ``"lora_only"``, those beside a weight
            with an adapter.

    Raises:
        ValueError: A target matches nothing; there is no bias where some are asked for; a rule is wholly hidden by
            earlier ones; a path is adapted by ``rules`` and trained in full by ``full``; a parameter that
            cannot train so is matched; nothing trains.
    """
    params = {path: unbox(leaf) for path, leaf in params.items() if leaf is not None}
    excluded = {path for rule in exclude for path in _match(rule, params)}
    plan: dict[Path, Rule] = {}
    for rule in rules:
        paths = _match(rule, params)
        new_paths = [path for path in paths if path not in plan]
        if not new_paths:
            _raise_hidden(rule, paths[0], plan[paths[0]])
        plan |= dict.fromkeys(new_paths, rule)
    for rule in full:
        for path in _match(rule, params):
            if path not in excluded and path in plan and plan[path].train in ("lora", "tokens"):
                _raise_overlap(rule, path, plan[path])
            plan.setdefault(path, rule)
    for path in find_biases(params, plan, bias):
        plan.setdefault(path, Rule(path, train="full"))
    plan = {path: rule for path, rule in plan.items() if path not in excluded and rule.train != "none"}
    if not plan:
        raise ValueError("Nothing trains: no parameter is left by targets=, train= and exclude=.")
    for path, rule in plan.items():
        _check_weight(path, params[path], rule)
    return plan


def check_bias(bias: str) -> str:
    """``bias``, or an error if it is not one of `BIASES`."""
    if bias not in BIASES:
        raise ValueError(f"bias={bias!r}; expected one of {', '.join(map(repr, BIASES))}.{suggest(bias, BIASES)}")
    return bias


def find_biases(params: Mapping[Path, Leaf], plan: Mapping[Path, Rule], bias: str) -> list[Path]:
    """The paths of the biases that ``bias`` names, by their last part: ``bias``, or ``b`` as in Haiku.

    Args:
        params: The parameters by path.
        plan: The rules of the other parameters.
        bias: As in `assign_rules`.

    Raises:
        ValueError: There is no such bias.
    """
    if bias == "none":
        return []
    paths = [path for path in params if path.rpartition("/")[2] in ("bias", "b")]
    if bias == "lora_only":
        adapted_modules = {path.rpartition("/")[0] for path, rule in plan.items() if rule.train == "lora"}
        paths = [path for path in paths if path.rpartition("/")[0] in adapted_modules]
    if not paths:
        where = "" if bias == "all" else " beside a weight with an adapter"
        raise ValueError(
            f"bias={bias!r}: none of the {len(params)} parameters{where} is called 'bias' or 'b'. "
            'Leave bias="none", or name the parameters in train=.'
        )
    return paths


def _match(rule: Rule, params: Mapping[Path, Leaf]) -> list[Path]:
    """The paths that the targets of a rule match, in its layers."""
    paths: dict[Path, None] = {}  # a set that keeps its order
    for target in as_targets(rule.targets):
        matched = [path for path, leaf in params.items() if matches(target, path, leaf)]
        if not matched:
            raise ValueError(_no_match_text(target, list(params)))
        paths |= dict.fromkeys(matched)
    if not paths:
        raise ValueError(f"{rule} has no targets. Give a glob, a regex or a predicate.")
    in_layers = [path for path in paths if _in_layers(rule, path)]
    if not in_layers:
        numbers = sorted({layer_of(path) for path in paths})  # type: ignore[type-var]
        raise ValueError(f"{rule}: none of its weights is in layers {rule.layers}; theirs are {numbers}.")
    return in_layers


def layer_of(path: Path) -> int | None:
    """The layer that a path names: the first number that one of its parts ends in.

    >>> layer_of("params/encoder/layer_3/query/kernel"), layer_of("h/11/c_attn/w"), layer_of("layers/kernel")
    (3, 11, None)
    """
    for part in path.split("/"):
        if number := re.search(r"\d+$", part):
            return int(number[0])
    return None


def _in_layers(rule: Rule, path: Path) -> bool:
    number = layer_of(path)
    return rule.layers is None or number is None or number in rule.layers


def _no_match_text(target: Target, paths: list[Path]) -> str:
    pattern = target if isinstance(target, str) else getattr(target, "pattern", None)
    if pattern is None:
        near, name = paths[:5], f"predicate {getattr(target, '__name__', repr(target))}"
    else:
        near, name = nearest(pattern, paths), repr(pattern)
    lines = "".join(f"\n  {path}" for path in near) or "\n  (the tree has no parameters)"
    return f"Target {name} matches none of the {len(paths)} parameters. The nearest paths:{lines}"


def nearest(pattern: str, paths: Sequence[Path], count: int = 5) -> list[Path]:
    """The paths most like a pattern, word by word, best first."""
    words = re.findall(r"\w+", pattern)

    # Word by word, so that a short path does not win over a long one by its length alone. A net has thousands of paths
    # but few words, hence the cache.
    @functools.cache
    def word_ratio(word: str, other: str) -> float:
        return difflib.SequenceMatcher(None, word, other).ratio()

    def likeness(path: Path) -> float:
        others = re.findall(r"\w+", path)
        return sum(max((word_ratio(word, other) for other in others), default=0.0) for word in words)

    return sorted(paths, key=likeness, reverse=True)[:count]


def _raise_hidden(rule: Rule, path: Path, winner: Rule) -> NoReturn:
    raise ValueError(
        f"{path} is matched by contradictory rules: {winner} comes first, so {rule} never applies to "
        "anything. Remove one, narrow its targets, or put the narrower rule first."
    )


def _raise_overlap(rule: Rule, path: Path, winner: Rule) -> NoReturn:
    raise ValueError(
        f"{path} is matched by contradictory rules: targets= adapts it ({winner}), train= trains it in full "
        f'({rule}). Narrow one of them, or say which wins: put lojax.Rule({path!r}, train="full") first in targets=.'
    )


def _check_weight(path: Path, leaf: Leaf, rule: Rule) -> None:
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if rule.train == "full":
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"{path} has dtype {dtype}: only floating-point parameters can be trained in full.")
        return
    if len(shape) < 2:
        kind = "a scalar" if not shape else "a vector"
        raise ValueError(
            f"{path} is {kind} of shape {shape}: a low-rank update needs at least two axes. "
            f'Train it in full with lojax.Rule({path!r}, train="full"), or narrow {rule.targets!r}.'
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{path} has dtype {dtype}: only real floating-point weights take an adapter.")
