"""The products of a low-rank layer and of its derivatives, each by kernels of the device that it is compiled for.

Letters: T tokens, m in axes, n out axes, r rank; ``b`` holds the scale of the update already. The layer is
``y = x w + (x a) b``, its cotangent g, ``h = x a`` and ``u = g bᵀ``. What each piece serves, and which large arrays its
kernels read:

| piece | computes | on a GPU | on a TPU |
|---|---|---|---|
| `forward` | h and ``y = x w + h b`` | x, then x and w | x, w |
| `gradients` | ``dx = g wᵀ + u aᵀ``, ``dA = xᵀ u``, ``dB = hᵀ g`` | g, then g (twice), w, x | g, w, then x |
| `cotangents` | u and dB, where dx is not asked for | g | g |
| `down_cotangent` | dA, where dx is not asked for | x | x |
| `down` | h alone, of factors side by side that share x | x | x |
| `product_with_update` | y from h; transposed, dx from u | x and w; g and w | x and w; g and w |

`layer` puts them together. On a GPU the kernels are lowered by Triton and on a TPU by Mosaic; elsewhere plain XLA
computes the same. Which of them is decided when a program is lowered, so one traced program serves every device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from lojax.kernels import (
    mosaic_cotangents,
    mosaic_product,
    triton_backward,
    triton_cotangents,
    triton_product,
    triton_thin,
)
from lojax.types import Array

Lowering = Literal["device", "triton", "mosaic", "plain"]
"""Whose kernels compute: those of the device that the program is lowered for, those of one compiler, or XLA alone."""


def down(x: Array, a: Array, *, lowering: Lowering = "device", interpret: bool = False) -> Array:
    """``h = x a``, in one reading of ``x``.

    Args:
        x: ``[T, m]``.
        a: ``[m, r]``, of any floating dtype; it is cast to that of ``x``.
        lowering: Whose kernel computes it.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``[T, r]`` in the dtype of ``x``, summed in float32.
    """
    return _lowered(lowering, interpret, _plain_down, triton_thin.thin_product, None, x, a)


def forward(
    x: Array, w: Array, a: Array, b: Array, *, lowering: Lowering = "device", interpret: bool = False
) -> tuple[Array, Array]:
    """``(y, h)``: ``y = x w + h b`` and ``h = x a``, which the derivatives need.

    Args:
        x: ``[T, m]``.
        w: ``[m, n]``, in the dtype of ``x``.
        a: ``[m, r]``, of any floating dtype; it is cast to that of ``x``.
        b: ``[r, n]``, of any floating dtype; it is cast to that of ``x``.
        lowering: Whose kernels compute it.
        interpret: Whether to run the kernels operation by operation, on any device.

    Returns:
        ``[T, n]`` and ``[T, r]`` in the dtype of ``x``, summed in float32.
    """
    return _lowered(lowering, interpret, _plain_forward, _triton_forward, mosaic_product.forward, x, w, a, b)


def product_with_update(
    x: Array,
    w: Array,
    h: Array,
    b: Array,
    *,
    transposed: bool = False,
    lowering: Lowering = "device",
    interpret: bool = False,
) -> Array:
    """``x w + h b``, or ``x wᵀ + h bᵀ`` of ``w`` and ``b`` as they are stored, in one pass over ``x`` and ``w``.

    Args:
        x: ``[T, m]``; ``[T, n]`` if transposed.
        w: ``[m, n]``, in the dtype of ``x``.
        h: ``[T, r]``, in the dtype of ``x``.
        b: ``[r, n]``; ``[m, r]`` if transposed. Of any floating dtype; it is cast to that of ``x``.
        transposed: Whether to contract the last axes of ``w`` and ``b``.
        lowering: Whose kernel computes it.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``[T, n]``, or ``[T, m]``, in the dtype of ``x``, summed in float32.
    """
    plain, triton, mosaic = (
        functools.partial(form, transposed=transposed)
        for form in (_plain_product, triton_product.product_with_update, mosaic_product.product_with_update)
    )
    return _lowered(lowering, interpret, plain, triton, mosaic, x, w, h, b)


def gradients(
    g: Array,
    x: Array,
    w: Array,
    h: Array,
    a: Array,
    b: Array,
    *,
    lowering: Lowering = "device",
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """``(dx, dA, dB)``, the cotangents of ``x``, ``a`` and ``b``.

    Args:
        g: ``[T, n]``, the cotangent of the result.
        x: ``[T, m]``, in the dtype of ``g``.
        w: ``[m, n]``, in the dtype of ``g``.
        h: ``[T, r]``, ``x a`` in the dtype of ``g``.
        a: ``[m, r]``, of any floating dtype.
        b: ``[r, n]``, of any floating dtype.
        lowering: Whose kernels compute it.
        interpret: Whether to run the kernels operation by operation, on any device.

    Returns:
        ``[T, m]`` in the dtype of ``g``, ``[m, r]`` in that of ``a`` and ``[r, n]`` in that of ``b``, each summed in
        float32.
    """
    return _lowered(lowering, interpret, _plain_gradients, _triton_gradients, _mosaic_gradients, g, x, w, h, a, b)


def cotangents(
    g: Array, h: Array, b: Array, *, lowering: Lowering = "device", interpret: bool = False
) -> tuple[Array, Array]:
    """``(u, dB)``, the cotangents of ``h`` and ``b`` in ``h b``, from one reading of ``g``, their own.

    Args:
        g: ``[T, n]``.
        h: ``[T, r]``, in the dtype of ``g``.
        b: ``[r, n]``, of any floating dtype; it is cast to that of ``g``.
        lowering: Whose kernel computes it.
        interpret: Whether to run the kernel operation by operation, on any device.

    Returns:
        ``g bᵀ`` ``[T, r]`` in the dtype of ``g``, and ``hᵀ g`` ``[r, n]`` in that of ``b``, summed in float32.
    """
    triton, mosaic = triton_cotangents.cotangents, mosaic_cotangents.cotangents
    return _lowered(lowering, interpret, _plain_cotangents, triton, mosaic, g, h, b)


def down_cotangent(x: Array, u: Array, a: Array) -> Array:
    """``dA = xᵀ u`` ``[m, r]`` in the dtype of ``a``, of ``x`` ``[T, m]`` and ``u`` ``[T, r]``: one product of XLA."""
    return _dot(x, u, 0, 0).astype(a.dtype)


def _triton_forward(x: Array, w: Array, a: Array, b: Array, interpret: bool) -> tuple[Array, Array]:
    h = triton_thin.thin_product(x, a, interpret=interpret)
    return triton_product.product_with_update(x, w, h, b, interpret=interpret), h


def _triton_gradients(
    g: Array, x: Array, w: Array, h: Array, a: Array, b: Array, interpret: bool
) -> tuple[Array, Array, Array]:
    # A reading of g of its own: dx needs all of u from the start.
    u = triton_thin.thin_product(g, b, transposed=True, interpret=interpret)
    dx, da, db = triton_backward.gradients(g, x, w, h, u, a, interpret=interpret)
    return dx, da.astype(a.dtype), db.astype(b.dtype)


def _mosaic_gradients(
    g: Array, x: Array, w: Array, h: Array, a: Array, b: Array, interpret: bool
) -> tuple[Array, Array, Array]:
    dx, u, db = mosaic_product.backward(g, w, h, a, b, interpret=interpret)
    return dx, down_cotangent(x, u, a), db.astype(b.dtype)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two matrices, summed in float32 along one axis of each."""
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _plain_down(x: Array, a: Array) -> Array:
    return _dot(x, a.astype(x.dtype), 1, 0).astype(x.dtype)


