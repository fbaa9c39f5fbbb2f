"""Which rule each parameter gets. After this no pattern is seen again."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax.numpy as jnp

from lojax.adapters.leaves import check_leaf
from lojax.adapters.metadata import unbox
from lojax.adapters.rule import Rule, Target, as_targets
from lojax.text import suggest
from lojax.types import Leaf, Path

BIASES = ("none", "all", "lora_only")
"""Which biases train beside the adapters, in PEFT's words."""


MAX_COMPARED, MAX_WORDS, MAX_WORD = 5000, 16, 40
"""How many paths, words of a path, and characters of a word an error compares to name the nearest paths."""


@functools.cache
def compile_glob(glob: str) -> re.Pattern[str]:
    """A glob over paths: ``*`` and ``?`` stay within a level, ``**/`` crosses any number of them, ``{a,b}`` is either.

    Raises:
        ValueError: A brace stays open.

    >>> bool(compile_glob("**/{query,value}/kernel").fullmatch("params/layer_0/query/kernel"))
    True
    >>> bool(compile_glob("*/kernel").fullmatch("params/layer_0/query/kernel"))
    False
    """
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    inside_braces = {"{": "(?:", "}": ")", ",": "|"}
    regex, depth = "", 0
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\]|[{},])", glob):
        if token == "{" or (depth and token in ("}", ",")):
            depth += {"{": 1, "}": -1, ",": 0}[token]
            regex += inside_braces[token]
        elif token[:1] == "[":
            regex += token.replace("[!", "[^")
        else:
            regex += meaning.get(token) or re.escape(token)
    if depth:
        raise ValueError(f"Target {glob!r} opens a brace that it does not close. Write alternatives as {{a,b}}.")
    return re.compile(regex)


