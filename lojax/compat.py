"""What differs between the JAX releases we support, and nothing else (0.10 to 0.12)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
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
