"""Which frozen leaves a program uses through a chain that changes them (see `frozen_chains`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from lojax.compat import opened, scan_counts
from lojax.lowrank.frozen import DenseWeight, recomputed
from lojax.lowrank.value import LowRank
from lojax.rewrite.frozen_chains import Value
from lojax.rewrite.primitives import CALLS, CHAINED, JOINS, MOVES, MULTIPLICATIONS
from lojax.types import Eqn, Jaxpr

WORTHWHILE = 1024
"""The entries of the largest leaf of a chain that is deferred. Below, the result may as well be saved."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What a variable is made of, if it is made of frozen leaves alone.

    Attributes:
        leaves: The numbers of the leaves.
        changed: Whether their values were changed, and not only moved.
    """

    leaves: frozenset[int]
    changed: bool = False


def defer_chains(jaxpr: Jaxpr, values: Sequence[Value]) -> list[Value]:
    """The inputs of ``jaxpr``, with those that a chain leads from ready to be recomputed, and other weights as arrays.

    Of an adapted weight, this concerns its frozen part; it keeps its update.
    """
    if any(isinstance(value, LowRank) and value.pending for value in values):
        # The program makes adapted weights of codes. Which of the other leaves are their scales shows only later, where
        # it may multiply the output of a product: every leaf stays known as frozen.
        return list(values)
    weights = [value.frozen if isinstance(value, LowRank) and not value.probe else value for value in values]
    size_of = {i: math.prod(weight.shape) for i, weight in enumerate(weights) if isinstance(weight, DenseWeight)}
    chains: set[frozenset[int]] = set()
    _follow(jaxpr, [Source(frozenset([i])) if i in size_of else None for i in range(len(values))], chains)
    chained = {i for leaves in chains if max(size_of[i] for i in leaves) >= WORTHWHILE for i in leaves}

    def defer(i: int, value: Value) -> Value:
        if isinstance(value, LowRank):
            return value.with_frozen(recomputed(value.frozen)) if i in chained else value
        if isinstance(value, DenseWeight) and i not in chained:
            return value.array
        return value

    return [defer(i, v) for i, v in enumerate(values)]


def _follow(jaxpr: Jaxpr, sources: Sequence[Source | None], chains: set[frozenset[int]]) -> list[Source | None]:
    """The sources of the outputs of ``jaxpr``. The leaves that reach a product changed are added to ``chains``."""
    jaxpr, _ = opened(jaxpr)
    source_of: dict[Any, Source] = {v: s for v, s in zip(jaxpr.invars, sources, strict=True) if s is not None}
    constants = set(jaxpr.constvars)

    def read(variables: Sequence[Any]) -> list[Source | None]:
        return [None if isinstance(v, Literal) else source_of.get(v) for v in variables]

    for eqn in jaxpr.eqns:
        inputs = read(eqn.invars)
        if not any(inputs):
            continue
        name = eqn.primitive.name
        if name == "gather" and inputs[1] is not None and inputs[1].changed:  # codes that are looked up in a code book
            source_of[eqn.outvars[0]] = Source(frozenset().union(*(s.leaves for s in inputs if s)), True)
        elif name in MULTIPLICATIONS:
            chains.update(s.leaves for s in inputs if s is not None and s.changed)
        elif name in CHAINED or (name in JOINS and all(s is not None and s.changed for s in inputs)):
            free = [isinstance(v, Literal) or v in constants for v in eqn.invars]
            if all(s is not None or is_free for s, is_free in zip(inputs, free, strict=True)):
                made_of = [s for s in inputs if s is not None]
                changed = name not in MOVES or any(s.changed for s in made_of)
                source_of[eqn.outvars[0]] = Source(frozenset().union(*(s.leaves for s in made_of)), changed)
        else:
            outputs = _follow_bodies(eqn, inputs, chains)
            source_of |= {v: s for v, s in zip(eqn.outvars, outputs, strict=True) if s is not None}
    return read(jaxpr.outvars)


def _follow_bodies(eqn: Eqn, inputs: Sequence[Source | None], chains: set[frozenset[int]]) -> list[Source | None]:
    """The sources of the outputs of an equation with bodies."""
    name, p = eqn.primitive.name, eqn.params
    none: list[Source | None] = [None] * len(eqn.outvars)
    if name in CALLS:
        return _follow(p["call_jaxpr" if "call_jaxpr" in p else "jaxpr"], inputs, chains)
    if name == "cond":
        for branch in p["branches"]:
            _follow(branch, inputs[1:], chains)
    elif name == "scan":
        num_consts, num_carry = scan_counts(p)
        _follow_loop(p["jaxpr"], inputs, num_consts, num_carry, chains)
    elif name == "while":
        num_cond = p["cond_nconsts"]
        _follow_loop(p["body_jaxpr"], inputs[num_cond:], p["body_nconsts"], len(eqn.outvars), chains)
    return none


def _follow_loop(
    body: Jaxpr, inputs: Sequence[Source | None], num_consts: int, num_carry: int, chains: set[frozenset[int]]
) -> None:
    """Follows what a loop does not change: constants, entries, and carries that come out as they go in."""
    opened_body, _ = opened(body)
    sources = list(inputs)
    for i in range(num_carry):
        if opened_body.outvars[i] is not opened_body.invars[num_consts + i]:
            sources[num_consts + i] = None
    _follow(body, sources, chains)
