"""The table, second part: control flow and calls. Bodies are rewritten inside, their settings kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec

from lojax.compat import opened, scan_counts, unspecified_sharding
from lojax.lowrank.named_array import RANK, Name, Named
from lojax.lowrank.value import LowRank
from lojax.rewrite.interpreter import Interpreter, rule


def _is_low(value: Any) -> bool:
    return isinstance(value, LowRank)


def _leaves(values: Sequence[Any]) -> list[Any]:
    return jax.tree.leaves(list(values))


@rule("jit", "pjit")
def _jit(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    p = dict(eqn.params)
    closed, out_tree = interp.rewrite(p["jaxpr"], operands)
    outputs = out_tree.unflatten(range(out_tree.num_leaves))
    unspecified = unspecified_sharding()

    def spread(settings: Sequence[Any], values: Sequence[Any], other: Any) -> tuple[Any, ...]:
        """One setting per array: the weight keeps its own, the factors take ``other``."""
        return tuple(
            s
            for setting, v in zip(settings, values, strict=True)
            for s in (setting, *[other] * (len(jax.tree.leaves(v)) - 1))
        )

    p |= {
        "jaxpr": closed,
        "in_shardings": spread(p["in_shardings"], operands, unspecified),
        "in_layouts": spread(p["in_layouts"], operands, None),
        "donated_invars": spread(p["donated_invars"], operands, False),
        "out_shardings": spread(p["out_shardings"], outputs, unspecified),
        "out_layouts": spread(p["out_layouts"], outputs, None),
    }
    return out_tree.unflatten(eqn.primitive.bind(*_leaves(operands), **p))


@rule("closed_call", "core_call", "core_closed_call")
def _call(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    return interp.run(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), operands)


@rule("remat2", "checkpoint", "remat")
def _remat(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    p = eqn.params
    prevent_cse = p["prevent_cse"] if isinstance(p["prevent_cse"], bool) else any(p["prevent_cse"])

    def body(*values: Any) -> list[Any]:
        interp.fresh()
        return interp.run(p["jaxpr"], values)

    with interp.repeated(1):
        return list(jax.checkpoint(body, prevent_cse=prevent_cse, policy=p["policy"])(*operands))


@rule("cond")
def _cond(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    index, *values = operands
    index = interp.dense(index, eqn, "a branch is chosen by the weight")
    branches = eqn.params["branches"]
    keep = [True] * len(opened(branches[0])[0].outvars)
    with interp.repeated(0):  # to see which outputs all branches leave in one low-rank form
        forms = [interp.rewrite(branch, values, keep) for branch in branches]
    outputs = [tree.unflatten(closed.out_avals) for closed, tree in forms]
    for i, same in enumerate(zip(*outputs, strict=True)):
        keep[i] = len({_form(v) for v in same}) == 1
    forms = [interp.rewrite(branch, values, keep) for branch in branches]
    leaves = jax.lax.switch(index, [jaxpr_as_fun(closed) for closed, _ in forms], *_leaves(values))
    return forms[0][1].unflatten(leaves)


def _form(value: Any) -> Any:
    leaves, tree = jax.tree.flatten(value)
    return tree, tuple(leaves)


# --- loops ---


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operand of a loop, split into what every trip shares and what each trip has of its own."""

    shared: Any
    own: Any
    join: Callable[[Any, Any], Any]


def _shared(value: Any, length: int | None) -> _Step:
    """A constant of a loop; under dropout every trip draws its own key."""
    if not _is_low(value) or value.key is None or length is None:
        return _Step(value, None, lambda shared, own: shared)
    keys = jax.random.split(value.key, length)
    return _Step(value, keys, lambda shared, own: dataclasses.replace(shared, key=own))


