"""A low-rank layer of the kernels, with its derivatives: ``y = x w + scale (x a) b``, ``w`` frozen."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lojax.kernels.pieces import Lowering, cotangents, down_cotangent, forward, gradients
from lojax.kernels.result import vary_alike
from lojax.types import Array


def layer(
    x: Array,
    w: Array,
    a: Array,
    b: Array,
    scale: float = 1.0,
    *,
    lowering: Lowering = "device",
    interpret: bool = False,
) -> Array:
    """``x w + scale (x a) b``, differentiable in x, a and b.

    Args:
        x: ``[T, m]``.
        w: ``[m, n]``, in the dtype of ``x``. Its gradient is zero.
        a: ``[m, r]``, of any floating dtype.
        b: ``[r, n]``, of any floating dtype.
        scale: The scale of the update.
        lowering: Whose kernels compute it, see `pieces`.
        interpret: Whether to run the kernels operation by operation, on any device.

    Returns:
        ``[T, n]`` in the dtype of ``x``.
    """
    # The scale goes on b before any rounding to the dtype of x; its derivative is the chain rule's own.
    scaled = b.astype(jnp.promote_types(b.dtype, jnp.float32)) * scale
    return _layer(*vary_alike(x, w, a, scaled), lowering, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _layer(x: Array, w: Array, a: Array, b: Array, lowering: Lowering, interpret: bool) -> Array:
    return forward(x, w, a, b, lowering=lowering, interpret=interpret)[0]


def _forward(x, w, a, b, lowering: Lowering, interpret: bool):
    y, h = forward(x.value, w.value, a.value, b.value, lowering=lowering, interpret=interpret)
    # The one kernel that computes all three gradients would compute dx for nothing where x is data: w, which only dx
    # needs, is saved to say that it is needed.
    return y, (x.value, w.value if x.perturbed else None, a.value, b.value, h)


def _backward(lowering: Lowering, interpret: bool, saved: tuple, g: Array | SymbolicZero):
    x, w, a, b, h = saved
    # Where nothing depends on the result.
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    if w is None:
        u, db = cotangents(g, h, b, lowering=lowering, interpret=interpret)
        return None, None, down_cotangent(x, u, a), db
    dx, da, db = gradients(g, x, w, h, a, b, lowering=lowering, interpret=interpret)
    return dx, None, da, db


_layer.defvjp(_forward, _backward, symbolic_zeros=True)
