"""Arrays whose axes have names, and the product of two of them. Pure maths: no jaxprs here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

RANK = "rank"
"""The name of the axis that the two factors of an update share."""

Name = Hashable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """``array`` with one name per axis. Names are positions in a weight, `RANK`, or fresh ones."""

    array: Any
    dims: tuple[Name, ...] = dataclasses.field(metadata={"static": True})

    def renamed(self, names: dict[Name, Name]) -> Named:
        """The same array, its axes called ``names[old]``."""
        return Named(self.array, tuple(names.get(d, d) for d in self.dims))

    def axis(self, name: Name) -> int:
        """The position of the axis called ``name``."""
        return self.dims.index(name)

    def size(self, name: Name) -> int:
        """The length of the axis called ``name``."""
        return self.array.shape[self.axis(name)]

    def ordered(self, dims: Sequence[Name]) -> Named:
        """The same array with its axes in the order ``dims``."""
        dims = tuple(dims)
        if dims == self.dims:
            return self
        return Named(lax.transpose(self.array, [self.axis(d) for d in dims]), dims)

    def dropped(self, names: Sequence[Name]) -> Named:
        """Without the axes called ``names``, all of length one."""
        gone = [self.axis(d) for d in names]
        if not gone:
            return self
        return Named(lax.squeeze(self.array, gone), tuple(d for d in self.dims if d not in names))

    def spread(self, dims: Sequence[Name]) -> Any:
        """The array with its axes in the order ``dims``, of length one where it has none of that name."""
        known = [d for d in dims if d in self.dims]
        return jnp.expand_dims(self.ordered(known).array, [i for i, d in enumerate(dims) if d not in self.dims])

    def extended(self, name: Name, length: int) -> Named:
        """With a new last axis of this name and length, along which the values repeat."""
        shape = (*self.array.shape, length)
        return Named(lax.broadcast_in_dim(self.array, shape, range(self.array.ndim)), (*self.dims, name))


def sizes(*arrays: Named) -> dict[Name, int]:
    """The length of every named axis."""
    return {d: x.array.shape[i] for x in arrays for i, d in enumerate(x.dims)}


def multiply(
    x: Named, y: Named, out: Sequence[Name], *, precision: Any = None, dtype: Any = None, like: Any = None
) -> Named:
    """The product of ``x`` and ``y`` summed over every shared axis that is not in ``out``.

    An einsum by name, as one `dot_general`: a transpose is added only where ``out`` asks for an order
    that `dot_general` cannot give.

    Args:
        x: Any axes.
        y: Any axes; those called as in ``x`` have the same length.
        out: The names of the result, in order. Axes of only one operand must be among them.
        precision: As in `jax.lax.dot_general`, for ``(x, y)``.
        dtype: The dtype in which the sums are accumulated and returned.
        like: An array with axes ``out`` whose sharding the result takes on a mesh of explicit axes.
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
    return Named(result, (*batch, *free)).ordered(out)


def _explicit_sharding(x: Named, y: Named, dims: Sequence[Name], out: Sequence[Name], like: Any) -> Any:
    """On a mesh of explicit axes, the sharding of a product: each axis lies as in the operand that has it."""
    shardings = [jax.typeof(z.array).sharding for z in (x, y)]
    mesh = next((s.mesh for s in shardings if not s.mesh.empty), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    entries: dict[Name, Any] = {}
    for z, sharding in zip((y, x), shardings[::-1], strict=True):
        entries |= {d: e for d, e in zip(z.dims, sharding.spec, strict=True) if e is not None or d not in entries}
    if like is not None:
        entries |= dict(zip(out, jax.typeof(like).sharding.spec, strict=True))
    used: set[str] = set()
    spec = []
    for d in dims:
        names = entries[d] if isinstance(entries[d], tuple) else (entries[d],)
        spec.append(None if used & {*names} else entries[d])
        used |= {n for n in names if n is not None}
    return NamedSharding(mesh, PartitionSpec(*spec))


def on_explicit_axes(x: Any) -> bool:
    """Whether ``x`` lies on a mesh some of whose axes are explicit: then its type says how it lies."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def lying_as(x: Any, y: Any) -> Any:
    """``x``, whose axes are as long as those of ``y`` or one, lies as ``y`` does on a mesh of explicit axes."""
    if not on_explicit_axes(y):
        return x
    sharding = jax.typeof(y).sharding
    spec = PartitionSpec(*(None if n == 1 else entry for n, entry in zip(x.shape, sharding.spec, strict=True)))
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def multiply_flops(x: Named, y: Named) -> int:
    """The floating-point operations of `multiply`: two for each point of the joint index space."""
    return 2 * math.prod(sizes(x, y).values())


def cast(x: Named, dtype: Any) -> Named:
    """``x`` in another dtype."""
    return x if x.array.dtype == jnp.dtype(dtype) else dataclasses.replace(x, array=x.array.astype(dtype))
