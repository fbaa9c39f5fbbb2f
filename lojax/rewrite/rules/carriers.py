"""Rules for carriers: the axes of a value move, its update stays factored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lojax.compat import var_type
from lojax.lowrank import carriers, combine
from lojax.lowrank.frozen import FrozenWeight
from lojax.lowrank.named_array import RANK, Name, NamedArray, has_explicit_sharding
from lojax.lowrank.steps import IDENTITY
from lojax.lowrank.value import LowRank, NotFactored
from lojax.rewrite.frozen_chains import Value, equation_step, pick_entry
from lojax.rewrite.interpreter import Interpreter, bind, bind_one
from lojax.rewrite.rules.table import Table, registrar
from lojax.types import Array, Eqn, Var

RULES: Table = {}
rule = registrar(RULES)

Axes = tuple[int, ...]
"""The axes of a value that an array has; -1 for its rank axis (see `carriers.slice_axes`)."""


def _bind_frozen(eqn: Eqn, operands: Sequence[Value]) -> FrozenWeight:
    """The equation on the frozen parts of its operands."""
    return combine.combine_frozen(lambda *dense: bind_one(eqn, *dense), operands)


def _step(eqn: Eqn) -> Callable[[Array], Array]:
    """An equation of one operand as a function of it: a `Step` where it can be one, which a weight can defer."""
    return equation_step(eqn) or (lambda w: bind_one(eqn, w))


# --- moves ---


@rule("transpose")
def _transpose(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    return carriers.transpose(operands[0], eqn.params["permutation"])


@rule("reshape")
def _reshape(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    value, order = operands[0], eqn.params["dimensions"]
    return carriers.reshape(value if order is None else carriers.transpose(value, order), eqn.params["new_sizes"])


@rule("squeeze")
def _squeeze(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    return carriers.squeeze(operands[0], eqn.params["dimensions"])


@rule("broadcast_in_dim")
def _broadcast_in_dim(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    value, *lengths = operands
    repeat = _step(eqn) if not lengths else lambda w: bind_one(eqn, w, *lengths)
    return carriers.broadcast(value, value.frozen.map(repeat), _broadcast_axes(eqn))


def _broadcast_axes(eqn: Eqn) -> Axes:
    """The new position of each axis of a broadcast. JAX may use NumPy integers, which do not compare with tuples."""
    return tuple(int(d) for d in eqn.params["broadcast_dimensions"])


# --- slices ---


@rule("slice")
def _slice(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    p = eqn.params

    # An axis of packed codes that stays whole is longer in the update.
    whole = {-1, *(d for d, n in enumerate(operands[0].shape) if p["limit_indices"][d] - p["start_indices"][d] == n)}

    def along(array: Array, axes: Axes) -> Array:
        start = [0 if d < 0 else p["start_indices"][d] for d in axes]
        limit = [array.shape[i] if d in whole else p["limit_indices"][d] for i, d in enumerate(axes)]
        strides = p["strides"] and [1 if d < 0 else p["strides"][d] for d in axes]
        return lax.slice(array, start, limit, strides)

    return _slice_axes(eqn, operands, _step(eqn), along)


@rule("dynamic_slice")
def _dynamic_slice(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    value, *starts = operands
    if not isinstance(value, LowRank) or any(isinstance(start, LowRank) for start in starts):
        raise NotFactored("a slice that starts where the weight says")
    sizes = eqn.params["slice_sizes"]
    whole = {-1, *(d for d, n in enumerate(value.shape) if sizes[d] == n)}

    def along(array: Array, axes: Axes) -> Array:
        # `dynamic_slice` wants all its indices in one dtype, so the zero of the rank axis takes that of the others.
        start = [jnp.zeros_like(starts[0]) if d < 0 else starts[d] for d in axes]
        return lax.dynamic_slice(array, start, [array.shape[i] if d in whole else sizes[d] for i, d in enumerate(axes)])

    return _slice_axes(eqn, operands, lambda w: bind_one(eqn, w, *starts), along)


def _slice_axes(
    eqn: Eqn, operands: list[Value], f: Callable[[Array], Array], along: Callable[[Array, Axes], Array]
) -> LowRank:
    """`carriers.slice_axes`; of a recomputed weight only the entry is computed, if it is one that is sliced out."""
    value = operands[0]
    entry = pick_entry(eqn, [value.frozen, *operands[1:]])
    if entry is None:
        return carriers.slice_axes(value, f, along)
    return carriers.slice_axes(value.with_frozen(entry), IDENTITY, along)


@rule("rev")
def _rev(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    reversed_axes = eqn.params["dimensions"]

    def along(array: Array, axes: Axes) -> Array:
        return lax.rev(array, [i for i, d in enumerate(axes) if d in reversed_axes])

    return carriers.slice_axes(operands[0], lambda w: bind_one(eqn, w), along)


@rule("split")
def _split(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[LowRank]:
    value, axis = operands[0], eqn.params["axis"]
    slices, start = [], 0
    for length in eqn.params["sizes"]:
        slices.append(_slice_one_axis(value, start, length, axis))
        start += length
    return slices


@rule("unstack")
def _unstack(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[LowRank]:
    value, axis = operands[0], eqn.params["axis"]
    return [carriers.squeeze(_slice_one_axis(value, i, 1, axis), [axis]) for i in range(value.shape[axis])]


def _slice_one_axis(value: LowRank, start: int, length: int, axis: int) -> LowRank:
    def part(array: Array, position: int) -> Array:
        return lax.slice_in_dim(array, start, start + length, axis=position)

    return carriers.slice_axes(
        value, lambda w: part(w, axis), lambda array, axes: part(array, axes.index(axis)) if axis in axes else array
    )


@rule("all_gather", "all_gather_invariant")
def _all_gather(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    value, gathered = operands[0], eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        raise NotFactored("an all_gather along a new axis")

    def along(array: Array, axes: Axes) -> Array:
        if gathered not in axes:
            return array
        return eqn.primitive.bind(array, **(eqn.params | {"all_gather_dimension": axes.index(gathered)}))

    return carriers.slice_axes(value, lambda w: bind_one(eqn, w), along)


# --- combinations with other arrays ---


@rule("pad")
def _pad(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    value, fill = operands
    if not isinstance(value, LowRank) or isinstance(fill, LowRank):
        raise NotFactored("padding with the weight")
    frozen = value.frozen.map(lambda w: bind_one(eqn, w, fill))
    return combine.pad(value, frozen, eqn.params["padding_config"])


@rule("concatenate")
def _concatenate(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    return combine.concatenate(operands, _bind_frozen(eqn, operands), eqn.params["dimension"])


@rule("stack")
def _stack(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    axis = eqn.params["axis"]

    def with_unit_axis(v: Value) -> Value:
        if not isinstance(v, LowRank):
            return jnp.expand_dims(v, axis)
        frozen = v.frozen.map(lambda w: jnp.expand_dims(w, axis))
        return carriers.broadcast(v, frozen, [d + (d >= axis) for d in range(v.ndim)])

    return combine.concatenate([with_unit_axis(v) for v in operands], _bind_frozen(eqn, operands), axis)


@rule("select_n")
def _select_n(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    index, *cases = operands
    if isinstance(index, LowRank):
        raise NotFactored("a choice by the weight")
    axes = _varying_axes(interp, eqn.invars[0])
    compact = NamedArray(_along_axes(index, axes), axes)

    def pick(arrays: Sequence[Array], dims: Sequence[Name]) -> Array:
        return lax.select_n(jnp.broadcast_to(compact.broadcastable(dims), arrays[0].shape), *arrays)

    return combine.select(cases, _bind_frozen(eqn, operands), axes, pick)


def _along_axes(array: Array, axes: Axes) -> Array:
    """One copy of an array that repeats along all axes but ``axes``: an array with these axes only."""
    # All entries along these axes are equal, so any of them will do, and so will their maximum: JAX does not slice an
    # axis that is sharded over an explicit mesh axis, but reduces it.
    if has_explicit_sharding(array):
        return jnp.max(array, [d for d in range(array.ndim) if d not in axes])
    return array[tuple(slice(None) if d in axes else 0 for d in range(array.ndim))]


def _varying_axes(interp: Interpreter, var: Var) -> Axes:
    """The axes along which an array may vary. If broadcasts and casts made it, those of what they began with only."""
    # jnp broadcasts a scale or a predicate to the shape of the weight before the equation, and vmap broadcasts it once
    # more. By its shape alone it would differ from element to element, for which there is no factored form.
    shape = var_type(var).shape
    producer = interp.producer(var)
    made_by = None if producer is None else producer.primitive.name
    if producer is not None and made_by == "convert_element_type":
        return _varying_axes(interp, producer.invars[0])
    if producer is None or made_by != "broadcast_in_dim":
        return tuple(d for d, n in enumerate(shape) if n != 1)
    operand = producer.invars[0]
    varying, old = _varying_axes(interp, operand), var_type(operand).shape
    return tuple(d for i, d in enumerate(_broadcast_axes(producer)) if i in varying and old[i] == shape[d])


# --- arithmetic that is linear in the weight ---


@rule("mul")
def _mul(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    on_left = isinstance(operands[0], LowRank)
    value, factor = operands if on_left else operands[::-1]
    if isinstance(factor, LowRank):
        raise NotFactored("an elementwise product of two adapted weights")
    return _scale(interp, value, _bind_frozen(eqn, operands), eqn.invars[on_left], jnp.asarray(factor))


@rule("div")
def _div(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    value, factor = operands
    if not isinstance(value, LowRank) or isinstance(factor, LowRank):
        raise NotFactored("a division by the weight")
    # The reciprocal is for the update alone: the frozen part is divided, so the base is exact to the last bit.
    return _scale(interp, value, _bind_frozen(eqn, operands), eqn.invars[1], 1 / jnp.asarray(factor))


def _scale(interp: Interpreter, value: LowRank, frozen: FrozenWeight, var: Var, by: Array) -> LowRank:
    value = _broadcast_like(value, frozen)
    if by.size == 1:
        return carriers.scale_by_scalar(value, frozen, by.reshape(()))
    axes = _varying_axes(interp, var)
    return combine.scale_by_channel(value, frozen, NamedArray(_along_axes(by, axes), axes))


def _broadcast_like(value: LowRank, frozen: FrozenWeight) -> LowRank:
    """``value`` in the shape of ``frozen``, if the other operand stretched an axis of length one, or a scalar."""
    if value.shape == frozen.shape:
        return value
    return carriers.broadcast(value, frozen, range(len(frozen.shape)) if value.ndim else [])


@rule("neg")
def _neg(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    return carriers.negate(operands[0])


@rule("add", "sub", "add_any")
def _add(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    left, right = operands
    if isinstance(left, LowRank) and isinstance(right, LowRank):
        right_term = carriers.negate(right) if eqn.primitive.name == "sub" else right
        return combine.add(left, right_term, _bind_frozen(eqn, operands))
    value = left if isinstance(left, LowRank) else right
    # The gain multiplies frozen part and update, but not what the program adds to them.
    if value.gain is not None:
        raise NotFactored("a sum with a weight under DoRA")
    frozen = _bind_frozen(eqn, operands)
    value = _broadcast_like(value, frozen)
    subtracted = eqn.primitive.name == "sub" and isinstance(right, LowRank)
    return (carriers.negate(value) if subtracted else value).with_frozen(frozen)


# --- dtype and placement ---


@rule("convert_element_type")
def _convert(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise NotFactored(f"a cast to {eqn.params['new_dtype']}")
    # The factors keep their dtype: they are cast when they are multiplied, to the dtype of the activation.
    return operands[0].map_frozen(_step(eqn))


@rule("stop_gradient", "copy", "copy_p")
def _on_every_array(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    return carriers.map_arrays(operands[0], lambda x: bind_one(eqn, x))


@rule("sharding_constraint", "reshard", "mesh_cast")
def _constrain(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    """Each factor inherits the sharding of the weight axes that it has; the rank is replicated."""
    value = operands[0]
    sharding = eqn.params["sharding" if "sharding" in eqn.params else "dst_sharding"]
    if value.probe or not isinstance(sharding, NamedSharding):
        return value.map_frozen(lambda w: bind_one(eqn, w))
    constrain = lax.with_sharding_constraint if eqn.primitive.name == "sharding_constraint" else jax.sharding.reshard
    # A spec may be shorter than the shape, and axes that the user left open must stay open.
    unconstrained = eqn.params.get("unconstrained_dims") or ()
    spec = [*sharding.spec, *[None] * (value.ndim - len(sharding.spec))]

    def entry(d: Any) -> Any:
        return None if d == RANK else PartitionSpec.UNCONSTRAINED if d in unconstrained else spec[d]

    def follow(x: NamedArray) -> NamedArray:
        own = NamedSharding(sharding.mesh, PartitionSpec(*(entry(d) for d in x.dims)))
        return NamedArray(constrain(x.array, own), x.dims)

    return value.carry(lambda w: bind_one(eqn, w), follow)


@rule("name", "device_put", "layout_constraint")
def _on_the_frozen_part(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    if len(operands) != 1:
        raise NotFactored(f"{eqn.primitive.name} of several arrays")
    return operands[0].map_frozen(lambda w: bind_one(eqn, w))


@rule("pvary", "pcast")
def _vary(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> LowRank:
    return operands[0].map_frozen(lambda w: bind_one(eqn, w))  # the factors vary where they are used


@rule("optimization_barrier")
def _optimization_barrier(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    results = bind(eqn, [v.frozen.dense() if isinstance(v, LowRank) else v for v in operands])
    return [
        v.map_frozen(lambda _, r=r: r) if isinstance(v, LowRank) else r for v, r in zip(operands, results, strict=True)
    ]
