"""The table, first part: products and carriers. Each rule reads an equation and calls the maths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lojax.lowrank import combine as joined
from lojax.lowrank import value as lowrank
from lojax.lowrank.named_array import RANK, Named, on_explicit_axes
from lojax.lowrank.value import LowRank, NotFactored
from lojax.rewrite import shared_pass as siblings
from lojax.rewrite.interpreter import Interpreter, bind, rule

# --- products ---


@rule("dot_general")
def _dot_general(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    lhs, rhs = operands
    if isinstance(lhs, LowRank) and isinstance(rhs, LowRank):
        lhs = interp.dense(lhs, eqn, "a product of two adapted weights: the left one is formed")
    on_left = isinstance(lhs, LowRank)
    value, x = (lhs, rhs) if on_left else (rhs, lhs)
    p = eqn.params
    product = interp.products.dot(
        x,
        value,
        dimension_numbers=p["dimension_numbers"],
        weight_on_left=on_left,
        base=lambda w, x: bind(eqn, [w, x] if on_left else [x, w])[0],
        precision=p["precision"],
        dtype=p["preferred_element_type"],
        execution=interp.execution,
        given=None if value.probe else siblings.update_of(interp, eqn, on_left, x),
        apart=None if value.probe else interp.apart(eqn.invars[on_left], x),
    )
    return interp.record(value, eqn, product)


@rule("gather")
def _gather(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, indices = operands
    names = ("mode", "fill_value", "unique_indices", "indices_are_sorted")
    result = interp.products.gather(
        value,
        indices,
        dimension_numbers=eqn.params["dimension_numbers"],
        slice_sizes=eqn.params["slice_sizes"],
        base=bind(eqn, [value.w, indices])[0],
        options={name: eqn.params[name] for name in names},
    )
    return result if isinstance(result, LowRank) else interp.record(value, eqn, result)


@rule("conv_general_dilated")
def _conv(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    x, value = operands
    if isinstance(x, LowRank):
        raise NotFactored("a convolution over the weight as an image")
    p = dict(eqn.params)
    numbers = ("dimension_numbers", "feature_group_count", "batch_group_count")
    product = interp.products.conv(
        x, value, base=bind(eqn, [x, value.w])[0], options=p, **{name: p.pop(name) for name in numbers}
    )
    return interp.record(value, eqn, product)


@rule("ragged_dot_general")
def _ragged_dot(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    x, value, group_sizes, *rest = operands
    if isinstance(x, LowRank) or rest:
        raise NotFactored("a ragged product with the weight on the left, or with a group offset")
    p = eqn.params
    product = interp.products.ragged_dot(
        x,
        value,
        group_sizes,
        dimension_numbers=p["ragged_dot_dimension_numbers"],
        base=bind(eqn, [x, value.w, group_sizes])[0],
        precision=p["precision"],
        dtype=p["preferred_element_type"],
    )
    return interp.record(value, eqn, product)


@rule("reduce_sum")
def _reduce_sum(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, axes = operands[0], tuple(eqn.params["axes"])
    if value.key is not None:
        raise NotFactored("a sum over axes of the weight under dropout, which is for an input")
    if value.gain is not None and {*value.gain.dims} & {*axes}:
        raise NotFactored("a sum over some of the axes of a DoRA magnitude")
    product = interp.products.dot(
        jnp.ones([value.shape[d] for d in axes], value.w.dtype),
        value,
        dimension_numbers=((tuple(range(len(axes))), axes), ((), ())),
        weight_on_left=False,
        base=lambda w, _: bind(eqn, [w])[0],
        execution="factored",
    )
    return interp.record(value, eqn, product)


# --- carriers: the axes of the value move, the update stays factored ---


@rule("transpose")
def _transpose(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    return lowrank.transpose(operands[0], eqn.params["permutation"])


@rule("reshape")
def _reshape(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, order = operands[0], eqn.params["dimensions"]
    return lowrank.reshape(value if order is None else lowrank.transpose(value, order), eqn.params["new_sizes"])


@rule("squeeze")
def _squeeze(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    return lowrank.squeeze(operands[0], eqn.params["dimensions"])


@rule("broadcast_in_dim")
def _broadcast_in_dim(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, *lengths = operands
    w = bind(eqn, [value.w, *lengths])[0]
    return lowrank.broadcast(value, w, _dimensions(eqn))


def _dimensions(eqn: Any) -> tuple[int, ...]:
    """Where each axis of a broadcast goes. JAX may say so in NumPy's integers, which do not compare with tuples."""
    return tuple(int(d) for d in eqn.params["broadcast_dimensions"])


