"""Activations as the factors meet them: apart from the same activations as the frozen weights meet them.

Where several adapted weights meet one activation (q, k and v; gate and up), its cotangent is a sum of frozen terms
and of terms of the updates, in the order of the program. Summed in that order, every frozen term is a reduction of
its own on a mesh whose tensor axis cuts the weights: three of the size of the activation for q, k and v, where the
net without adapters has one. Kept apart, the terms of the updates are summed by themselves and join last; the
frozen ones lie side by side, and one reduction carries their sum.

An activation that a sharding constraint moves (gathers, mostly) meets the factors as it lay before. What is then
gathered for the update has the size of the rank, and no chip does the work of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Literal
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Apart:
    """The activations of one run of a program, by variable.

    Attributes:
        readers: What reads a variable.
        before: Of a variable that a sharding constraint made, the value before and the sharding.
        met: What the factors met so far.
    """

    readers: Mapping[Any, Sequence[Any]]
    before: dict[Any, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    met: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def placed(self, eqn: Any, operand: Any) -> None:
        """Notes a sharding constraint on ``operand``."""
        self.before[eqn.outvars[0]] = self.before.get(eqn.invars[0], (operand, eqn.params["sharding"]))

    def of(self, var: Any, x: Any) -> Any:
        """``x``, the value of ``var``, for the factors: the same one for all of them."""
        if isinstance(var, Literal):
            return x
        if var not in self.met:
            if var in self.before:
                self.met[var] = apart(free(*self.before[var]))
            else:  # what one equation reads has one cotangent: there is nothing to sum
                self.met[var] = apart(x) if len(self.readers[var]) > 1 else x
        return self.met[var]

    def drop(self, var: Any) -> None:
        """Forgets a variable that nothing reads any more."""
        self.before.pop(var, None)
        self.met.pop(var, None)


def free(x: Any, sharding: Any) -> Any:
    """``x``, of which a constraint to lie as ``sharding`` says is taken, where it need not lie so itself.

    The partitioner lays what a constraint takes as the constraint wants it (Shardy's apply-sharding-constraints),
    and the factors would meet it gathered after all. It does not where another constraint takes the same value: one
    that leaves every axis open says nothing else.
    """
    traced = isinstance(x, Tracer) and isinstance(sharding, NamedSharding)
    if not traced or any(kind != AxisType.Auto for kind in sharding.mesh.axis_types):
        return x
    anywhere = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * x.ndim)
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, anywhere))


def apart(x: Any) -> Any:
    """``x``, whose cotangents are summed before they join those of other uses of ``x``."""
    traced = isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
    return _same(x) if traced else x


@jax.custom_jvp
def _same(x: Any) -> Any:
    return x


@_same.defjvp
def _same_tangent(primals: Any, tangents: Any) -> Any:
    # The primal is x itself, so that nothing is kept twice; a copy is an equation, which has cotangents of its own.
    return primals[0], jnp.copy(tangents[0])