def matches(target: Target, path: Path, leaf: Leaf) -> bool:
    """Whether one target picks the parameter at ``path``."""
    if isinstance(target, str):
        return target == path or compile_glob(target).fullmatch(path) is not None
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

    In a tree of Flax collections (a ``variables`` dict) globs and regexes stay in ``params``, unless they name another
    collection.

    Args:
        params: The parameters by path (see `lojax.adapters.paths.flatten`).
        rules: In order of precedence.
        full: Rules of parameters trained in full. They win over the patterns in ``rules``, as PEFT's
            ``modules_to_save`` do.
        exclude: Rules whose matches stay frozen whatever the others say.
        bias: Which biases train in full as well: ``"none"``, ``"all"``, or ``"lora_only"``, those beside a weight
            with an adapter.

    Raises:
        TypeError: A leaf is not an array.
        ValueError: A target matches nothing; there is no bias where some are asked for; a rule is wholly hidden by
            others or wholly excluded; a path that ``rules`` names itself is trained in full by ``full``; a parameter
            that cannot train so is matched; nothing trains.
    """
    params = {path: unbox(leaf) for path, leaf in params.items() if leaf is not None}
    for path, leaf in params.items():
        check_leaf(path, leaf, "params")
    matched = {id(rule): match_rule(rule, params) for rule in (*rules, *full, *exclude)}
    excluded = {path for rule in exclude for path in matched[id(rule)]}
    plan: dict[Path, Rule] = {}
    for rule in rules:
        paths = matched[id(rule)]
        new_paths = [path for path in paths if path not in plan]
        if not new_paths:
            _raise_hidden(rule, paths[0], plan[paths[0]])
        if rule._exact_rank and len(paths) > 1:  # a rank for many weights, the smallest of which may not have it
            rule = dataclasses.replace(rule, _exact_rank=False)
        plan |= dict.fromkeys(new_paths, rule)
    plan |= _full_training(plan, full, matched, excluded)
    for path in find_biases(params, plan, bias):
        plan.setdefault(path, Rule(path, train="full"))
    plan = {path: rule for path, rule in plan.items() if path not in excluded and rule.train != "none"}
    if not plan:
        raise ValueError("Nothing trains: no parameter is left by targets=, train= and exclude=.")
    for rule in (*rules, *full):
        if rule.train != "none" and not any(path in plan for path in matched[id(rule)]):
            raise ValueError(
                f"{rule} trains nothing: exclude= or an earlier rule freezes all that it matches, such as "
                f"{matched[id(rule)][0]}. Remove it, or narrow the other."
            )
    for path, rule in plan.items():
        _check_weight(path, params[path], rule)
    return plan


def _full_training(
    plan: Mapping[Path, Rule], full: Sequence[Rule], matched: Mapping[int, list[Path]], excluded: set[Path]
) -> dict[Path, Rule]:
    """The paths that ``full`` trains, those that it takes from the rules in ``plan`` included."""
    taken: dict[Path, Rule] = {}
    for rule in full:
        for path in matched[id(rule)]:
            if path in plan and (path in excluded or plan[path].train not in ("lora", "tokens")):
                continue  # frozen anyway, or the rules say themselves how it trains
            if path in plan and path in as_targets(plan[path].targets):
                _raise_overlap(rule, path, plan[path])
            taken.setdefault(path, rule)
    remaining = {id(rule) for path, rule in plan.items() if path not in taken}
    for path, rule in taken.items():
        if path in plan and id(plan[path]) not in remaining:
            _raise_overlap(rule, path, plan[path])
    return taken


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


def match_rule(rule: Rule, params: Mapping[Path, Leaf]) -> list[Path]:
    """The paths that the targets of a rule match, in its layers."""
    paths: dict[Path, None] = {}  # a set that keeps its order
    has_collections = any(path.startswith("params/") for path in params)
    for target in as_targets(rule.targets):
        matched = [path for path, leaf in params.items() if matches(target, path, leaf)]
        in_scope = [path for path in matched if not has_collections or _in_scope(target, path)]
        if not in_scope:
            raise ValueError(_no_match_text(rule, target, params, matched))
        paths |= dict.fromkeys(in_scope)
    if not paths:
        raise ValueError(f"{rule} has no targets. Give a glob, a regex or a predicate.")
    in_layers = [path for path in paths if _in_layers(rule, path)]
    if not in_layers:
        numbers = sorted({layer_of(path) for path in paths})  # type: ignore[type-var]
        raise ValueError(f"{rule}: none of its weights is in layers {rule.layers}; theirs are {numbers}.")
    return in_layers


def _in_scope(target: Target, path: Path) -> bool:
    """Whether a match counts: ``**/BatchNorm_0/*`` must not train the running mean in Flax's ``batch_stats``."""
    pattern = _pattern_of(target)
    collection = path.partition("/")[0]
    return pattern is None or collection == "params" or collection in pattern


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


def _pattern_of(target: Target) -> str | None:
    """The text of a glob or a regex; None for a predicate."""
    return target if isinstance(target, str) else getattr(target, "pattern", None)


def _no_match_text(rule: Rule, target: Target, params: Mapping[Path, Leaf], out_of_scope: Sequence[Path]) -> str:
    pattern, paths, hint = _pattern_of(target), list(params), ""
    if pattern is None:
        near, name = paths[:5], f"predicate {getattr(target, '__name__', repr(target))}"
    else:
        near, name = nearest(pattern, paths), repr(pattern)
    if out_of_scope:
        path = out_of_scope[0]
        return (
            f"Target {name} matches nothing in params, where patterns stay. It matches {path}: to mean that "
            f"collection, name it, as in '{path.partition('/')[0]}/{pattern}'."
        )
    if isinstance(target, str) and (globs := _globs_for_name(rule, target, params)):
        hint = f" Did you mean {' or '.join(map(repr, globs))}?"
    lines = "".join(f"\n  {path or '(the tree is a single array)'}" for path in near)
    lines = lines or "\n  (the tree has no parameters)"
    return f"Target {name} matches none of the {len(paths)} parameters.{hint} The nearest paths:{lines}"


def _globs_for_name(rule: Rule, name: str, params: Mapping[Path, Leaf]) -> list[str]:
    """The globs that a bare name stands for: ``query`` is ``**/query/kernel``, as ``target_modules`` are in PEFT."""
    words = name.split("/")
    suffixes: dict[str, None] = {}  # a set that keeps its order
    for path, leaf in params.items():
        parts = path.split("/")
        if rule.train == "lora" and jnp.ndim(leaf) < 2:
            continue
        for start in range(len(parts) - len(words) + 1):
            if parts[start : start + len(words)] == words:
                suffixes["/".join(parts[start:])] = None
    if len(suffixes) > 3:
        suffixes = dict.fromkeys(f"{name}/**/{suffix.rpartition('/')[2]}" for suffix in suffixes)
    return [f"**/{suffix}" for suffix in suffixes][:3]


def nearest(pattern: str, paths: Sequence[Path], count: int = 5) -> list[Path]:
    """The paths most like a pattern, word by word, best first. Of many paths, one of each form, numbers aside."""
    words = [word[:MAX_WORD] for word in re.findall(r"\w+", pattern)[:MAX_WORDS]]
    if len(paths) > MAX_COMPARED:  # comparing words takes 40 µs a path, which adds up where a file holds 200,000
        forms: dict[str, Path] = {}
        numbers = re.findall(r"\d+", pattern)
        for path in paths:
            form = re.sub(r"\d+", "0", path)
            if form not in forms or (numbers and re.findall(r"\d+", path) == numbers):
                forms[form] = path
        paths = list(forms.values())[:MAX_COMPARED]

    # Word by word, so that a short path does not win over a long one by its length alone. A net has thousands of paths
    # but few words, hence the cache.
    @functools.cache
    def word_ratio(word: str, other: str) -> float:
        return difflib.SequenceMatcher(None, word, other).ratio()

    def likeness(path: Path) -> float:
        others = [word[:MAX_WORD] for word in re.findall(r"\w+", path)[:MAX_WORDS]]
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
        f"({rule}). Take it out of one of them."
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
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):  # codes, see `create`
        raise ValueError(f"{path} has dtype {dtype}: only real floating-point weights take an adapter.")
