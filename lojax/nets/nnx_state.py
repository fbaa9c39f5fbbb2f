"""The variables of an NNX module that are not parameters: which of them belong to the net, and which to a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from lojax.adapters.paths import flatten
from lojax.compat import opened, remove_dead_equations
from lojax.types import Array, Path, PyTree

Filter: TypeAlias = Any
"""What NNX takes to pick variables: a type of variable, a predicate, a tag, several of them, or True for all."""

OF_A_CALL = (nnx.RngState, nnx.Cache, nnx.Intermediate)
"""The types of variables that belong to a call: rng streams, caches, and what a call sows."""

LINEN_COLLECTIONS = {"batch_stats": "BatchStat", "cache": "Cache", "intermediates": "Intermediate"}
"""The NNX type of the variables that Linen's ``mutable=`` picks by the name of a collection."""


def outlives_call(_: tuple[Any, ...], variable: nnx.Variable[Any]) -> bool:
    """Whether a variable is part of the net, so that its value travels with the parameters. An NNX filter."""
    arrays = jax.tree.leaves(variable.get_value())
    return bool(arrays) and not isinstance(variable, OF_A_CALL) and all(map(_is_plain_array, arrays))


def _is_plain_array(x: Any) -> bool:
    return hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def state_of(module: nnx.Module, which: Filter = True) -> nnx.State:
    """The variables of ``module`` that a filter picks, parameters apart."""
    return nnx.state(module, nnx.All(nnx.Not(nnx.Param), ... if which is True else which))


def select(module: nnx.Module, which: Filter, title: str) -> PyTree:
    """The values of the same variables, as a plain nested dict.

    Raises:
        ValueError: A tag that no variable has, or a type that no variable apart from parameters can have. A type of
            variable that the module happens not to hold is fine, and picks nothing.
    """
    for part in which if isinstance(which, (list, tuple)) else (which,):
        possible = isinstance(part, type) and issubclass(part, nnx.Variable) and not issubclass(part, nnx.Param)
        if isinstance(part, (str, type)) and not possible and not state_of(module, part):
            raise ValueError(_nothing(module, part, title))
    return nnx.to_pure_dict(state_of(module, which))


def _nothing(module: nnx.Module, part: str | type, title: str) -> str:
    variables = nnx.to_flat_state(state_of(module))
    listed = [f"{'/'.join(map(str, path))} ({type(variable).__name__})" for path, variable in variables]
    if isinstance(part, type):
        part_name, why = f"nnx.{part.__name__}", "picks no variable apart from the parameters"
    else:
        part_name, why = repr(part), "is the tag of no variable"
    hint = f" For Linen's {part!r} pass nnx.{LINEN_COLLECTIONS[part]}." if part in LINEN_COLLECTIONS else ""
    return (
        f"mutable={part_name} {why} of {title}.{hint} Pass True, or NNX types of what it holds: "
        f"{', '.join(listed[:6]) or 'nothing'}{', …' if len(listed) > 6 else ''}."
    )


def changed_counts(before: Mapping[Path, Array], module: nnx.Module) -> dict[Path, Array]:
    """The counts that rng streams of ``module`` had ``before`` a call, for the streams whose count is another one now.

    Some of them may have drawn nothing: NNX transforms (`nnx.jit`, `nnx.remat`) replace what they do not change.
    """
    after = flatten(nnx.to_pure_dict(nnx.state(module, nnx.RngCount)))
    return {path: before[path] for path in after if path in before and after[path] is not before[path]}


def changed_statistics(before: Mapping[Path, Array], module: nnx.Module, *, new: bool = False) -> dict[Path, Array]:
    """The batch statistics that ``module`` had ``before`` a call, or has now, of those that are others now.

    As with `changed_counts`, some may be equal to what they were.
    """
    after = flatten(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
    changed = [path for path in after if path in before and after[path] is not before[path]]
    return {path: (after if new else before)[path] for path in changed}


def depends_on_inputs(f: Callable[[Mapping[Path, Array]], PyTree], state: Mapping[Path, Array]) -> bool:
    """Whether ``f(state)`` depends on anything but ``state``: what only passes through NNX transforms does not."""
    jaxpr = jax.make_jaxpr(f)(state)
    live, _ = opened(remove_dead_equations(jaxpr))
    from_state = {id(var) for var in live.invars} | {id(var) for eqn in live.eqns for var in eqn.outvars}
    operands = [operand for eqn in live.eqns for operand in eqn.invars] + list(live.outvars)
    return any(id(operand) not in from_state for operand in operands)  # a constant: a weight, an input, a number


def depends_on(f: Callable[[Mapping[Path, Array]], PyTree], counts: Mapping[Path, Array]) -> list[Path]:
    """The ``counts`` on which the arrays in ``f(counts)`` depend, as the traced program shows."""
    jaxpr = jax.make_jaxpr(lambda counts: [x for x in jax.tree.leaves(f(counts)) if hasattr(x, "dtype")])(counts)
    live, _ = opened(remove_dead_equations(jaxpr))
    used = {id(operand) for eqn in live.eqns for operand in eqn.invars} | {id(output) for output in live.outvars}
    # The order in which JAX flattens a dict is that of its sorted keys.
    return [path for path, var in zip(sorted(counts), live.invars, strict=True) if id(var) in used]


def drops(title: str, path: Path) -> str:
    """The warning that a call computes new batch statistics for nothing."""
    return (
        f"{title} computed new batch statistics, such as {path}, and this call drops them: those in the tree stay as "
        "they are, and a net in eval mode uses them. Pass mutable=nnx.BatchStat (or True), and the state that comes "
        "back as state= of the next call and of bind; or wrap the module after module.eval(), if the statistics are to "
        "stay."
    )


def repeats(title: str, path: Path) -> str:
    """The warning that every call will draw the same random numbers."""
    stream = path.removesuffix("/count")
    return (
        f"{title} drew random numbers from its own rng stream {stream}, and this call keeps no account of them: the "
        "next one draws the same numbers, such as the same dropout mask. Pass mutable=nnx.RngCount (or True), and the "
        "state that comes back as state= of the next call; or draw from rngs=nnx.Rngs(...) with a new key for each "
        "call; or wrap the module after module.eval(), if there is to be no dropout."
    )
