"""Frozen chains: what leads from frozen leaves to the weight of a product, such as a cast or a dequantization.

A chain that changes values is not computed where the program says, but at each product that uses it, forward and
again backward (`RecomputedWeight`). What JAX saves for the backward pass is then the leaf and not the result of the
chain. A chain that only moves values (a transpose) is computed as it stands: XLA makes it part of the product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias, cast

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal, Primitive

from lojax.compat import opened, scan_counts
from lojax.lowrank import steps
from lojax.lowrank.frozen import DenseWeight, FrozenWeight, RecomputedWeight, is_frozen, recomputed, slice_entry
from lojax.lowrank.lookup import Lookup
from lojax.lowrank.steps import Step
from lojax.lowrank.value import LowRank
from lojax.rewrite.primitives import ARITHMETIC, CALLS, CASTS, CHAINED, MOVES, MULTIPLICATIONS
from lojax.types import Array, Eqn, Jaxpr, Shape, Var

Value: TypeAlias = Any
"""The value of a variable: an array, a `LowRank`, or a frozen weight without an update."""

WORTHWHILE = 1024
"""The entries of the largest leaf of a chain that is put off. Below, the result may as well be saved."""


def evaluate_chained(eqn: Eqn, operands: Sequence[Value]) -> FrozenWeight | None:
    """The result of an equation on frozen weights alone, put off; None if the equation belongs to no chain."""
    if (entry := pick_entry(eqn, operands)) is not None:
        return entry
    if eqn.primitive.name not in CHAINED or len(eqn.outvars) != 1:
        return None
    weights: list[FrozenWeight] = []
    literals: list[tuple[int, Hashable]] = []
    for i, (var, value) in enumerate(zip(eqn.invars, operands, strict=True)):
        if is_frozen(value):
            weights.append(value)
        elif isinstance(var, Literal):
            literals.append((i, cast(Hashable, np.asarray(value)[()])))  # a NumPy scalar
        elif isinstance(value, Tracer):
            return None
        else:  # a constant of the program, such as a code book
            weights.append(DenseWeight(value))
    step = equation_step(eqn, tuple(literals))
    return None if step is None else RecomputedWeight(tuple(weights), step)


def evaluate_pending(eqn: Eqn, operands: Sequence[Value]) -> LowRank | None:
    """The result of a cast or of arithmetic on the codes of one adapted weight, whose update is still to be added.

    None for any other equation.
    """
    adapted = [v for v in operands if isinstance(v, LowRank)]
    if len(adapted) != 1 or eqn.primitive.name not in (*CASTS, *ARITHMETIC):
        return None
    (value,) = adapted
    weight = evaluate_chained(eqn, [v.frozen if v is value else v for v in operands])
    return value.with_frozen(weight) if weight is not None and weight.shape == value.shape else None


def settle_pending(eqn: Eqn, value: Value) -> Value:
    """``value`` with its update added, where the program moves or uses what it made of the codes.

    Raises:
        ValueError: These are still codes, to which no update can be added.
    """
    if not isinstance(value, LowRank) or not value.pending:
        return value
    if jnp.issubdtype(value.frozen.dtype, jnp.floating):
        return dataclasses.replace(value, pending=False)
    if eqn.primitive.name in (*MOVES, "stop_gradient", "copy") or value.probe:
        return value
    raise ValueError(
        f"{value.path}: holds codes of dtype {value.frozen.dtype}, and the net uses them in {eqn.primitive.name!r} "
        "before they become floating-point numbers, so there is nothing that an update could be added to. Take the "
        "weight out of targets, or let the net dequantize it first."
    )


def pick_entry(eqn: Eqn, operands: Sequence[Value]) -> FrozenWeight | None:
    """One entry along the first axis of a recomputed weight, if that is what the equation slices out of it."""
    weight, *starts = operands
    if eqn.primitive.name not in ("slice", "dynamic_slice") or any(is_frozen(start) for start in starts):
        return None
    if not isinstance(weight, RecomputedWeight):
        return None
    p, first = eqn.params, (1, *weight.shape[1:])
    if eqn.primitive.name == "dynamic_slice":
        index, sizes = starts[0], tuple(p["slice_sizes"])
    else:
        index = p["start_indices"][0]
        sizes = tuple(n - i for i, n in zip(p["start_indices"], p["limit_indices"], strict=True))
    if sizes != first or p.get("strides") is not None:
        return None
    return slice_entry(weight, index, lambda w: eqn.primitive.bind(w, *starts, **p))


def equation_step(eqn: Eqn, literals: tuple[tuple[int, Hashable], ...] = ()) -> Step | None:
    """An equation of a chain as a step; None if it has parameters that cannot be compared."""
    name, p = eqn.primitive.name, eqn.params
    if name in MOVES and len(eqn.invars) == 1 and p.get("sharding") is None:
        old = _shape(eqn.invars[0])
        if name == "transpose":
            return steps.transpose(p["permutation"])
        if name == "squeeze":
            return steps.squeeze([int(d) % len(old) for d in p["dimensions"]])
        if name == "broadcast_in_dim":
            return steps.broadcast(old, p["shape"], p["broadcast_dimensions"])
        if name == "reshape" and p["dimensions"] is None:
            return steps.reshape(old, p["new_sizes"])
    params = tuple(p.items())
    try:
        hash((params, literals))
    except TypeError:
        return None
    options = (("primitive", eqn.primitive), ("params", params), ("literals", literals))
    return Step(_bind, options, elementwise=name in (*CASTS, *ARITHMETIC))


def _shape(var: Var) -> Shape:
    return var.aval.shape  # type: ignore[attr-defined]  # AbstractValue does not declare it


def _bind(
    *arrays: Array,
    primitive: Primitive,
    params: tuple[tuple[str, Any], ...],
    literals: tuple[tuple[int, Any], ...],
) -> Array:
    operands = list(arrays)
    for i, value in literals:
        operands.insert(i, value)
    return primitive.bind(*operands, **dict(params))


# --- which leaves a program uses through a chain ---


@dataclasses.dataclass(frozen=True)
class Source:
    """What a variable is made of, if it is made of frozen leaves alone.

    Attributes:
        leaves: The numbers of the leaves.
        changed: Whether their values were changed, and not only moved.
    """

    leaves: frozenset[int]
    changed: bool = False


def put_off_chains(jaxpr: Jaxpr, values: Sequence[Value]) -> list[Value]:
    """``values``, the inputs of ``jaxpr``; those that a chain leads from are put off, other frozen weights are arrays.

    An adapted weight keeps its update; only its frozen part is put off.
    """
    weights = [value.frozen if isinstance(value, LowRank) and not value.probe else value for value in values]
    size_of = {i: math.prod(weight.shape) for i, weight in enumerate(weights) if isinstance(weight, DenseWeight)}
    chains: set[frozenset[int]] = set()
    _follow(jaxpr, [Source(frozenset([i])) if i in size_of else None for i in range(len(values))], chains)
    chained = {i for leaves in chains if max(size_of[i] for i in leaves) >= WORTHWHILE for i in leaves}

    def put_off(i: int, value: Value) -> Value:
        if isinstance(value, LowRank):
            return value.with_frozen(recomputed(value.frozen)) if i in chained else value
        if isinstance(value, DenseWeight) and i not in chained:
            return value.array
        return value

    return [put_off(i, v) for i, v in enumerate(values)]


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
        if name in MULTIPLICATIONS:
            chains.update(s.leaves for s in inputs if s is not None and s.changed)
        elif name in CHAINED:
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


def read_gather(eqn: Eqn, indices: Array, bind: Callable[..., Array]) -> Lookup:
    """The look-up of a ``gather`` equation, which ``bind`` computes from arrays."""
    p = eqn.params
    return Lookup(
        indices,
        p["dimension_numbers"],
        p["slice_sizes"],
        bind=lambda w: bind(w, indices),
        options={name: p[name] for name in ("mode", "fill_value", "unique_indices", "indices_are_sorted")},
    )


def multiply_frozen(eqn: Eqn, operands: Sequence[Value], bind: Callable[..., Array]) -> Array:
    """A product with one frozen weight among its operands; ``bind`` computes it from arrays."""
    if eqn.primitive.name == "gather" and is_frozen(operands[0]) and not is_frozen(operands[1]):
        return read_gather(eqn, operands[1], bind).pick_frozen(operands[0]).dense()
    position = next(i for i, v in enumerate(operands) if is_frozen(v))
    others = [v.dense() if is_frozen(v) else v for i, v in enumerate(operands) if i != position]

    def product(w: Array, *others: Array) -> Array:
        return bind(*others[:position], w, *others[position:])

    return operands[position].product(product, *map(jnp.asarray, others))
