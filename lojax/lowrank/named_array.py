"""Arrays whose axes have names, and the product of two of them.

Names stand where other code has shapes by position. With T tokens, m in, n out, r rank, and S a stack, the product of
an activation with an update is two calls of `multiply`:

    x [T, m] . a [m, r] -> [T, r]            [T, r] . b [r, n] -> [T, n]

and with a stack, ``[S, T, m] . [S, m, r] -> [S, T, r]``: S is in both operands and in the result, a batch axis.
An axis of a weight is named by its position in the weight, the rank axis `RANK`, the axes T by ``("x", i)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from lojax.types import Array, Dtype

RANK = "rank"
"""The name of the axis that the two factors of an update share."""

Name = Hashable
"""The name of an axis: its position in a weight, `RANK`, or a fresh one such as ``("x", 0)``."""
Precision: TypeAlias = Any
"""As in `jax.lax.dot_general`: None, a `jax.lax.Precision`, a dot algorithm, or a pair of them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """``array`` with one name for each axis."""

    array: Any  # an array; in the specs of a shard_map a PartitionSpec, in an abstract trace a ShapeDtypeStruct
    dims: tuple[Name, ...] = dataclasses.field(metadata={"static": True})

    def rename(self, names: Mapping[Any, Name]) -> NamedArray:
        """The same array with each axis ``d`` called ``names[d]``, where ``names`` has it."""
        return NamedArray(self.array, tuple(names.get(d, d) for d in self.dims))

    def axis(self, name: Name) -> int:
        """The position of the axis called ``name``."""
        return self.dims.index(name)

    def size(self, name: Name) -> int:
        """The length of the axis called ``name``."""
        return self.array.shape[self.axis(name)]

    def transpose_to(self, dims: Sequence[Name]) -> NamedArray:
        """The same array with its axes in the order ``dims``."""
        dims = tuple(dims)
        # A transpose to the same order would be an equation of the user's program that does nothing.
        if dims == self.dims:
            return self
        return NamedArray(lax.transpose(self.array, [self.axis(d) for d in dims]), dims)

    def squeeze(self, names: Sequence[Name]) -> NamedArray:
        """The array without the axes called ``names``, each of which has length one."""
        axes = [self.axis(d) for d in names]
        if not axes:
            return self
        return NamedArray(lax.squeeze(self.array, axes), tuple(d for d in self.dims if d not in names))

    def broadcastable(self, dims: Sequence[Name]) -> Array:
        """The array with an axis for each of ``dims``, in this order: of length one where it has none so named."""
        own = [d for d in dims if d in self.dims]
        return jnp.expand_dims(self.transpose_to(own).array, [i for i, d in enumerate(dims) if d not in self.dims])

    def broadcast_axis(self, name: Name, length: int) -> NamedArray:
        """The array with a new last axis of this name and length, along which the values repeat."""
        shape = (*self.array.shape, length)
        return NamedArray(lax.broadcast_in_dim(self.array, shape, range(self.array.ndim)), (*self.dims, name))


def axis_lengths(*arrays: NamedArray) -> dict[Name, int]:
    """The length of every named axis."""
    return {d: x.array.shape[i] for x in arrays for i, d in enumerate(x.dims)}


def multiply(
    x: NamedArray,
    y: NamedArray,
    out: Sequence[Name],
    *,
    precision: Precision = None,
    dtype: Dtype | None = None,
    like: ShapedArray | None = None,
) -> NamedArray:
    """The product of ``x`` and ``y`` summed over every shared axis that is not in ``out``.

    An einsum by name, as one `dot_general`: ``[S, T, m] . [S, m, n] -> [S, T, n]``, where S are the shared axes in
    ``out``, m those that are not, and T and n the axes of one operand. A transpose is added only where ``out`` asks for
    another order than S, T, n.

    Args:
        x: Any axes.
        y: Any axes; those with the name of an axis of ``x`` have the same length.
        out: The names of the result, in order. Axes of only one operand must be among them.
        precision: As in `jax.lax.dot_general`, for ``(x, y)``.
        dtype: The dtype in which the sums are accumulated and returned.
        like: The type of an array with axes ``out``, whose sharding the result takes on a mesh of explicit axes.
    """
    shared = [d for d in x.dims if d in y.dims]
    batch = [d for d in shared if d in out]
    summed = [d for d in shared if d not in out]
    free = [d for z in (x, y) for d in z.dims if d not in shared]
    result = lax.dot_general(
        x.array,
        y.array,
        (
            ([x.axis(d) for d in summed], [y.axis(d) for d in summed]),
            ([x.axis(d) for d in batch], [y.axis(d) for d in batch]),
        ),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=_explicit_sharding(x, y, (*batch, *free), out, like),
    )
    return NamedArray(result, (*batch, *free)).transpose_to(out)


def _explicit_sharding(
    x: NamedArray, y: NamedArray, dims: Sequence[Name], out: Sequence[Name], like: ShapedArray | None
) -> Sharding | None:
    """The sharding of a product on a mesh of explicit axes (each axis as in the operand that has it), else None."""
    shardings = [jax.typeof(z.array).sharding for z in (x, y)]
    mesh = next((s.mesh for s in shardings if not s.mesh.empty), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    entries: dict[Name, Any] = {}
    # JAX refuses to contract axes that are sharded over explicit mesh axes unless it is told the sharding of the
    # result. For an axis of both operands, the entry of x replaces that of y unless it is None, and that of ``like``
    # replaces any.
    for z, sharding in zip((y, x), shardings[::-1], strict=True):
        entries |= {d: e for d, e in zip(z.dims, sharding.spec, strict=True) if e is not None or d not in entries}
    if like is not None:
        entries |= dict(zip(out, like.sharding.spec, strict=True))
    used: set[str] = set()
    spec = []
    for d in dims:
        # A mesh axis may shard only one axis of an array: the first that names it.
        names = entries[d] if isinstance(entries[d], tuple) else (entries[d],)
        spec.append(None if used & {*names} else entries[d])
        used |= {n for n in names if n is not None}
    return NamedSharding(mesh, PartitionSpec(*spec))


def has_explicit_sharding(x: Array) -> bool:
    """Whether ``x`` is on a mesh some of whose axes are explicit: then its type says how it is sharded."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def on_manual_mesh(x: Array) -> bool:
    """Whether ``x`` is inside of a `shard_map`: the part of one device."""
    return AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types


def reshard_like(x: Array, y: Array) -> Array:
    """``x``, whose axes have the lengths of those of ``y`` or one, sharded like ``y`` on a mesh of explicit axes."""
    if not (has_explicit_sharding(x) or has_explicit_sharding(y)):
        return x
    own, wanted = jax.typeof(x).sharding, jax.typeof(y).sharding
    spec = PartitionSpec(*(None if n == 1 else entry for n, entry in zip(x.shape, wanted.spec, strict=True)))
    # An array that was made outside of any mesh is on none, and is replicated beside those that are on one.
    return jax.sharding.reshard(x, NamedSharding(own.mesh if wanted.mesh.empty else wanted.mesh, spec))


def multiply_flops(x: NamedArray, y: NamedArray) -> int:
    """The floating-point operations of `multiply`: two for each point of the joint index space."""
    return 2 * math.prod(axis_lengths(x, y).values())


def cast(x: NamedArray, dtype: Dtype) -> NamedArray:
    """``x`` in another dtype."""
    return x if x.array.dtype == jnp.dtype(dtype) else dataclasses.replace(x, array=x.array.astype(dtype))
