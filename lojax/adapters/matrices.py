"""A weight as the matrices that it stands for: ``[S, m, n]``, one for each entry of its stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.axes import Axes, positions, size


def at_least_float32(dtype: Any) -> Any:
    """``dtype``, or float32 where that is wider; unlike `jnp.promote_types`, also under strict promotion."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def as_matrices(w: Any, axes: Axes) -> jax.Array:
    """The weight ``w`` as ``[S, m, n]``, in float32 or wider."""
    order = _order(axes)
    shape = (-1, size(axes, w.shape, "in"), size(axes, w.shape, "out"))
    return jnp.transpose(w, order).reshape(shape).astype(at_least_float32(w.dtype))


def from_matrices(matrices: jax.Array, axes: Axes, shape: Sequence[int], dtype: Any) -> jax.Array:
    """The reverse of `as_matrices`: ``[S, m, n]`` as a weight of this shape and dtype."""
    order = _order(axes)
    back = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(matrices.reshape([shape[i] for i in order]), back).astype(dtype)


def column_squares(w: Any, axes: Axes) -> jax.Array:
    """The squared length of each column of a weight: its in axes summed away, ``[*stack, *out]``, float32 or wider."""
    squares = jnp.sum(jnp.square(w.astype(at_least_float32(w.dtype))), axis=positions(axes, "in"))
    kept = [i for i, role in enumerate(axes) if role != "in"]
    return jnp.transpose(squares, [kept.index(i) for i in _order(axes) if i in kept])


def _order(axes: Axes) -> list[int]:
    return [i for role in ("stack", "in", "out") for i in positions(axes, role)]  # type: ignore[arg-type]
