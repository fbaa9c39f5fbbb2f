"""The product with a factor that moves: its gradient takes a CPU no turning over of an activation.

The gradient of a factor sums over all tokens, ``x^T g``. JAX writes it as ``g^T x``, turned, and XLA:CPU then turns
over whichever operand stands first, or, where it makes one product of both, multiplies ``x^T`` by a narrow ``g``.
Either takes a third of the time of ``x W``. So this product is a primitive of its own, whose transpose says what is
wanted, and whose lowering for a CPU puts the smaller operand first and turns the result. Elsewhere it is
`named.multiply` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lojax.lowrank.named_array import Name, Named, multiply, sizes

TOKENS = 4
"""A gradient is worth turning where the larger operand is so many times as large."""

moving_p = Primitive("moving_product")
"""``multiply(x, y, out)``, with the names of all axes as parameters; ``gradient`` where it is that of a factor."""


class Moving(Named):
    """A factor that is a tangent."""


def product(
    x: Named, y: Named, out: Sequence[Name], *, precision: Any = None, dtype: Any = None, like: Any = None
) -> Named:
    """`named.multiply` with a `Moving` factor ``y``; where a mesh is in the types, that itself."""
    if not jax.typeof(x.array).sharding.mesh.empty:
        return multiply(x, y, out, precision=precision, dtype=dtype, like=like)
    names = {"x_dims": x.dims, "y_dims": y.dims, "out": tuple(out)}
    kind = jnp.dtype(dtype if dtype is not None else x.array.dtype)
    return Named(moving_p.bind(x.array, y.array, **names, precision=precision, dtype=kind, gradient=False), tuple(out))


def _plain(x: Any, y: Any, *, x_dims: Any, y_dims: Any, out: Any, gradient: bool, **settings: Any) -> Any:
    return multiply(Named(x, x_dims), Named(y, y_dims), out, **settings).array


def _on_a_cpu(x: Any, y: Any, *, x_dims: Any, y_dims: Any, out: Any, gradient: bool, **settings: Any) -> Any:
    small, large = sorted((Named(x, x_dims), Named(y, y_dims)), key=lambda v: v.array.size)
    length = sizes(small, large)
    if not gradient or large.array.size < TOKENS * math.prod(length[d] for d in out):
        return multiply(Named(x, x_dims), Named(y, y_dims), out, **settings).array
    batch = [d for d in small.dims if d in large.dims and d in out]
    dims = [*batch, *(d for v in (small, large) for d in v.dims if d in out and d not in batch)]
    if small.dims == y_dims and isinstance(settings["precision"], tuple):
        settings |= {"precision": settings["precision"][::-1]}
    found = multiply(small, large, dims, **settings)
    if found.dims == out:
        return found.array
    kind = jnp.finfo(found.array.dtype)  # XLA would turn over an operand instead, but not across an operation
    return Named(lax.reduce_precision(found.array, kind.nexp, kind.nmant), found.dims).ordered(out).array


def _shaped(x: Any, y: Any, *, x_dims: Any, y_dims: Any, out: Any, dtype: Any, **_: Any) -> Any:
    length = sizes(Named(x, x_dims), Named(y, y_dims))
    return x.update(shape=tuple(length[d] for d in out), dtype=dtype, weak_type=False)


def _of_x(cotangent: Any, x: Any, y: Any, *, x_dims: Any, y_dims: Any, out: Any, precision: Any, **_: Any) -> Any:
    found = multiply(Named(cotangent, out), Named(y, y_dims), x_dims, precision=precision, dtype=cotangent.dtype)
    return found.array.astype(x.aval.dtype)


def _of_y(cotangent: Any, x: Any, y: Any, *, x_dims: Any, y_dims: Any, out: Any, precision: Any, **_: Any) -> Any:
    names = {"x_dims": out, "y_dims": x_dims, "out": y_dims}
    found = moving_p.bind(cotangent, x, **names, precision=precision, dtype=cotangent.dtype, gradient=True)
    return found.astype(y.aval.dtype)


def _batched(args: Any, axes: Any, *, x_dims: Any, y_dims: Any, out: Any, **params: Any) -> Any:
    taken = {*x_dims, *y_dims, *out}
    name = next(n for i in range(len(taken) + 1) if (n := ("vmap", i)) not in taken)
    x_dims, y_dims = (
        dims if axis is None else (*dims[:axis], name, *dims[axis:])
        for dims, axis in zip((x_dims, y_dims), axes, strict=True)
    )
    return moving_p.bind(*args, x_dims=x_dims, y_dims=y_dims, out=(name, *out), **params), 0


moving_p.def_impl(_plain)
moving_p.def_abstract_eval(_shaped)
ad.defbilinear(moving_p, _of_x, _of_y)
batching.primitive_batchers[moving_p] = _batched
mlir.register_lowering(moving_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(moving_p, mlir.lower_fun(_on_a_cpu, multiple_results=False), platform="cpu")
