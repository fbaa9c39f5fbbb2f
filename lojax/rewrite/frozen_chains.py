"""Frozen chains: what leads from frozen leaves to the weight of a product, such as a cast or a dequantization.

A chain that changes values is not computed where the program says, but at each product that uses it, forward and
again backward (`RecomputedWeight`). What JAX saves for the backward pass is then the leaf and not the result of the
chain. A chain that only moves values (a transpose) is computed as it stands: XLA makes it part of the product.
`chain_sources` finds the leaves that a chain leads from. In front of a function with a derivative of its own
(`custom_jvp`, `custom_vjp`) and of a `shard_map`, a chain is computed as it stands as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal, Primitive

from lojax.compat import var_type
from lojax.lowrank import steps
from lojax.lowrank.frozen import DenseWeight, FrozenWeight, RecomputedWeight, is_frozen, slice_entry
from lojax.lowrank.lookup import Lookup
from lojax.lowrank.steps import Step
from lojax.rewrite.primitives import ARITHMETIC, CASTS, CHAINED, JOINS, MOVES
from lojax.types import Array, Dtype, Eqn

Value: TypeAlias = Any
"""The value of a variable: an array, a `LowRank`, or a frozen weight without an update."""

Constant: TypeAlias = tuple[int, np.dtype, bytes]
"""A number in an equation: its position, dtype and bytes. Its value would not do: to Python 0.0 equals -0.0."""


def evaluate_chained(eqn: Eqn, operands: Sequence[Value]) -> FrozenWeight | None:
    """The result of an equation on frozen weights alone, deferred; None if the equation belongs to no chain."""
    if (entry := pick_entry(eqn, operands)) is not None:
        return entry
    if not _is_chained(eqn, operands) or len(eqn.outvars) != 1:
        return None
    weights: list[FrozenWeight] = []
    literals: list[Constant] = []
    for i, (var, value) in enumerate(zip(eqn.invars, operands, strict=True)):
        if is_frozen(value):
            weights.append(value)
        elif isinstance(var, Literal):
            number = np.asarray(value, var_type(var).dtype)
            literals.append((i, number.dtype, number.tobytes()))
        elif isinstance(value, Tracer):
            return None
        else:  # a constant of the program, such as a code book
            weights.append(DenseWeight(value))
    step = equation_step(eqn, tuple(literals))
    return None if step is None else RecomputedWeight(tuple(weights), step)


def _is_chained(eqn: Eqn, operands: Sequence[Value]) -> bool:
    name = eqn.primitive.name
    return name in (*CHAINED, *JOINS, "iota") or (name == "gather" and is_frozen(operands[1]))


def pick_entry(eqn: Eqn, operands: Sequence[Value]) -> FrozenWeight | None:
    """One entry along the first axis of a recomputed weight, if that is what the equation slices out of it."""
    if eqn.primitive.name not in ("slice", "dynamic_slice"):
        return None
    weight, *starts = operands
    if any(is_frozen(start) for start in starts):
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


def equation_step(eqn: Eqn, literals: tuple[Constant, ...] = ()) -> Step | None:
    """An equation of a chain as a step; None if it has parameters that cannot be compared."""
    name, p = eqn.primitive.name, eqn.params
    if name in MOVES and len(eqn.invars) == 1 and not literals and p.get("sharding") is None:
        old = var_type(eqn.invars[0]).shape
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


def constant_weight(number: object, dtype: Dtype) -> RecomputedWeight:
    """A number in the program as a frozen weight that nothing is stored for."""
    options = (("dtype", np.dtype(dtype)), ("data", np.asarray(number, dtype).tobytes()))
    return RecomputedWeight((), Step(_number, options))


def _number(*, dtype: np.dtype, data: bytes) -> Array:
    return jnp.asarray(np.frombuffer(data, dtype)[0])


def _bind(
    *arrays: Array,
    primitive: Primitive,
    params: tuple[tuple[str, Any], ...],
    literals: tuple[Constant, ...],
) -> Array:
    operands = list(arrays)
    for i, dtype, data in literals:
        operands.insert(i, np.frombuffer(data, dtype)[0])
    return primitive.bind(*operands, **dict(params))


# --- products ---


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
