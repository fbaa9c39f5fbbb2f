"""Along which axes of a mesh the operands and the results of a kernel differ, where a `shard_map` checks that."""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import ManualAxisType

from lojax.compat import varying_axes
from lojax.types import Array, Dtype, Shape


def result_like(shape: Shape, dtype: Dtype, *operands: Array) -> jax.ShapeDtypeStruct:
    """The type of a result: it differs along each axis along which an operand does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=_axes(operands)))


def vary_alike(*operands: Array) -> list[Array]:
    """The operands, each taken to differ along all axes along which one of them does.

    The derivative of that is a sum over the devices, which a hand-written derivative would have to make itself.
    """
    axes = _axes(operands)
    missing = [tuple(sorted(axes - set(varying_axes(x)))) for x in operands]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(operands, missing, strict=True)]


def _axes(operands: tuple[Array, ...]) -> frozenset[str]:
    return frozenset(axis for x in operands for axis in varying_axes(x))
