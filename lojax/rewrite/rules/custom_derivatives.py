"""The table, third part: functions that bring their own derivative (`custom_jvp`, `custom_vjp`).

The user's rule is honoured, with the low-rank value going through it: the program that `jax.jvp` or
`jax.vjp` makes of the function is itself evaluated by the interpreter. A tangent of ``w + a b`` is
``dw + da b + a db``, a sum of two updates. A cotangent of the whole weight, which only
the user's rule of a `custom_vjp` can ask for, is pulled back to ``a`` and ``b`` at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lojax.lowrank.value import LowRank, NotFactored
from lojax.rewrite.interpreter import Interpreter, bind, rule


def _weight(value: Any) -> Any:
    return value.w if isinstance(value, LowRank) else value


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(_weight(value)), jnp.inexact)


def _all_dense(interp: Interpreter, outputs: list[Any]) -> list[Any]:
    return interp.densed(outputs, [False] * len(outputs))


@rule("custom_jvp_call")
def _custom_jvp(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    if any(v.key is not None for v in operands if isinstance(v, LowRank)):
        raise NotFactored("dropout inside a function with its own derivative")
    if any(v.gain is not None for v in operands if isinstance(v, LowRank)):
        raise NotFactored("DoRA inside a function with its own forward derivative")
    floats = [i for i, v in enumerate(operands) if _is_float(v)]

    @jax.custom_jvp
    def call(values: list[Any]) -> list[Any]:
        interp.fresh()
        return _all_dense(interp, interp.run(eqn.params["call_jaxpr"], values))

    @call.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        (values,), (all_dots,) = primals, tangents
        dots = [_tangent(values[i], all_dots[i]) for i in floats]

        def user_jvp(*dense: Any) -> Any:
            held, dense_dots = list(dense[: len(values)]), dense[len(values) :]

            def user(*moving: Any) -> list[Any]:
                for i, x in zip(floats, moving, strict=True):
                    held[i] = x
                return bind(eqn, held)

            return jax.jvp(user, tuple(held[i] for i in floats), dense_dots)

        traced = jax.make_jaxpr(user_jvp)(*(jax.typeof(_weight(v)) for v in (*values, *dots)))
        outer, interp.naming = interp.naming, False
        try:
            outputs = _all_dense(interp, interp.run(traced, [*values, *dots]))
        finally:
            interp.naming = outer
        half = len(outputs) // 2
        return outputs[:half], outputs[half:]

    with interp.repeated(1):
        return list(call(list(operands)))


def _tangent(value: Any, dot: Any) -> Any:
    """``dw + da b + a db``: a sum of two updates, each linear in the tangents."""
    if not isinstance(value, LowRank):
        return dot
    factors = []
    for term, term_dot in zip(value.terms(), dot.terms(), strict=True):
        (a, b), (da, db) = term.factors, term_dot.factors
        factors += [da, b, a, db]
    return dataclasses.replace(value, w=dot.w, factors=tuple(factors))


@rule("custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom_vjp(interp: Interpreter, eqn: Any, operands: list[Any]) -> Any:
    if any(v.key is not None for v in operands if isinstance(v, LowRank)):
        raise NotFactored("dropout inside a function with its own derivative")
    floats = [i for i, v in enumerate(operands) if _is_float(v)]
    count = len(eqn.outvars)
    pullback: Any = None

    @jax.custom_vjp
    def call(values: list[Any]) -> list[Any]:
        interp.fresh()
        return _all_dense(interp, interp.run(eqn.params["call_jaxpr"], values))

    def forward(values: list[Any]) -> Any:
        def with_pullback(*dense: Any) -> Any:
            nonlocal pullback
            outputs, back = jax.vjp(lambda *x: bind(eqn, x), *dense)
            residuals, pullback = jax.tree.flatten(back)
            return outputs, residuals

        traced = jax.make_jaxpr(with_pullback)(*(jax.typeof(_weight(v)) for v in values))
        results = interp.run(traced, values)
        return _all_dense(interp, results[:count]), (values, results[count:])

    def backward(kept: Any, cotangents: Sequence[Any]) -> Any:
        values, residuals = kept

        def pull(residuals: list[Any], cotangents: Any) -> list[Any]:
            grads = jax.tree.unflatten(pullback, residuals)(list(cotangents))
            return [grads[i] for i in floats]

        shapes = [jax.typeof(_weight(r)) for r in residuals], [jax.typeof(c) for c in cotangents]
        traced = jax.make_jaxpr(pull)(*shapes)
        grads = _all_dense(interp, interp.run(traced, [*residuals, *cotangents]))
        pulled: list[Any] = [None] * len(values)
        for i, grad in zip(floats, grads, strict=True):
            pulled[i] = _pulled(values[i], grad)
        return (pulled,)

    call.defvjp(forward, backward)
    with interp.repeated(1):
        return list(call(list(operands)))


def _pulled(value: Any, cotangent: Any) -> Any:
    """The cotangents of ``w``, ``a`` and ``b`` for the cotangent of the whole value."""
    if not isinstance(value, LowRank):
        return cotangent
    return jax.vjp(lambda v: v.dense(), value)[1](cotangent)[0]
