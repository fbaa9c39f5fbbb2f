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

from lojax.compat import var_type
from lojax.lowrank.adapted_products import adapted_products
from lojax.lowrank.dot import Dot, dot
from lojax.lowrank.factor_product import FactorTangent
from lojax.lowrank.factored import contraction_order, multiply_factor, opaque_product
from lojax.lowrank.frozen import DenseWeight
from lojax.lowrank.kernel_forms import unsupported
from lojax.lowrank.named_array import RANK, Name, NamedArray, cast, has_explicit_sharding, on_manual_mesh
from lojax.lowrank.product_form import Form
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
        weight: The frozen weight if the product as a whole is computed with its group; None for the update alone.
        key: Products share a pass if their keys are equal.
    """

    eqn: Eqn
    product: Dot
    first: NamedArray
    second: NamedArray
    weight: Array | None
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


def with_shared_pass(interp: Interpreter, eqn: Eqn, value: LowRank, product: Dot, *, weight_on_left: bool) -> Dot:
    """``product`` with what was computed of it together with its group: its update, or all of it.

    Args:
        interp: The interpreter, at ``eqn``.
        eqn: The product's equation.
        value: The adapted weight.
        product: The product.
        weight_on_left: Whether the weight is the left operand.
    """
    var = eqn.invars[weight_on_left]
    product = dataclasses.replace(product, factor_input=interp.factor_input(var, product.x))
    precomputed = interp.take_precomputed(eqn)
    if precomputed is not None:
        return dataclasses.replace(product, **precomputed)
    mine = _member(interp, eqn, value, product)
    if mine is None:
        return product
    others = (_later_member(interp, e, var, product.x) for e in interp.pending_readers(var))
    group = [mine, *(m for m in others if m is not None and m.key == mine.key)]
    if mine.weight is not None:
        results = multiply_adapted(product.x, interp.released_input(var), group, kernel=interp.execution == "kernel")
    elif len(group) > 1:
        results = [{"update": y} for y in multiply_group(interp.factor_input(var, product.x), group)]
    else:
        return product
    for member, result in zip(group[1:], results[1:], strict=True):
        interp.precompute(member.eqn, result)
    return dataclasses.replace(product, **results[0])


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
    frozen = value.frozen
    # On a part of a `shard_map` the primitives would have to know along which mesh axes their operands differ.
    whole = isinstance(frozen, DenseWeight) and value.gain_on_update and not on_manual_mesh(product.x)
    return Member(
        eqn,
        product,
        first,
        second,
        frozen.dense() if whole else None,
        (tuple(names.values()), product.precision, product.dtype, whole),
    )


def multiply_adapted(x: Array, z: Array | None, group: Sequence[Member], *, kernel: bool) -> list[dict[str, Any]]:
    """The product of each weight, update included, as fields of its `Dot`.

    Args:
        x: The activation.
        z: The input of the updates; None for ``x``.
        group: Products of equal key, each with its weight.
        kernel: Whether kernels are to compute them where there are some.
    """
    dims: tuple[Name, ...] = tuple(("x", i) for i in range(x.ndim))
    forms, weights = [], []
    for member in group:
        assert member.weight is not None
        product, result = member.product, var_type(member.eqn.outvars[0])
        # An axis of the weight that is summed has the name of the axis of the activation.
        names: dict[Name, Name] = {d: ("x", i) for i, d in enumerate(product.x_dims)}
        form = Form(
            x=dims,
            w=tuple(names.get(d, d) for d in range(member.weight.ndim)),
            a=member.first.dims,
            b=member.second.dims,
            out=product.out,
            dot=tuple(sorted(member.eqn.params.items())),
            weight_on_left=product.weight_on_left,
            kind=jnp.dtype(compute_dtype(x, product.dtype)),
            result=result.dtype,
        )
        forms.append(form)
        weights.append(member.weight)
    no_kernel = [unsupported(f, x, w) for f, w in zip(forms, weights, strict=True)] if kernel else ["not asked for"]
    if not any(no_kernel):
        forms = [dataclasses.replace(form, kernel=True) for form in forms]
    reason = next(filter(None, no_kernel), "")
    factors = [(m.first.array, m.second.array) for m in group]
    return [{"total": y, "no_kernel": reason} for y in adapted_products(x, z, weights, factors, forms)]


def multiply_group(x: Array, group: Sequence[Member]) -> list[Array]:
    """The update of each product, in the dtype of its result.

    Args:
        x: The activation.
        group: Products of equal key.
    """
    summed, precision, dtype, _ = group[0].key  # type: ignore[misc]
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
            y = multiply_factor(
                NamedArray(inner, tuple(middle)), FactorTangent(factor.array, factor.dims), out, kind, **settings
            )
            return y.astype(result.dtype)

        return up

    product = opaque_product(project_down, [project_up(m) for m in group])
    return product(x, [m.first for m in group], [m.second for m in group])
