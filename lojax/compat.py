"""What differs between the JAX releases we support, and nothing else (0.10 to 0.12)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive, Var
from jax.interpreters import partial_eval


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """``(jaxpr, constants)`` of an open or a closed jaxpr. JAX 0.12 made the two one type."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def var_type(var: Any) -> Any:
    """The type of a variable or literal of a jaxpr: shape, dtype, sharding. `jax.typeof` takes values only."""
    return var.aval


def remove_dead_equations(closed: Any) -> Any:
    """``closed`` without the equations, inside bodies too, whose results nothing reads."""
    jaxpr, _ = opened(closed)
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return live if closed is jaxpr else closed.replace(jaxpr=live)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The number of constants and of carries of a ``scan`` equation. JAX 0.12 keeps them as trees."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


@functools.cache
def unspecified_sharding() -> Any:
    """What a ``jit`` equation holds for an operand whose sharding the user left open."""
    return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0].params["in_shardings"][0]


def varying_axes(x: Any) -> list[str]:
    """The mesh axes along which ``x`` differs, inside a `shard_map` that checks them; else none."""
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    return sorted(manual.varying) if manual is not None else sorted(getattr(jax.typeof(x), "vma", ()))


def result_types(f: Callable[..., Any], *types: Any) -> list[Any]:
    """The types of the results of ``f``, with their shardings, for operands of these types."""
    return list(jax.make_jaxpr(f)(*types).out_avals)


def device_count(context: Any) -> int:
    """The number of devices of the program that a lowering rule adds to, from the rule's context."""
    return getattr(context.module_context.axis_context, "num_devices", 1)


def save_as_if(
    primitive: Primitive, other: Callable[[Sequence[Any], dict[str, Any]], tuple[Any, Sequence[Any], dict[str, Any]]]
) -> None:
    """Makes policies of `jax.checkpoint` take a primitive for another one.

    Args:
        primitive: The primitive, with one result.
        other: From the types of its operands and its parameters: the primitive that a policy sees instead, and the same
            of it.
    """

    # As `jax.interpreters.partial_eval` treats primitives without a rule, but for the question to the policy.
    def rule(saveable: Any, unknown: Sequence[bool], instantiated: Sequence[bool], eqn: Any) -> Any:
        residuals = [v for v, ready in zip(eqn.invars, instantiated, strict=True) if not ready and isinstance(v, Var)]
        if any(unknown):
            return None, eqn, [True], [True], residuals
        asked, types, params = other([v.aval for v in eqn.invars], eqn.params)
        policy = saveable(asked, *types, **params)
        if policy is True or type(policy).__name__ == "SaveableType":
            return eqn, None, [False], [False], []
        return eqn, eqn, [False], [True], residuals

    partial_eval.partial_eval_jaxpr_custom_rules[primitive] = rule
