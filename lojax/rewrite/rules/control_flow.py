"""Rules for control flow and calls: bodies are rewritten, and the settings of the equation stay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec

from lojax.compat import opened, scan_counts, unspecified_sharding
from lojax.lowrank.frozen import DenseWeight, RecomputedWeight, is_frozen
from lojax.lowrank.named_array import NamedArray
from lojax.lowrank.value import LowRank
from lojax.rewrite.chain_sources import WORTHWHILE
from lojax.rewrite.frozen_chains import Value
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.recorder import Use
from lojax.rewrite.rules.table import Table, registrar
from lojax.types import Array, Eqn, Jaxpr

RULES: Table = {}
rule = registrar(RULES)


def _is_low_rank(value: Value) -> bool:
    return isinstance(value, LowRank)


def _leaves(values: Sequence[Value]) -> list[Array]:
    return jax.tree.leaves(list(values))


def _with_dense_frozen(value: Value) -> Value:
    """``value`` with a frozen part that is an array, for places that need arrays of the shape of the weight."""
    if isinstance(value, LowRank):
        return value if isinstance(value.frozen, DenseWeight) else value.with_frozen(DenseWeight(value.frozen.dense()))
    return value.dense() if is_frozen(value) else value


# --- calls ---


@rule("jit", "pjit")
def _jit(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    p = dict(eqn.params)
    closed, out_tree = interp.rewrite(p["jaxpr"], operands)
    outputs = out_tree.unflatten(range(out_tree.num_leaves))
    unspecified = unspecified_sharding()

    def per_array(settings: Sequence[Any], values: Sequence[Value], other: Any) -> tuple[Any, ...]:
        """One setting for each array: that of the weight for its frozen part, ``other`` for the rest of a value."""

        def of_value(setting: Any, value: Value) -> list[Any]:
            weight = value.frozen if isinstance(value, LowRank) else value
            if not jax.tree.leaves(weight):  # a number in the program
                return []
            # What a weight is computed from has shapes of its own.
            own = [other] if isinstance(weight, RecomputedWeight) else [setting]
            return own + [own[0] if weight is value else other] * (len(jax.tree.leaves(value)) - 1)

        return tuple(s for setting, v in zip(settings, values, strict=True) for s in of_value(setting, v))

    # Shardings and layouts are for arrays of the shape of the weight, so they cannot be those of a factor. Nor is a
    # factor donated with its weight: another use may still read it.
    p |= {
        "jaxpr": closed,
        "in_shardings": per_array(p["in_shardings"], operands, unspecified),
        "in_layouts": per_array(p["in_layouts"], operands, None),
        "donated_invars": per_array(p["donated_invars"], operands, False),
        "out_shardings": per_array(p["out_shardings"], outputs, unspecified),
        "out_layouts": per_array(p["out_layouts"], outputs, None),
    }
    return out_tree.unflatten(eqn.primitive.bind(*_leaves(operands), **p))


@rule("closed_call", "core_call", "core_closed_call")
def _call(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    return interp.run(eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"], operands)


@rule("remat2", "checkpoint", "remat")
def _remat(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    p = eqn.params
    # JAX may have one flag for each operand, and the values have more leaves than the equation has operands.
    prevent_cse = p["prevent_cse"] if isinstance(p["prevent_cse"], bool) else any(p["prevent_cse"])

    uses: list[Use] = []

    def body(*values: Value) -> list[Value]:
        with interp.recorder.collect(uses):
            return interp.run(p["jaxpr"], values)

    outputs = list(jax.checkpoint(body, prevent_cse=prevent_cse, policy=p["policy"])(*operands))
    interp.recorder.replay(uses)
    return outputs


@rule("shard_map")
def _shard_map(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Array]:
    p = eqn.params

    def value_specs(value: Value, spec: PartitionSpec) -> Any:
        """The specs of a value: a factor is sharded like the axes of the weight that it has."""
        if not isinstance(value, LowRank):
            return spec
        entries: dict[Any, Any] = dict(enumerate((*spec, *[None] * (value.ndim - len(spec)))))
        specs = value.with_named_arrays(
            [NamedArray(PartitionSpec(*(entries.get(d) for d in x.dims)), x.dims) for x in value.named_arrays]
        )
        # The key is replicated: `drop_out` folds the index of the shard in.
        dropout = value.dropout and dataclasses.replace(value.dropout, key=PartitionSpec())
        active = None if value.active is None else PartitionSpec()
        frozen = jax.tree.map(lambda _: spec, value.frozen)
        return dataclasses.replace(specs, frozen=frozen, dropout=dropout, active=active)

    uses: list[Use] = []

    def body(*values: Value) -> tuple[Array, ...]:
        with interp.recorder.collect(uses):
            return tuple(interp.dense_outputs(interp.run(p["jaxpr"], values)))

    operands = [_with_dense_frozen(v) for v in operands]
    in_specs = tuple(value_specs(v, spec) for v, spec in zip(operands, p["in_specs"], strict=True))
    sharded = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=in_specs,
        out_specs=tuple(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    outputs = list(sharded(*operands))
    interp.recorder.replay(uses)
    return outputs


@rule("cond")
def _cond(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    index, *values = operands
    index = interp.dense(index, eqn, "a branch is chosen by the weight")
    values = [_cheaper_to_save(v) for v in values]
    branches = eqn.params["branches"]
    may_stay = [True] * len(opened(branches[0])[0].outvars)
    # All branches must return one structure. So they are rewritten twice: once with every output free to stay low-rank,
    # to see where they agree, and once with the other outputs dense. The uses of the trial are not counted.
    with interp.recorder.collect([]):
        forms = [interp.rewrite(branch, values, may_stay) for branch in branches]
    outputs = [tree.unflatten(closed.out_avals) for closed, tree in forms]
    may_stay = [len({_form(v) for v in same_output}) == 1 for same_output in zip(*outputs, strict=True)]
    forms = [interp.rewrite(branch, values, may_stay) for branch in branches]
    leaves = jax.lax.switch(index, [jaxpr_as_fun(closed) for closed, _ in forms], *_leaves(values))
    return forms[0][1].unflatten(leaves)


def _cheaper_to_save(value: Value) -> Value:
    """``value`` with its frozen part as an array, if that takes less memory than what it is computed from."""
    # JAX copies what a branch saves, even where that is an argument of the program. In a branch it is thus better to
    # save a cast to bfloat16, or one layer of a stack, than the stack in float32.
    weight = value.frozen if isinstance(value, LowRank) else value
    if not isinstance(weight, RecomputedWeight):
        return value
    if weight.stored_bytes <= math.prod(weight.shape) * weight.dtype.itemsize:
        return value
    dense = DenseWeight(weight.dense())
    if isinstance(value, LowRank):
        return value.with_frozen(dense)
    # Codes, and what scales them, go on being followed.
    return dense if weight.dtype.itemsize == 1 or math.prod(weight.shape) < WORTHWHILE else dense.array


def _form(value: Value) -> Hashable:
    leaves, tree = jax.tree.flatten(value)
    # The leaves are abstract values, so equal means equal in shape and dtype too.
    return tree, tuple(leaves)


# --- loops ---


@dataclasses.dataclass(frozen=True)
class _LoopOperand:
    """An operand of a loop, split into arrays that all trips share and arrays with one entry for each trip.

    Attributes:
        shared: Arrays that all trips share.
        own: Arrays of which each trip gets one entry.
        join: ``join(shared, own)``: the operand of one trip.
    """

    shared: Any
    own: Any
    join: Callable[[Any, Any], Value]


def _constant_operand(value: Value, length: int | None) -> _LoopOperand:
    """A constant of a loop. Under dropout, every trip gets another key."""
    if not isinstance(value, LowRank) or value.dropout is None or length is None:
        return _LoopOperand(value, None, lambda shared, own: shared)
    return _LoopOperand(
        # The body is traced once, so a fold inside of it would be the same in all trips: the keys come in from outside.
        value,
        value.dropout.split(length),
        lambda shared, own: dataclasses.replace(shared, dropout=own),
    )


def _sliced_operand(value: Value, length: int) -> _LoopOperand:
    """An operand that a scan slices along its first axis."""
    if not isinstance(value, LowRank):
        return _LoopOperand(None, value.entries() if is_frozen(value) else value, lambda shared, own: own)
    names = {d: d - 1 for d in range(1, value.ndim)}
    arrays = value.named_arrays
    dropout = None if value.dropout is None else value.dropout.split(length)
    # An array without the first axis repeats along it: it is shared, not copied once for each trip.
    sliced = [x.transpose_to([0, *(d for d in x.dims if d != 0)]).array if 0 in x.dims else None for x in arrays]
    shared = [None if 0 in x.dims else x.array for x in arrays]
    dims = [tuple(names.get(d, d) for d in x.dims if d != 0) for x in arrays]  # type: ignore[call-overload]

    def join(shared: tuple[list[Any], Array | None], own: Any) -> LowRank:
        frozen, dropout, sliced = own
        arrays, active = shared
        entries = [s if c is None else c for c, s in zip(arrays, sliced, strict=True)]
        low_rank = value.with_named_arrays([NamedArray(x, d) for x, d in zip(entries, dims, strict=True)])
        return dataclasses.replace(low_rank, frozen=frozen, dropout=dropout, active=active)

    return _LoopOperand((shared, value.active), (value.frozen.entries(), dropout, sliced), join)


def _stacked_output(value: Value) -> Value:
    """An output that a scan stacked along a new first axis."""
    if not isinstance(value, LowRank):
        return value
    names = {d: d + 1 for d in range(value.ndim - 1)}
    return value.with_named_arrays(
        [NamedArray(x.array, (0, *(names.get(d, d) for d in x.dims))) for x in value.named_arrays]  # type: ignore[call-overload]
    )


def _settle_carries(
    interp: Interpreter,
    eqn: Eqn,
    body: Jaxpr,
    carries: list[Value],
    first: int,
    trial: Callable[[list[Value]], list[Any]],
) -> tuple[list[bool], list[Value]]:
    """Which carries the body never changes, and the carries with every unstable low-rank one dense.

    A low-rank carry is stable if the body returns it with an unchanged structure. A carry that is made dense may change
    the structure of another, so this repeats until all are stable: at most once for each carry.

    Args:
        interp: The interpreter.
        eqn: The loop.
        body: Its body.
        carries: The initial carries.
        first: The position of the first carry among the body's inputs.
        trial: Returns the carries after one trip, as shapes, for the carries before it.
    """
    opened_body, _ = opened(body)
    # One variable that comes in and goes out is unchanged for sure. Such a carry becomes a constant of the loop, so a
    # weight that a `fori_loop` carries along needs no stability and stays low-rank.
    unchanged = [opened_body.outvars[i] is opened_body.invars[first + i] for i in range(len(carries))]
    carries = [v if same else _with_dense_frozen(v) for v, same in zip(carries, unchanged, strict=True)]
    while any(_is_low_rank(v) and not same for v, same in zip(carries, unchanged, strict=True)):
        carries_out = trial(carries)
        unstable = [
            i
            for i, (v, out) in enumerate(zip(carries, carries_out, strict=True))
            if _is_low_rank(v) and not unchanged[i] and jax.tree.structure(v) != jax.tree.structure(out)
        ]
        if not unstable:
            break
        for i in unstable:
            carries[i] = interp.dense(carries[i], eqn, "a loop carries it and changes it")
    return unchanged, carries


def _changing_carries(carries: list[Value], unchanged: list[bool], body: Jaxpr, first: int) -> list[Value]:
    """The carries that change. A Python scalar becomes an array of the dtype that the body expects."""
    opened_body, _ = opened(body)
    avals = [v.aval for v in opened_body.invars[first : first + len(carries)]]
    return [
        v if _is_low_rank(v) or isinstance(v, jax.Array) else jnp.asarray(v, aval.dtype)
        for v, same, aval in zip(carries, unchanged, avals, strict=True)
        if not same
    ]


@rule("scan")
def _scan(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    p = eqn.params
    jaxpr, length = p["jaxpr"], p["length"]
    num_consts, num_carry = scan_counts(p)
    consts = [_constant_operand(v, length) for v in operands[:num_consts]]
    xs = [_sliced_operand(v, length) for v in operands[num_consts + num_carry :]]
    carries = operands[num_consts : num_consts + num_carry]

    uses: list[Use] = []

    def run(carry: list[Value], owns: list[Any]) -> list[Value]:
        ins = [operand.join(operand.shared, own) for operand, own in zip((*consts, *xs), owns, strict=True)]
        outputs = interp.run(jaxpr, [*ins[:num_consts], *carry, *ins[num_consts:]])
        return [_with_dense_frozen(v) for v in outputs]

    owns = [operand.own for operand in (*consts, *xs)]

    def trial(carry: list[Value]) -> list[Any]:
        with interp.recorder.collect([]):
            # Shapes only, and no uses: the real trace below counts them. `x[0]` stands for the entries of any trip.
            return jax.eval_shape(lambda c, o: run(c, jax.tree.map(lambda x: x[0], o))[:num_carry], carry, owns)

    unchanged, carries = _settle_carries(interp, eqn, jaxpr, carries, num_consts, trial)
    constant_carries = [
        _constant_operand(v, length) if same else None for v, same in zip(carries, unchanged, strict=True)
    ]
    constant_owns = [operand.own for operand in constant_carries if operand]

    def body(changing: list[Value], owns: tuple[list[Any], list[Any]]) -> tuple[list[Value], list[Value]]:
        changing_in, own_in = iter(changing), iter(owns[1])
        carry = [c.join(c.shared, next(own_in)) if c else next(changing_in) for c in constant_carries]
        with interp.recorder.collect(uses):
            outputs = run(carry, owns[0])
            new = [v for v, same in zip(outputs[:num_carry], unchanged, strict=True) if not same]
            return interp.dense_outputs(new, [_is_low_rank(v) for v in changing]), outputs[num_carry:]

    changing, ys = jax.lax.scan(
        body,
        _changing_carries(carries, unchanged, jaxpr, num_consts),
        (owns, constant_owns),
        length=length,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    interp.recorder.replay(uses, trips=length)
    changing_out = iter(changing)
    finals = [v if same else next(changing_out) for v, same in zip(carries, unchanged, strict=True)]
    return finals + [_stacked_output(y) for y in ys]


@rule("while")
def _while(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    p = eqn.params
    num_cond, num_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = operands[:num_cond], operands[num_cond : num_cond + num_body]
    carries = operands[num_cond + num_body :]

    def run(consts: list[Value], carry: list[Value]) -> list[Value]:
        return [_with_dense_frozen(v) for v in interp.run(p["body_jaxpr"], [*consts, *carry])]

    def trial(carry: list[Value]) -> list[Any]:
        with interp.recorder.collect([]):
            return jax.eval_shape(lambda c: run(body_consts, c), carry)

    unchanged, carries = _settle_carries(interp, eqn, p["body_jaxpr"], carries, num_body, trial)

    def all_carries(changing: list[Value]) -> list[Value]:
        changing_in = iter(changing)
        return [v if same else next(changing_in) for v, same in zip(carries, unchanged, strict=True)]

    cond_uses: list[Use] = []
    body_uses: list[Use] = []

    def cond(state: tuple[Any, list[Value]]) -> Array:
        with interp.recorder.collect(cond_uses):
            return interp.run(p["cond_jaxpr"], [*cond_consts, *all_carries(state[1])])[0]

    def body(state: tuple[Any, list[Value]]) -> tuple[Any, list[Value]]:
        trip, changing = state
        consts, carry = ([_with_trip_dropout(v, trip) for v in vs] for vs in (body_consts, all_carries(changing)))
        with interp.recorder.collect(body_uses):
            outputs = run(consts, carry)
            new = [v for v, same in zip(outputs, unchanged, strict=True) if not same]
            new = interp.dense_outputs(new, [_is_low_rank(v) for v in changing])
        return trip if trip is None else trip + 1, new

    drops = any(isinstance(v, LowRank) and v.dropout is not None for v in (*body_consts, *carries))
    # The number of trips is unknown, so keys cannot be split: each trip folds in its number. Without dropout the
    # counter is None, an empty tree, and the loop carries what the user's loop carries.
    first_trip = jnp.zeros((), jnp.uint32) if drops else None
    start = (first_trip, _changing_carries(carries, unchanged, p["body_jaxpr"], num_body))
    _, changing = jax.lax.while_loop(cond, body, start)
    interp.recorder.replay([*cond_uses, *body_uses])  # as one trip: the number of trips is unknown
    return all_carries(changing)


def _with_trip_dropout(value: Value, trip: Array | None) -> Value:
    """``value``; if it is under dropout, with another key for each trip of a loop."""
    if trip is None or not isinstance(value, LowRank) or value.dropout is None:
        return value
    return dataclasses.replace(value, dropout=value.dropout.fold_in(trip))
