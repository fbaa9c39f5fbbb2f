"""Rules for products: each translates an equation to a product of `lojax.lowrank`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from lojax.lowrank.convolution import Convolution
from lojax.lowrank.dot import dot
from lojax.lowrank.experts import Experts
from lojax.lowrank.value import LowRank, NotFactored
from lojax.rewrite.frozen_chains import Value, read_gather
from lojax.rewrite.interpreter import Interpreter, bind_one
from lojax.rewrite.rules.table import Table, registrar
from lojax.rewrite.shared_pass import read_dot_general, with_shared_pass
from lojax.types import Array, Eqn

RULES: Table = {}
rule = registrar(RULES)


@rule("dot_general")
def _dot_general(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> Array:
    lhs, rhs = operands
    if isinstance(lhs, LowRank) and isinstance(rhs, LowRank):
        # (w1 + a1 b1)(w2 + a2 b2) is bilinear, and one factored form covers one weight only.
        lhs = interp.dense(lhs, eqn, "a product of two adapted weights: the left one is materialized")
    on_left = isinstance(lhs, LowRank)
    value: LowRank = lhs if on_left else rhs
    x: Any = rhs if on_left else lhs
    product = read_dot_general(eqn, x, value, weight_on_left=on_left)
    if not value.probe:
        product = with_shared_pass(interp, eqn, value, product, weight_on_left=on_left)
    return interp.multiply(eqn, value, product)


@rule("reduce_sum")
def _reduce_sum(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> Array:
    """A sum over axes of the weight is a product of the weight with ones."""
    value, axes = operands[0], tuple(int(d) for d in eqn.params["axes"])
    if value.dropout is not None:
        raise NotFactored("a sum over axes of the weight under dropout, which is for an input")
    if value.gain is not None and {*value.gain.dims} & {*axes}:
        raise NotFactored("a sum over some of the axes of a DoRA magnitude")
    product = dot(
        jnp.ones([value.shape[d] for d in axes], value.frozen.dtype),
        value.ndim,
        ((tuple(range(len(axes))), axes), ((), ())),
        weight_on_left=False,
        bind=lambda w, _: bind_one(eqn, w),
    )
    # Fused, it would materialize the weight to sum it once.
    return interp.multiply(eqn, dataclasses.replace(value, fusible=False), product)


@rule("gather")
def _gather(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> Value:
    value, indices = operands
    if isinstance(indices, LowRank):
        raise NotFactored("a look-up at indices made of the weight")
    lookup = read_gather(eqn, indices, functools.partial(bind_one, eqn))
    return lookup.pick(value) if lookup.picks_entries(value) else interp.multiply(eqn, value, lookup)


@rule("conv_general_dilated")
def _convolution(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> Array:
    x, value = operands
    if isinstance(x, LowRank):
        raise NotFactored("a convolution over the weight as an image")
    options: dict[str, Any] = dict(eqn.params)
    product = Convolution(
        x,
        options.pop("dimension_numbers"),
        options.pop("feature_group_count"),
        options.pop("batch_group_count"),
        bind=lambda w, x: bind_one(eqn, x, w),
        options=options,
    )
    return interp.multiply(eqn, value, product)


@rule("ragged_dot_general")
def _ragged_dot(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> Array:
    x, value, group_sizes, *rest = operands
    if isinstance(x, LowRank) or rest:
        raise NotFactored("a ragged product with the weight on the left, or with a group offset")
    p = eqn.params
    product = Experts(
        x,
        group_sizes,
        p["ragged_dot_dimension_numbers"],
        bind=lambda w, x: bind_one(eqn, x, w, group_sizes),
        precision=p["precision"],
        dtype=p["preferred_element_type"],
    )
    return interp.multiply(eqn, value, product)
