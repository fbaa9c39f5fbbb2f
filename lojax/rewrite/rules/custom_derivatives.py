"""Rules for functions with a derivative written by the user (`custom_jvp`, `custom_vjp`).

The user's derivative is used, and evaluated with the low-rank value: the program that `jax.jvp` or
`jax.vjp` makes of the function is itself run by the interpreter. A tangent of ``w + a b`` is
``dw + da b + a db``, a sum of two updates. A cotangent of the dense weight, which only
the user's rule of a `custom_vjp` can ask for, is pulled back to ``a`` and ``b`` at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lojax.compat import remove_dead_equations
from lojax.lowrank.frozen import DenseWeight, is_frozen
from lojax.lowrank.value import LowRank, NotFactored, Term
from lojax.rewrite.frozen_chains import Value
from lojax.rewrite.interpreter import Interpreter, bind
from lojax.rewrite.recorder import Use
from lojax.rewrite.rules.table import Table, registrar
from lojax.types import Array, Eqn

RULES: Table = {}
rule = registrar(RULES)


def _frozen_part(value: Value) -> Any:
    return value.frozen.dense() if isinstance(value, LowRank) else value


def _is_float(value: Value) -> bool:
    return jnp.issubdtype(jnp.result_type(_frozen_part(value)), jnp.inexact)


def _has_dropout(values: Sequence[Value]) -> bool:
    return any(isinstance(v, LowRank) and v.dropout is not None for v in values)


def _stored_dense(values: Sequence[Value]) -> list[Value]:
    """``values`` with frozen parts that are arrays: the derivatives below have tangents of floats only."""
    return [v.with_frozen(DenseWeight(v.frozen.dense())) if isinstance(v, LowRank) else v for v in values]


@rule("custom_jvp_call")
def _custom_jvp(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    operands = _stored_dense(operands)
    # The function and its derivative are two programs for the interpreter, which would draw two masks.
    if _has_dropout(operands):
        raise NotFactored("dropout inside a function with its own derivative")
    # The tangent of g (w + a b) has a term dg (w + a b), which is not low-rank.
    if any(v.gain is not None for v in operands if isinstance(v, LowRank)):
        raise NotFactored("DoRA inside a function with its own forward derivative")
    # `jax.jvp` below takes tangents for floats; indices and keys are closed over.
    floats = [i for i, v in enumerate(operands) if _is_float(v)]

    uses: list[Use] = []

    @jax.custom_jvp
    def call(values: list[Value]) -> list[Array]:
        with interp.recorder.collect(uses):
            return interp.dense_outputs(interp.run(eqn.params["call_jaxpr"], values))

    @call.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        (values,), (value_dots,) = primals, tangents
        dots = [_tangent(values[i], value_dots[i]) for i in floats]

        def user_jvp(*dense: Array) -> tuple[list[Array], list[Array]]:
            operands, dense_dots = list(dense[: len(values)]), dense[len(values) :]

            def user(*float_operands: Array) -> list[Array]:
                for i, x in zip(floats, float_operands, strict=True):
                    operands[i] = x
                return bind(eqn, operands)

            return jax.jvp(user, tuple(operands[i] for i in floats), dense_dots)

        traced = jax.make_jaxpr(user_jvp)(*(jax.typeof(_frozen_part(v)) for v in (*values, *dots)))
        # Some of these values are tangents, and JAX cannot transpose the name of a product.
        outer, interp.naming = interp.naming, False
        try:
            outputs = interp.dense_outputs(interp.run(traced, [*values, *dots]))
        finally:
            interp.naming = outer
        half = len(outputs) // 2
        return outputs[:half], outputs[half:]

    outputs = list(call(list(operands)))
    interp.recorder.replay(uses)
    return outputs


def _tangent(value: Value, dot: Value) -> Value:
    """``dw + da b + a db``: a sum of two updates, each linear in the tangents."""
    if not isinstance(value, LowRank):
        return dot
    terms: list[Term] = []
    for (a, b), (da, db) in zip(value.terms, dot.terms, strict=True):
        terms += [(da, b), (a, db)]
    return dataclasses.replace(value, frozen=dot.frozen, terms=tuple(terms))


@rule("custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom_vjp(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    if any(isinstance(v, LowRank) and v.pending for v in operands):
        return _custom_vjp_of_codes(interp, eqn, operands)
    operands = _stored_dense(operands)
    if _has_dropout(operands):
        raise NotFactored("dropout inside a function with its own derivative")
    # The first operands are the arrays that the user's function closes over: its rule returns no cotangent for them.
    num_consts = eqn.params.get("num_consts", 0)
    if any(isinstance(v, LowRank) for v in operands[:num_consts]):
        raise NotFactored("a function with its own derivative closes over the weight")
    floats = [i for i, v in enumerate(operands) if i >= num_consts and _is_float(v)]
    count = len(eqn.outvars)
    pullback: Any = None
    uses: list[Use] = []

    @jax.custom_vjp
    def call(values: list[Value]) -> list[Array]:
        with interp.recorder.collect(uses):
            return interp.dense_outputs(interp.run(eqn.params["call_jaxpr"], values))

    def forward(values: list[Value]) -> Any:
        def with_pullback(*dense: Array) -> tuple[list[Array], list[Array]]:
            # The pullback is a pytree: its arrays leave the trace as outputs, its structure by `nonlocal`. `backward`
            # puts the two together, in another trace.
            nonlocal pullback
            consts, arguments = dense[:num_consts], dense[num_consts:]
            outputs, back = jax.vjp(lambda *x: bind(eqn, [*consts, *x]), *arguments)
            residuals, pullback = jax.tree.flatten(back)
            return outputs, residuals

        traced = jax.make_jaxpr(with_pullback)(*(jax.typeof(_frozen_part(v)) for v in values))
        results = interp.run(traced, values)
        return interp.dense_outputs(results[:count]), (values, results[count:])

    def backward(saved: tuple[list[Value], list[Value]], cotangents: Sequence[Array]) -> tuple[list[Any]]:
        values, residuals = saved

        def pull(residuals: list[Array], cotangents: Sequence[Array]) -> list[Array]:
            grads = jax.tree.unflatten(pullback, residuals)(list(cotangents))
            return [grads[i - num_consts] for i in floats]

        shapes = [jax.typeof(_frozen_part(r)) for r in residuals], [jax.typeof(c) for c in cotangents]
        traced = jax.make_jaxpr(pull)(*shapes)
        grads = interp.dense_outputs(interp.run(traced, [*residuals, *cotangents]))
        # To JAX, None is a cotangent of zeros, of whatever structure the value has.
        cotangents_in: list[Any] = [None] * len(values)
        for i, grad in zip(floats, grads, strict=True):
            cotangents_in[i] = _pull_back(values[i], grad)
        return (cotangents_in,)

    call.defvjp(forward, backward)
    outputs = list(call(list(operands)))
    interp.recorder.replay(uses)
    return outputs


def _custom_vjp_of_codes(interp: Interpreter, eqn: Eqn, operands: list[Value]) -> list[Value]:
    """A function with a derivative of its own that makes adapted weights of codes (the layers of Keras).

    It has no derivative in the codes, so that in the factors is the one of the function itself; for the other operands
    it is the user's.
    """
    if _has_dropout(operands):
        path = next(v.path for v in operands if isinstance(v, LowRank) and v.dropout is not None)
        raise ValueError(
            f"{path}: dropout on the input of its update, where the net dequantizes the weight in a function with its "
            "own derivative: the derivative would see another mask. Set dropout=0 for this weight."
        )
    num_consts = eqn.params.get("num_consts", 0)
    floats = [i for i, v in enumerate(operands) if i >= num_consts and not isinstance(v, LowRank) and _is_float_type(v)]
    pullback: Any = None
    uses: list[Use] = []

    # Traced in any case, so that no activation is taken for a constant of the program.
    @jax.jit
    def run(values: list[Value], factors: list[list[Array]]) -> list[Array]:
        outer, interp.straight_through = interp.straight_through, True
        try:
            with interp.recorder.collect(uses):
                return interp.dense_outputs(interp.run(eqn.params["call_jaxpr"], _with_factors(values, factors)))
        finally:
            interp.straight_through = outer

    call = jax.custom_vjp(run)

    def forward(values: list[Value], factors: list[list[Array]]) -> Any:
        def residuals_of(*dense: Array) -> list[Array]:
            nonlocal pullback  # as in `_custom_vjp`
            consts, arguments = dense[:num_consts], dense[num_consts:]
            _, back = jax.vjp(lambda *x: bind(eqn, [*consts, *x]), *arguments)
            residuals, pullback = jax.tree.flatten(back)
            return residuals

        # Without the function itself, whose outputs are computed below.
        traced = remove_dead_equations(jax.make_jaxpr(residuals_of)(*map(_type_of, values)))
        outputs, back = jax.vjp(lambda factors: run(values, factors), factors)
        return outputs, (interp.run(traced, _with_factors(values, factors)), back, values)

    def backward(saved: tuple[list[Value], Any, list[Value]], cotangents: Sequence[Array]) -> tuple[Any, Any]:
        residuals, back, values = saved

        def pull(residuals: list[Array], cotangents: Sequence[Array]) -> list[Array]:
            grads = jax.tree.unflatten(pullback, residuals)(list(cotangents))
            return [grads[i - num_consts] for i in floats]

        traced = jax.make_jaxpr(pull)([*map(_type_of, residuals)], [jax.typeof(c) for c in cotangents])
        cotangents_in: list[Any] = [None] * len(values)
        for i, grad in zip(floats, interp.dense_outputs(interp.run(traced, [*residuals, *cotangents])), strict=True):
            cotangents_in[i] = None if is_frozen(values[i]) else grad
        return cotangents_in, back(list(cotangents))[0]

    call.defvjp(forward, backward)
    factors = [[x.array for x in v.named_arrays] if isinstance(v, LowRank) else [] for v in operands]
    outputs = list(call(list(operands), factors))
    interp.recorder.replay(uses)
    return outputs


def _with_factors(values: Sequence[Value], factors: Sequence[Sequence[Array]]) -> list[Value]:
    """``values`` with other arrays beside the frozen parts."""

    def with_own(value: LowRank, arrays: Sequence[Array]) -> LowRank:
        pairs = zip(value.named_arrays, arrays, strict=True)
        return value.with_named_arrays([dataclasses.replace(x, array=array) for x, array in pairs])

    return [with_own(v, own) if isinstance(v, LowRank) else v for v, own in zip(values, factors, strict=True)]


def _type_of(value: Value) -> Any:
    return value.frozen.aval if isinstance(value, LowRank) else value.aval if is_frozen(value) else jax.typeof(value)


def _is_float_type(value: Value) -> bool:
    return jnp.issubdtype(_type_of(value).dtype, jnp.inexact)


def _pull_back(value: Value, cotangent: Array) -> Value:
    """The cotangents of ``w``, ``a`` and ``b`` for the cotangent of the dense value."""
    if not isinstance(value, LowRank):
        return cotangent
    return jax.vjp(lambda v: v.dense(), value)[1](cotangent)[0]