def _plain_forward(x: Array, w: Array, a: Array, b: Array) -> tuple[Array, Array]:
    h = _plain_down(x, a)
    return _plain_product(x, w, h, b, transposed=False), h


def _plain_product(x: Array, w: Array, h: Array, b: Array, transposed: bool) -> Array:
    axis = 1 if transposed else 0
    return (_dot(x, w, 1, axis) + _dot(h, b.astype(x.dtype), 1, axis)).astype(x.dtype)


def _plain_gradients(g: Array, x: Array, w: Array, h: Array, a: Array, b: Array) -> tuple[Array, Array, Array]:
    u, db = _plain_cotangents(g, h, b)
    return _plain_product(g, w, u, a, transposed=True), down_cotangent(x, u, a), db


def _plain_cotangents(g: Array, h: Array, b: Array) -> tuple[Array, Array]:
    return _dot(g, b.astype(g.dtype), 1, 1).astype(g.dtype), _dot(h, g, 0, 0).astype(b.dtype)


def _lowered(
    lowering: Lowering, interpret: bool, plain: Callable, triton: Callable, mosaic: Callable | None, *operands: Array
) -> Any:
    """What one form makes of the operands: the one asked for, or that of the device."""
    triton = functools.partial(triton, interpret=interpret)
    mosaic = plain if mosaic is None else functools.partial(mosaic, interpret=interpret)
    if lowering == "device":
        return lax.platform_dependent(*operands, cuda=triton, tpu=mosaic, default=plain)
    return {"plain": plain, "triton": triton, "mosaic": mosaic}[lowering](*operands)
