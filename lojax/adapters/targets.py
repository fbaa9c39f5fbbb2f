"""Targets compiled to a plan: which rule each parameter gets. After this no pattern is seen again."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lojax.adapters.metadata import unbox
from lojax.adapters.rule import Rule, Target, listed

BIASES = ("none", "all", "lora_only")
"""Which biases train beside the adapters, in PEFT's words."""


def compile_glob(glob: str) -> re.Pattern[str]:
    """A glob over paths: ``*`` and ``?`` stay within a level, ``**/`` crosses any number of them.

    >>> bool(compile_glob("**/query/kernel").fullmatch("params/layer_0/query/kernel"))
    True
    >>> bool(compile_glob("*/kernel").fullmatch("params/layer_0/query/kernel"))
    False
    """
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = [
        meaning.get(token) or (token.replace("[!", "[^") if token[:1] == "[" else re.escape(token))
        for token in tokens
        if token
    ]
    return re.compile("".join(parts))


def matches(target: Target, path: str, leaf: Any) -> bool:
    """Whether one target picks the parameter at ``path``."""
    if isinstance(target, str):
        return compile_glob(target).fullmatch(path) is not None
    if isinstance(target, re.Pattern):
        return target.fullmatch(path) is not None
    return bool(target(path, leaf))


def plan(
    params: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    full: Sequence[Rule] = (),
    exclude: Sequence[Rule] = (),
    bias: str = "none",
) -> dict[str, Rule]:
    """The rule of every parameter that has one: the first whose targets match, unless excluded.

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
    excluded = {path for rule in exclude for path in _matched(rule, params)}
    chosen: dict[str, Rule] = {}
    for rule in rules:
        paths = _matched(rule, params)
        fresh = [path for path in paths if path not in chosen]
        if not fresh:
            _contradiction(rule, paths[0], chosen[paths[0]])
        chosen |= dict.fromkeys(fresh, rule)
    for rule in full:
        for path in _matched(rule, params):
            if path not in excluded and path in chosen and chosen[path].train in ("lora", "tokens"):
                _overlap(rule, path, chosen[path])
            chosen.setdefault(path, rule)
    for path in biases(params, chosen, bias):
        chosen.setdefault(path, Rule(path, train="full"))
    chosen = {path: rule for path, rule in chosen.items() if path not in excluded and rule.train != "none"}
    if not chosen:
        raise ValueError("Nothing trains: no parameter is left by targets=, train= and exclude=.")
    for path, rule in chosen.items():
        _check_weight(path, params[path], rule)
    return chosen


def checked_bias(which: str) -> str:
    """``which``, or an error if it is none of `BIASES`."""
    if which not in BIASES:
        raise ValueError(f"bias={which!r}; expected one of {', '.join(map(repr, BIASES))}.")
    return which


def biases(params: Mapping[str, Any], chosen: Mapping[str, Rule], which: str) -> list[str]:
    """The paths of the biases that ``which`` names, by their last part: ``bias``, or ``b`` as in Haiku.

    Args:
        params: The parameters by path.
        chosen: The rules of the other parameters.
        which: As in `plan`.

    Raises:
        ValueError: There is no such bias.
    """
    found = [path for path in params if path.rpartition("/")[2] in ("bias", "b")] if which != "none" else []
    if which == "lora_only":
        beside = {path.rpartition("/")[0] for path, rule in chosen.items() if rule.train == "lora"}
        found = [path for path in found if path.rpartition("/")[0] in beside]
    if not found and which != "none":
        where = "" if which == "all" else " beside a weight with an adapter"
        raise ValueError(
            f"bias={which!r}: none of the {len(params)} parameters{where} is called 'bias' or 'b'. "
            'Leave bias="none", or name the parameters in train=.'
        )
    return found


def _matched(rule: Rule, params: Mapping[str, Any]) -> list[str]:
    targets = listed(rule.targets)
    found: dict[str, None] = {}
    for target in targets:
        hits = [path for path, leaf in params.items() if matches(target, path, leaf)]
        if not hits:
            raise ValueError(_nothing(target, list(params)))
        found |= dict.fromkeys(hits)
    if not found:
        raise ValueError(f"{rule} has no targets. Give a glob, a regex or a predicate.")
    if not (kept := [path for path in found if _in_layers(rule, path)]):
        numbers = sorted({layer_of(path) for path in found})  # type: ignore[type-var]
        raise ValueError(f"{rule}: none of its weights is in layers {rule.layers}; theirs are {numbers}.")
    return kept


def layer_of(path: str) -> int | None:
    """The layer that a path names: the first number that one of its parts ends in.

    >>> layer_of("params/encoder/layer_3/query/kernel"), layer_of("h/11/c_attn/w"), layer_of("layers/kernel")
    (3, 11, None)
    """
    for part in path.split("/"):
        if found := re.search(r"\d+$", part):
            return int(found[0])
    return None


def _in_layers(rule: Rule, path: str) -> bool:
    number = layer_of(path)
    return rule.layers is None or number is None or number in rule.layers


def _nothing(target: Target, paths: list[str]) -> str:
    spelled = target if isinstance(target, str) else getattr(target, "pattern", None)
    if spelled is None:
        name = getattr(target, "__name__", repr(target))
        near, spelled = paths[:5], f"predicate {name}"
    else:
        near, spelled = nearest(spelled, paths), repr(spelled)
    listed = "".join(f"\n  {path}" for path in near) or "\n  (the tree has no parameters)"
    return f"Target {spelled} matches none of the {len(paths)} parameters. The nearest paths:{listed}"


def nearest(spelled: str, paths: Sequence[str], count: int = 5) -> list[str]:
    """The paths most like a pattern, word by word, best first."""
    words = re.findall(r"\w+", spelled)

    @functools.cache
    def alike(word: str, other: str) -> float:
        return difflib.SequenceMatcher(None, word, other).ratio()

    def likeness(path: str) -> float:
        others = re.findall(r"\w+", path)
        return sum(max((alike(word, other) for other in others), default=0.0) for word in words)

    return sorted(paths, key=likeness, reverse=True)[:count]


def _contradiction(rule: Rule, path: str, winner: Rule) -> None:
    raise ValueError(
        f"{path} is matched by contradictory rules: {winner} comes first, so {rule} never applies to "
        "anything. Remove one, narrow its targets, or put the narrower rule first."
    )


def _overlap(rule: Rule, path: str, winner: Rule) -> None:
    raise ValueError(
        f"{path} is matched by contradictory rules: targets= adapts it ({winner}), train= trains it in full "
        f'({rule}). Narrow one of them, or say which wins: put lojax.Rule({path!r}, train="full") first in targets=.'
    )


def _check_weight(path: str, leaf: Any, rule: Rule) -> None:
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
