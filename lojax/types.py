"""The names that annotations use: what an argument is, where Python's type system can only say ``Any``."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
from jax.extend import core
from jax.typing import ArrayLike, DTypeLike

Array: TypeAlias = jax.Array
"""A JAX array or tracer."""
Key: TypeAlias = jax.Array
"""A PRNG key (`jax.random.key`), consumed by whoever takes it."""
Shape: TypeAlias = tuple[int, ...]
"""The lengths of the axes of an array."""
Dtype: TypeAlias = DTypeLike
"""Whatever `jax.numpy.dtype` takes."""

PyTree: TypeAlias = Any
"""A tree that JAX can flatten."""
Params: TypeAlias = Any
"""A tree of parameters: `params`, or `frozen` or `lora`, which have its structure."""
Leaf: TypeAlias = Any
"""A leaf of a parameter tree: an array, a Flax box around one, an adapter, or None."""
Path: TypeAlias = str
"""Where a leaf is in its tree: ``params/encoder/layer_0/query/kernel``."""

Jaxpr: TypeAlias = core.Jaxpr | core.ClosedJaxpr
"""A program, open or closed. JAX 0.12 made the two one type."""
Eqn: TypeAlias = core.JaxprEqn
"""An equation of a program: a primitive, its operands, its parameters and its results."""
Ref: TypeAlias = jax.Ref
"""Memory that a kernel reads or writes, as Pallas hands it over."""
Var: TypeAlias = core.Var | core.Literal
"""A variable of a program, or a literal in its place."""

__all__ = [
    "Array",
    "ArrayLike",
    "Dtype",
    "Eqn",
    "Jaxpr",
    "Key",
    "Leaf",
    "Params",
    "Path",
    "PyTree",
    "Ref",
    "Shape",
    "Var",
]