def _sliced(value: Any, length: int) -> _Step:
    """An operand that a scan slices along its first axis."""
    if not _is_low(value):
        return _Step(None, value, lambda shared, own: own)
    names: dict[Name, Name] = {d: d - 1 for d in range(1, value.w.ndim)}
    keys = None if value.key is None else jax.random.split(value.key, length)
    own = [x.ordered([0, *(d for d in x.dims if d != 0)]).array if 0 in x.dims else None for x in value.parts]
    shared = [None if 0 in x.dims else x.array for x in value.parts]
    dims = [tuple(names.get(d, d) for d in x.dims if d != 0) for x in value.parts]

    def join(shared: Any, own: Any) -> LowRank:
        w, key, slices = own
        arrays = [s if c is None else c for c, s in zip(shared, slices, strict=True)]
        return value.with_parts([Named(x, d) for x, d in zip(arrays, dims, strict=True)], w=w, key=key)

    return _Step(shared, (value.w, keys, own), join)


def _stacked(value: Any) -> Any:
    """An output that a scan stacked along a new first axis."""
    if not _is_low(value):
        return value
    names: dict[Name, Name] = {d: d + 1 for d in range(value.w.ndim - 1)}
    return value.with_parts([Named(x.array, (0, *(names.get(d, d) for d in x.dims))) for x in value.parts])


def _loop_carries(
    interp: Interpreter, eqn: Any, jaxpr: Any, carries: list[Any], first: int, probe: Callable[[list[Any]], list[Any]]
) -> tuple[list[bool], list[Any]]:
    """Which carries the body never changes, and the carries with every unstable low-rank one dense.

    Args:
        interp: The interpreter.
        eqn: The loop.
        jaxpr: Its body.
        carries: The initial carries.
        first: The position of the first carry among the body's inputs.
        probe: The body's carries out, as shapes, for given carries in.
    """
    body, _ = opened(jaxpr)
    fixed = [body.outvars[i] is body.invars[first + i] for i in range(len(carries))]
    while any(_is_low(v) and not f for v, f in zip(carries, fixed, strict=True)):
        after = probe(carries)
        unstable = [
            i
            for i, (v, new) in enumerate(zip(carries, after, strict=True))
            if _is_low(v) and not fixed[i] and jax.tree.structure(v) != jax.tree.structure(new)
        ]
        if not unstable:
            break
        for i in unstable:
            carries[i] = interp.dense(carries[i], eqn, "a loop carries it and changes it")
    return fixed, carries


