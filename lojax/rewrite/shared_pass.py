"""Weights that multiply one activation (q, k and v; gate and up) share the pass over it.

``x A_q``, ``x A_k`` and ``x A_v`` are one product with the A's side by side, ``x [A_q | A_k | A_v]``, whose result is
split. The activation is then read once for all of them. The same holds in the backward pass, where the cotangent of
the activation from all these updates is one product. Measured by `benchmarks/shared_pass.py`.

At the first of these products, the program is searched for the others. Their weights must be available, or need only
operations of one operand (a cast, a reshape), which are then evaluated early.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lojax.lowrank.dot import Dot, dot
from lojax.lowrank.factored import contraction_order, multiply_factor, opaque_product
from lojax.lowrank.named_array import RANK, Name, NamedArray, cast, has_explicit_sharding
from lojax.lowrank.value import LowRank, NotFactored, compute_dtype
from lojax.rewrite.interpreter import Interpreter, bind_one
from lojax.types import Array, Eqn, Var


@dataclasses.dataclass(frozen=True)
class Member:
    """One product of a group that shares a pass.

    Attributes:
        eqn: Its equation.
        product: The product.
        first: The factor that multiplies the activation. Its axes have the names of the axes of the activation,
            ``("x", i)``, and `RANK` is last.
        second: The other factor.
        key: Products share a pass if their keys are equal.
    """

    eqn: Eqn
    product: Dot
    first: NamedArray
    second: NamedArray
    key: Hashable


def read_dot_general(eqn: Eqn, x: Array, value: LowRank, *, weight_on_left: bool) -> Dot:
    """The product that a `dot_general` equation computes of ``x`` and ``value``."""
    p = eqn.params
    return dot(
        x,
        value.ndim,
        p["dimension_numbers"],
        weight_on_left=weight_on_left,
        bind=(lambda w, x: bind_one(eqn, w, x)) if weight_on_left else (lambda w, x: bind_one(eqn, x, w)),
        precision=p["precision"],
        dtype=p["preferred_element_type"],
    )


def shared_update(interp: Interpreter, eqn: Eqn, value: LowRank, product: Dot, *, weight_on_left: bool) -> Array | None:
    """The update of a product with an adapted weight, computed with those of its group; None without a group.

    Args:
        interp: The interpreter, at ``eqn``.
        eqn: The product's equation.
        value: The adapted weight.
        product: The product.
        weight_on_left: Whether the weight is the left operand.
    """
    precomputed = interp.take_precomputed(eqn)
    if precomputed is not None:
        return precomputed
    var = eqn.invars[weight_on_left]
    later = interp.pending_readers(var)
    mine = _member(interp, eqn, value, product) if later else None
    if mine is None:
        return None
    others = (_later_member(interp, e, var, product.x) for e in later)
    group = [mine, *(m for m in others if m is not None and m.key == mine.key)]
    if len(group) < 2:
        return None
    updates = multiply_group(interp.factor_input(var, product.x), group)
    for member, update in zip(group[1:], updates[1:], strict=True):
        interp.precompute(member.eqn, update)
    return updates[0]


def _later_member(interp: Interpreter, eqn: Eqn, var: Var, x: Array) -> Member | None:
    """A later equation as a member of a group over ``x``, the value of ``var``, or None."""
    if eqn.primitive.name != "dot_general":
        return None
    weight_on_left = eqn.invars[1] is var
    value = interp.value_ahead(eqn.invars[not weight_on_left])
    if not isinstance(value, LowRank):
        return None
    try:
        product = read_dot_general(eqn, x, value, weight_on_left=weight_on_left)
    except NotFactored:
        return None
    return _member(interp, eqn, value, product)


def _member(interp: Interpreter, eqn: Eqn, value: LowRank, product: Dot) -> Member | None:
    """``product`` as a member of a group, or None if it cannot share the pass over its activation."""
    # One variable on both sides does not say which side the weight is on.
    if eqn.invars[0] is eqn.invars[1] or has_explicit_sharding(product.x):
        return None
    # Under dropout each weight drops other entries of x, so there is no one input to share.
    if (
        value.probe
        or value.tap
        or value.pending
        or value.mix is not None
        or value.active is not None
        or value.dropout is not None
        or len(value.terms) != 1
    ):
        return None
    try:
        first, second, summed = contraction_order(product.named_x, value.terms[0], product.out)
    except NotFactored:
        return None
    contracted = [d for d in product.x_dims if not isinstance(d, tuple)]
    # First factors are joined along r, so each must be [m, r]: no stack, and every axis of m summed.
    plain = {*first.dims} == {*summed, RANK} and {*contracted} == {*summed}
    complete = {*first.dims, *second.dims} >= {*range(value.ndim)}
    # A gain on summed axes multiplies the input instead of the result (`factored.add_updates`), so x is not shared.
    if not (plain and complete) or (value.gain is not None and not {*value.gain.dims} <= {*product.out}):
        return None
    if product.choose(value, interp.execution)[1] == "fused":  # it never computes x A alone
        return None
    names: dict[Name, Name] = {d: ("x", i) for i, d in enumerate(product.x_dims) if d in contracted}
    first = first.transpose_to([*contracted, RANK]).rename(names)
    return Member(eqn, product, first, second, (tuple(names.values()), product.precision, product.dtype))


def multiply_group(x: Array, group: Sequence[Member]) -> list[Array]:
    """The update of each product, in the dtype of its result.

    Args:
        x: The activation.
        group: Products of equal key.
    """
    summed, precision, dtype = group[0].key  # type: ignore[misc]
    kind = compute_dtype(x, dtype)
    dims: tuple[Name, ...] = tuple(("x", i) for i in range(x.ndim))
    middle = [*(d for d in dims if d not in summed), RANK]
    settings: dict[str, Any] = {"precision": precision, "dtype": dtype}

    def project_down(x: Array, factors: Sequence[NamedArray]) -> list[Array]:
        axis = factors[0].axis(RANK)
        # The ranks may differ: only the rank axis is joined, and the result is split at the same places.
        joined = jnp.concatenate([cast(factor, kind).array for factor in factors], axis)
        # `replace` returns an object of the same class, `FactorTangent` for tangents.
        factor = dataclasses.replace(factors[0], array=joined)
        inner = multiply_factor(NamedArray(x, dims), factor, middle, kind, **settings)
        return list(lax.split(inner, [factor.size(RANK) for factor in factors], axis=inner.ndim - 1))

    def project_up(member: Member) -> Callable[[Array, NamedArray], Array]:
        # The closures below refer to types and names only: JAX may cache them beyond the trace.
        result: Any = member.eqn.outvars[0].aval
        out = member.product.out

        def up(inner: Array, factor: NamedArray) -> Array:
            y = multiply_factor(NamedArray(inner, tuple(middle)), factor, out, kind, **settings)
            return y.astype(result.dtype)

        return up

    product = opaque_product(project_down, [project_up(m) for m in group])
    return product(x, [m.first for m in group], [m.second for m in group])
