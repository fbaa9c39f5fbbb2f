"""Activations for the products with factors: other values than the same activations for the frozen products.

If several adapted weights multiply one activation (q, k and v; gate and up), its cotangent is a sum of terms of frozen
products and terms of updates, in the order of the program. Summed in that order, on a mesh whose tensor axis shards
the weights, every frozen term is reduced separately: three reductions of the size of the activation for q, k and v,
where the net without adapters has one. With a separate value for the factors, the terms of the updates are summed by
themselves and added last; the frozen ones are adjacent, and one reduction suffices for their sum.

An activation that a sharding constraint moves (mostly, gathers) is multiplied with the factors as it was sharded
before. What is then gathered for the update has the size of the rank, and no device repeats the work of another.
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
        readers: The equations that read each variable; the end of the program is a reader, None.
        unconstrained: For each result of a sharding constraint, the operand of the constraint and its sharding.
        inputs: The values for the factors so far.
    """

    readers: Mapping[Any, Sequence[Eqn | None]]
    unconstrained: dict[Any, tuple[Array, Sharding]] = dataclasses.field(default_factory=dict)
    inputs: dict[Any, Array] = dataclasses.field(default_factory=dict)

    def record_constraint(self, eqn: Eqn, operand: Array) -> None:
        """Records a sharding constraint on ``operand``."""
        # In a chain of constraints, the value before the first one.
        before = self.unconstrained.get(eqn.invars[0], (operand, eqn.params["sharding"]))
        self.unconstrained[eqn.outvars[0]] = before

    def get(self, var: Var, x: Array) -> Array:
        """``x``, the value of ``var``, for the factors: the same array for all of them."""
        if isinstance(var, Literal):  # a constant has no cotangent
            return x
        if var not in self.inputs:
            if var in self.unconstrained:
                self.inputs[var] = separate_cotangents(release_constraint(*self.unconstrained[var]))
            else:  # an activation with one reader has one cotangent: there is nothing to sum
                self.inputs[var] = separate_cotangents(x) if len(self.readers[var]) > 1 else x
        return self.inputs[var]

    def get_released(self, var: Var) -> Array | None:
        """The value of ``var`` for the factors if a constraint moved it, else None."""
        return self.get(var, self.unconstrained[var][0]) if var in self.unconstrained else None

    def drop(self, var: Any) -> None:
        """Forgets a variable that no later equation reads."""
        self.unconstrained.pop(var, None)
        self.inputs.pop(var, None)


def release_constraint(x: Array, sharding: Sharding) -> Array:
    """``x``, the operand of a constraint to ``sharding``, which the partitioner may then shard differently.

    The partitioner gives the operand of a constraint the sharding of its result (Shardy's apply-sharding-constraints),
    so the products with factors would get it gathered after all. It does not do so if a second constraint has the same
    operand. The one here leaves every axis open, so it asks for nothing.
    """
    if not isinstance(x, Tracer) or not isinstance(sharding, NamedSharding):
        return x
    # On explicit axes, the sharding is part of the type of x and nothing is left to the partitioner.
    if any(kind != AxisType.Auto for kind in sharding.mesh.axis_types):
        return x
    anywhere = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * x.ndim)
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, anywhere))


def separate_cotangents(x: Array) -> Array:
    """A copy of ``x`` whose cotangents are summed by themselves, and then added to those of other uses of ``x``."""
    # Outside of a trace nothing is differentiated or partitioned, and integers have no cotangents.
    traced = isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
    return _identity(x) if traced else x


@jax.custom_jvp
def _identity(x: Array) -> Array:
    return x


@_identity.defjvp
def _identity_tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The primal is x itself, so that it is not saved twice. The tangent needs an equation, here a copy: without one,
    # JAX adds all cotangents to those of x, one by one. The transpose of the copy passes their sum on.
    return primals[0], jnp.copy(tangents[0])