@rule("slice")
def _slice(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    p = eqn.params

    def along(array: Any, axes: tuple[int, ...]) -> Any:
        start = [0 if d < 0 else p["start_indices"][d] for d in axes]
        limit = [array.shape[i] if d < 0 else p["limit_indices"][d] for i, d in enumerate(axes)]
        strides = p["strides"] and [1 if d < 0 else p["strides"][d] for d in axes]
        return lax.slice(array, start, limit, strides)

    return lowrank.cut(operands[0], bind(eqn, [operands[0].w])[0], along)


@rule("dynamic_slice")
def _dynamic_slice(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, *starts = operands
    sizes = eqn.params["slice_sizes"]

    def along(array: Any, axes: tuple[int, ...]) -> Any:
        start = [jnp.zeros_like(starts[0]) if d < 0 else starts[d] for d in axes]
        return lax.dynamic_slice(array, start, [array.shape[i] if d < 0 else sizes[d] for i, d in enumerate(axes)])

    return lowrank.cut(value, bind(eqn, [value.w, *starts])[0], along)


@rule("rev")
def _rev(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    flipped = eqn.params["dimensions"]

    def along(array: Any, axes: tuple[int, ...]) -> Any:
        return lax.rev(array, [i for i, d in enumerate(axes) if d in flipped])

    return lowrank.cut(operands[0], bind(eqn, [operands[0].w])[0], along)


@rule("split")
def _split(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, axis = operands[0], eqn.params["axis"]
    parts, start = [], 0
    for length, w in zip(eqn.params["sizes"], bind(eqn, [value.w]), strict=True):

        def along(array: Any, axes: tuple[int, ...], start: int = start, length: int = length) -> Any:
            return lax.slice_in_dim(array, start, start + length, axis=axes.index(axis)) if axis in axes else array

        parts.append(lowrank.cut(value, w, along))
        start += length
    return parts


@rule("pad")
def _pad(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, filling = operands
    if not isinstance(value, LowRank) or isinstance(filling, LowRank):
        raise NotFactored("padding with the weight")
    return joined.padded(value, bind(eqn, [value.w, filling])[0], eqn.params["padding_config"])


@rule("concatenate")
def _concatenate(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    w = bind(eqn, [v.w if isinstance(v, LowRank) else v for v in operands])[0]
    return joined.concatenate(operands, w, eqn.params["dimension"])


@rule("stack")
def _stack(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    axis = eqn.params["axis"]
    w = bind(eqn, [v.w if isinstance(v, LowRank) else v for v in operands])[0]

    def with_unit(v: Any) -> Any:
        if not isinstance(v, LowRank):
            return jnp.expand_dims(v, axis)
        return lowrank.broadcast(v, jnp.expand_dims(v.w, axis), [d + (d >= axis) for d in range(v.w.ndim)])

    return joined.concatenate([with_unit(v) for v in operands], w, axis)


@rule("select_n")
def _select_n(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    index, *cases = operands
    if isinstance(index, LowRank):
        raise NotFactored("a choice by the weight")
    axes = _varying(interp, eqn.invars[0], index)
    few = Named(_along(index, axes), axes)

    def pick(arrays: Any, dims: Any) -> Any:
        return lax.select_n(jnp.broadcast_to(few.spread(dims), arrays[0].shape), *arrays)

    w = bind(eqn, [index, *(v.w if isinstance(v, LowRank) else v for v in cases)])[0]
    return joined.select(cases, w, axes, pick)


def _along(array: Any, axes: tuple[int, ...]) -> Any:
    """An array that repeats along all axes but ``axes``, with those alone."""
    if on_explicit_axes(array):  # where JAX slices no axis that lies over chips
        return jnp.max(array, [d for d in range(array.ndim) if d not in axes])
    return array[tuple(slice(None) if d in axes else 0 for d in range(array.ndim))]


def _varying(interp: Interpreter, var: Any, index: Any) -> tuple[int, ...]:
    """The axes along which an array may vary, by the equation that made it: a broadcast varies along few."""
    made = interp.frame.maker(var)
    axes = tuple(d for d, n in enumerate(index.shape) if n != 1)
    if made is None or made.primitive.name != "broadcast_in_dim":
        return axes
    old = made.invars[0].aval.shape
    return tuple(d for i, d in enumerate(_dimensions(made)) if old[i] == index.shape[d] and d in axes)


@rule("unstack")
def _unstack(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, axis = operands[0], eqn.params["axis"]

    def entry(i: int) -> LowRank:
        def along(array: Any, axes: tuple[int, ...]) -> Any:
            return lax.slice_in_dim(array, i, i + 1, axis=axes.index(axis)) if axis in axes else array

        return lowrank.squeeze(lowrank.cut(value, lax.slice_in_dim(value.w, i, i + 1, axis=axis), along), [axis])

    return [entry(i) for i in range(value.shape[axis])]


@rule("convert_element_type")
def _convert(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise NotFactored(f"a cast to {eqn.params['new_dtype']}")
    return operands[0].with_w(bind(eqn, [operands[0].w])[0])


@rule("mul")
def _mul(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    on_left = isinstance(operands[0], LowRank)
    value, factor = operands if on_left else operands[::-1]
    if isinstance(factor, LowRank):
        raise NotFactored("an elementwise product of two adapted weights")
    w = bind(eqn, [value.w, factor] if on_left else [factor, value.w])[0]
    return _scaled(interp, value, w, eqn.invars[on_left], jnp.asarray(factor))


@rule("div")
def _div(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, factor = operands
    if not isinstance(value, LowRank) or isinstance(factor, LowRank):
        raise NotFactored("a division by the weight")
    return _scaled(interp, value, bind(eqn, [value.w, factor])[0], eqn.invars[1], 1 / jnp.asarray(factor))


def _scaled(interp: Interpreter, value: LowRank, w: Any, var: Any, by: Any) -> LowRank:
    if by.size == 1:
        return lowrank.scaled(value, w, by.reshape(()))
    if w.shape != value.shape:  # axes of length one met longer ones
        value = lowrank.broadcast(value, w, range(w.ndim))
    axes = _varying(interp, var, by)
    return joined.scaled(value, w, Named(_along(by, axes), axes))


@rule("neg")
def _neg(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    return lowrank.negated(operands[0])


@rule("add", "sub", "add_any")
def _add(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    left, right = operands
    if isinstance(left, LowRank) == isinstance(right, LowRank):
        raise NotFactored("a sum of two adapted weights")
    value = left if isinstance(left, LowRank) else right
    if value.gain is not None:
        raise NotFactored("a sum with a weight under DoRA")
    w = bind(eqn, [v.w if v is value else v for v in operands])[0]
    if w.shape != value.shape:  # axes of length one met longer ones
        value = lowrank.broadcast(value, w, range(w.ndim))
    return (lowrank.negated(value) if eqn.primitive.name == "sub" and value is right else value).with_w(w)


@rule("stop_gradient", "copy", "copy_p")
def _on_every_array(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    return operands[0].mapped(lambda x: bind(eqn, [x])[0])


@rule("sharding_constraint", "reshard", "mesh_cast")
def _placed(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    """Every factor lies as the axes of the weight do that it holds; the rank is whole."""
    value, w = operands[0], bind(eqn, [operands[0].w])[0]
    sharding = eqn.params["sharding" if "sharding" in eqn.params else "dst_sharding"]
    if value.probe or not isinstance(sharding, NamedSharding):
        return value.with_w(w)
    place = lax.with_sharding_constraint if eqn.primitive.name == "sharding_constraint" else jax.sharding.reshard
    unconstrained = eqn.params.get("unconstrained_dims") or ()
    along = [*sharding.spec, *[None] * (value.w.ndim - len(sharding.spec))]

    def entry(d: Any) -> Any:
        return None if d == RANK else PartitionSpec.UNCONSTRAINED if d in unconstrained else along[d]

    def follow(x: Named) -> Named:
        spec = PartitionSpec(*(entry(d) for d in x.dims))
        return Named(place(x.array, NamedSharding(sharding.mesh, spec)), x.dims)

    return value.with_parts([follow(x) for x in value.parts], w=w)


@rule("name", "device_put", "layout_constraint")
def _on_the_weight(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    if len(operands) != 1:
        raise NotFactored(f"{eqn.primitive.name} of several arrays")
    return operands[0].with_w(bind(eqn, [operands[0].w])[0])


@rule("pvary", "pcast")
def _vary(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    return operands[0].with_w(bind(eqn, [operands[0].w])[0])  # the factors vary where they are used


@rule("all_gather", "all_gather_invariant")
def _all_gather(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    value, gathered = operands[0], eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        raise NotFactored("an all_gather along a new axis")

    def along(array: Any, axes: tuple[int, ...]) -> Any:
        if gathered not in axes:
            return array
        params = eqn.params | {"all_gather_dimension": axes.index(gathered)}
        return eqn.primitive.bind(array, **params)

    return lowrank.cut(value, bind(eqn, [value.w])[0], along)


@rule("optimization_barrier")
def _optimization_barrier(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    results = bind(eqn, [v.w if isinstance(v, LowRank) else v for v in operands])
    return [v.with_w(r) if isinstance(v, LowRank) else r for v, r in zip(operands, results, strict=True)]
