"""Activations as the factors meet them: separate from the same activations as the frozen weights meet them.

Where several adapted weights meet one activation (q, k and v; gate and up), its cotangent is a sum of frozen terms
and of terms of the updates, in the order of the program. Summed in that order, every frozen term is a reduction of
its own on a mesh whose tensor axis shards the weights: three of the size of the activation for q, k and v, where the
net without adapters has one. Kept separate, the terms of the updates are summed by themselves and join last; the
frozen ones are adjacent, and one reduction carries their sum.

An activation that a sharding constraint moves (gathers, mostly) meets the factors as it was sharded before. What is
then gathered for the update has the size of the rank, and no device repeats the work of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Literal
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from lojax.types import Array, Eqn, Var


@dataclasses.dataclass(frozen=True)
class Activations:
    """The activations of one run of a program, by variable.

    Attributes:
        readers: What reads a variable.
        unconstrained: Of a variable that a sharding constraint made, the value before and the sharding.
        inputs: What the factors met so far.
    """

    readers: Mapping[Any, Sequence[Eqn | None]]
    unconstrained: dict[Any, tuple[Array, Sharding]] = dataclasses.field(default_factory=dict)
    inputs: dict[Any, Array] = dataclasses.field(default_factory=dict)

    def record_constraint(self, eqn: Eqn, operand: Array) -> None:
        """Notes a sharding constraint on ``operand``."""
        before = self.unconstrained.get(eqn.invars[0], (operand, eqn.params["sharding"]))
        self.unconstrained[eqn.outvars[0]] = before

    def get(self, var: Var, x: Array) -> Array:
        """``x``, the value of ``var``, for the factors: the same array for all of them."""
        if isinstance(var, Literal):
            return x
        if var not in self.inputs:
            if var in self.unconstrained:
                self.inputs[var] = separate_cotangents(release_constraint(*self.unconstrained[var]))
            else:  # what one equation reads has one cotangent: there is nothing to sum
                self.inputs[var] = separate_cotangents(x) if len(self.readers[var]) > 1 else x
        return self.inputs[var]

    def drop(self, var: Any) -> None:
        """Forgets a variable that nothing reads any more."""
        self.unconstrained.pop(var, None)
        self.inputs.pop(var, None)


def release_constraint(x: Array, sharding: Sharding) -> Array:
    """``x``, which a constraint to ``sharding`` takes, free to be sharded in another way than that constraint says.

    The partitioner shards what a constraint takes as the constraint wants it (Shardy's apply-sharding-constraints),
    and the factors would meet it gathered after all. It does not where a second constraint takes the same value: one
    that leaves every axis open asks for nothing.
    """
    if not isinstance(x, Tracer) or not isinstance(sharding, NamedSharding):
        return x
    if any(kind != AxisType.Auto for kind in sharding.mesh.axis_types):
        return x
    anywhere = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * x.ndim)
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, anywhere))


def separate_cotangents(x: Array) -> Array:
    """``x``, whose cotangents are summed before they join those of other uses of ``x``."""
    traced = isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
    return _identity(x) if traced else x


@jax.custom_jvp
def _identity(x: Array) -> Array:
    return x


@_identity.defjvp
def _identity_tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The primal is x itself, so that nothing is kept twice. A copy is an equation, which has cotangents of its own.
    return primals[0], jnp.copy(tangents[0])