@rule("scan")
def _scan(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    p = eqn.params
    jaxpr, length = p["jaxpr"], p["length"]
    num_consts, num_carry = scan_counts(p)
    consts = [_shared(v, length) for v in operands[:num_consts]]
    xs = [_sliced(v, length) for v in operands[num_consts + num_carry :]]
    carries = operands[num_consts : num_consts + num_carry]

    def run(carry: list[Any], owns: list[Any]) -> list[Any]:
        ins = [s.join(s.shared, own) for s, own in zip((*consts, *xs), owns, strict=True)]
        interp.fresh()
        return interp.run(jaxpr, [*ins[:num_consts], *carry, *ins[num_consts:]])

    owns = [s.own for s in (*consts, *xs)]

    def probe(carry: list[Any]) -> list[Any]:
        with interp.repeated(0):
            return jax.eval_shape(lambda c, o: run(c, jax.tree.map(lambda x: x[0], o))[:num_carry], carry, owns)

    fixed, carries = _loop_carries(interp, eqn, jaxpr, carries, num_consts, probe)
    held = [_shared(v, length) if f else None for v, f in zip(carries, fixed, strict=True)]
    held_own = [s.own for s in held if s]

    def body(moving: list[Any], owns: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        moving_in, own_in = iter(moving), iter(owns[1])
        carry = [s.join(s.shared, next(own_in)) if s else next(moving_in) for s in held]
        outputs = run(carry, owns[0])
        new = [v for v, f in zip(outputs[:num_carry], fixed, strict=True) if not f]
        return interp.densed(new, [_is_low(v) for v in moving]), outputs[num_carry:]

    with interp.repeated(length):
        moving, ys = jax.lax.scan(
            body,
            _typed(carries, fixed, jaxpr, num_consts),
            (owns, held_own),
            length=length,
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
    moving_out = iter(moving)
    return [v if f else next(moving_out) for v, f in zip(carries, fixed, strict=True)] + [_stacked(y) for y in ys]


def _typed(carries: list[Any], fixed: list[bool], jaxpr: Any, first: int) -> list[Any]:
    """The carries that move, those that are Python scalars as arrays of the body's dtype."""
    body, _ = opened(jaxpr)
    avals = [v.aval for v in body.invars[first : first + len(carries)]]
    return [
        v if _is_low(v) or isinstance(v, jax.Array) else jnp.asarray(v, aval.dtype)
        for v, f, aval in zip(carries, fixed, avals, strict=True)
        if not f
    ]


@rule("while")
def _while(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    p = eqn.params
    nc, nb = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, carries = operands[:nc], operands[nc : nc + nb], operands[nc + nb :]

    def probe(carry: list[Any]) -> list[Any]:
        with interp.repeated(0):
            return jax.eval_shape(lambda c: interp.run(p["body_jaxpr"], [*body_consts, *c]), carry)

    fixed, carries = _loop_carries(interp, eqn, p["body_jaxpr"], carries, nb, probe)

    def whole(moving: list[Any]) -> list[Any]:
        moving_in = iter(moving)
        return [v if f else next(moving_in) for v, f in zip(carries, fixed, strict=True)]

    def cond(state: tuple[Any, list[Any]]) -> Any:
        interp.fresh()
        return interp.run(p["cond_jaxpr"], [*cond_consts, *whole(state[1])])[0]

    def body(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        trip, moving = state
        interp.fresh()
        operands = [_keyed(v, trip) for v in (*body_consts, *whole(moving))]
        outputs = interp.run(p["body_jaxpr"], operands)
        new = [v for v, f in zip(outputs, fixed, strict=True) if not f]
        return trip if trip is None else trip + 1, interp.densed(new, [_is_low(v) for v in moving])

    drops = any(_is_low(v) and v.key is not None for v in (*body_consts, *carries))
    with interp.repeated(1):
        start = (jnp.zeros((), jnp.uint32) if drops else None, _typed(carries, fixed, p["body_jaxpr"], nb))
        _, moving = jax.lax.while_loop(cond, body, start)
    return whole(moving)


def _keyed(value: Any, trip: Any) -> Any:
    """A low-rank value under dropout with a key for this trip of a loop."""
    if trip is None or not _is_low(value) or value.key is None:
        return value
    return dataclasses.replace(value, key=jax.random.fold_in(value.key, trip))


@rule("shard_map")
def _shard_map(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    p = eqn.params

    def spread(value: Any, spec: PartitionSpec) -> Any:
        """The specs of a value: a factor is sharded like the axes of the weight that it holds."""
        if not _is_low(value):
            return spec
        along = (*spec, *[None] * (value.w.ndim - len(spec)))
        parts = [Named(PartitionSpec(*(None if d == RANK else along[d] for d in x.dims)), x.dims) for x in value.parts]
        return value.with_parts(parts, w=spec, key=None if value.key is None else PartitionSpec())

    def body(*values: Any) -> tuple[Any, ...]:
        interp.fresh()
        outputs = interp.run(p["jaxpr"], values)
        return tuple(interp.densed(outputs, [False] * len(outputs)))

    in_specs = tuple(spread(v, spec) for v, spec in zip(operands, p["in_specs"], strict=True))
    with interp.repeated(1):
        return list(
            jax.shard_map(
                body,
                mesh=p["mesh"],
                in_specs=in_specs,
                out_specs=tuple(p["out_specs"]),
                axis_names=set(p["newly_manual_axes"]),
                check_vma=p["check_vma"],
            )(*operands)
        )
