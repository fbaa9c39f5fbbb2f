"""A product with the tangent of a factor, whose transpose on a CPU needs no transposed copy of an activation.

The gradient of a factor sums over all tokens, ``x^T g``. JAX writes it as ``(g^T x)^T``, and XLA:CPU then copies
whichever operand comes first with its axes transposed, or, where it merges the two transposes, multiplies ``x^T`` by a
narrow ``g``. Either takes a third of the time of ``x W`` (measured with JAX 0.10 to 0.12). So this product is a
primitive of its own: its transpose rule marks the gradient of a factor, and its lowering for a CPU puts the smaller
operand first and transposes the small result. On other devices it is `multiply` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lojax.adapters.matrices import at_least_float32
from lojax.lowrank.named_array import RANK, Name, NamedArray, Precision, axis_lengths, multiply
from lojax.types import Array, Dtype

Dims = tuple[Name, ...]

TRANSPOSE_RATIO = 4
"""The other order pays where the larger operand has at least this many times the entries of the result. It transposes
the result; below this ratio, the copies that XLA:CPU makes of an operand cost no more."""

MAX_SUMMED_RANK = 64
"""Up to this rank a GPU sums an update over the rank. Beyond it, its multiplications outside of the matrix units take
longer than the memory traffic of a separate product (an H100, for each entry: 2 r operations at 67 TFLOP/s against 8
bytes at 3.35 TB/s)."""

SUMMED_AT_ONCE = 16
"""XLA fuses a sum of so many products into what uses it; one of more than 32 becomes a kernel of its own."""

EXPANSION = 4
"""A product over the rank is summed where the result has this many times the entries of either operand."""

factor_product_p = Primitive("lojax_factor_product")
"""``multiply(x, y, out)``, with the names of all axes as parameters. ``gradient``: of a factor."""


class FactorTangent(NamedArray):
    """A factor that is a tangent: the class alone tells `factored.multiply_factor` which product to call."""


def is_symbolic_zero(tangent: Any) -> bool:
    """Whether every array of a tangent is a symbolic zero: nothing moves it."""
    leaves = jax.tree.leaves(tangent, is_leaf=lambda node: isinstance(node, SymbolicZero))
    return all(isinstance(leaf, SymbolicZero) for leaf in leaves)


def factor_product(
    x: NamedArray,
    y: NamedArray,
    out: Sequence[Name],
    *,
    precision: Precision = None,
    dtype: Dtype | None = None,
    like: ShapedArray | None = None,
) -> NamedArray:
    """`multiply` with a `FactorTangent` ``y``; on a mesh that types carry, `multiply` itself."""
    # The primitive has no rule for a result whose type says how it is sharded, nor for one that varies over a mesh.
    if {*jax.typeof(x.array).sharding.mesh.axis_types} - {AxisType.Auto}:
        return multiply(x, y, out, precision=precision, dtype=dtype, like=like)
    kind = jnp.dtype(dtype if dtype is not None else x.array.dtype)
    dims = {"x_dims": x.dims, "y_dims": y.dims, "out": tuple(out)}
    y_out = factor_product_p.bind(x.array, y.array, **dims, precision=precision, dtype=kind, gradient=False)
    return NamedArray(y_out, tuple(out))


def _multiply(x: Array, y: Array, *, x_dims: Dims, y_dims: Dims, out: Dims, gradient: bool, **settings: Any) -> Array:
    return multiply(NamedArray(x, x_dims), NamedArray(y, y_dims), out, **settings).array


def _multiply_on_cpu(
    x: Array, y: Array, *, x_dims: Dims, y_dims: Dims, out: Dims, gradient: bool, **settings: Any
) -> Array:
    # A gradient of a factor is [m, r] or [r, n]. The operand with r is the small one (T r entries), the activation the
    # large one (T m or T n): small first, the result comes out rank first, and only it is transposed.
    small, large = sorted((NamedArray(x, x_dims), NamedArray(y, y_dims)), key=lambda v: v.array.size)
    length = axis_lengths(small, large)
    if not gradient or large.array.size < TRANSPOSE_RATIO * math.prod(length[d] for d in out):
        return _multiply(x, y, x_dims=x_dims, y_dims=y_dims, out=out, gradient=gradient, **settings)
    batch = [d for d in small.dims if d in large.dims and d in out]
    dims = [*batch, *(d for v in (small, large) for d in v.dims if d in out and d not in batch)]
    # The operands may have changed places, and a pair of precisions has to follow them.
    if small.dims == y_dims and isinstance(settings["precision"], tuple):
        settings |= {"precision": settings["precision"][::-1]}
    product = multiply(small, large, dims, **settings)
    if product.dims == out or jnp.issubdtype(product.array.dtype, jnp.complexfloating):
        return product.transpose_to(out).array
    # XLA merges the transpose of a product into the product and copies an operand after all. It does not merge across
    # another operation, and this one changes nothing: it rounds to the precision that the values already have. Complex
    # numbers have no such operation.
    info = jnp.finfo(product.array.dtype)
    rounded = lax.reduce_precision(product.array, info.nexp, info.nmant)
    return NamedArray(rounded, product.dims).transpose_to(out).array


def _multiply_on_gpu(
    x: Array, y: Array, *, x_dims: Dims, y_dims: Dims, out: Dims, gradient: bool, **settings: Any
) -> Array:
    # An update [T, r] . [r, n] as a sum over the rank: XLA computes it where it is added to the frozen product. A
    # product of its own would be written, and read again by the addition.
    operands = NamedArray(x, x_dims), NamedArray(y, y_dims)
    length = axis_lengths(*operands)
    expands = min(math.prod(length[d] for d in out) // v.array.size for v in operands) >= EXPANSION
    if ({*x_dims} & {*y_dims}) - {*out} != {RANK} or length[RANK] > MAX_SUMMED_RANK or not expands:
        return _multiply(x, y, x_dims=x_dims, y_dims=y_dims, out=out, gradient=gradient, **settings)
    wide = at_least_float32(settings["dtype"])
    dims = (*out[:-1], RANK, *out[-1:])
    split = [_split_rank(v.broadcastable(dims), length[RANK]).astype(wide) for v in operands]
    total = jnp.sum(split[0] * split[1], axis=-2)
    if total.ndim > len(out):
        # XLA merges two sums in a row, and does not merge across this operation, which changes nothing.
        info = jnp.finfo(wide)
        total = jnp.sum(lax.reduce_precision(total, info.nexp, info.nmant), axis=-2)
    return total.astype(settings["dtype"])


def _split_rank(x: Array, rank: int) -> Array:
    """``x`` ``[..., rank, n]`` itself up to 16, else ``[..., parts, up to 16, n]`` with zeros at the end."""
    parts = -(-rank // SUMMED_AT_ONCE)
    if parts == 1:
        return x
    size = -(-rank // parts)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, parts * size - rank), (0, 0)])
    return x.reshape(*x.shape[:-2], parts, size, x.shape[-1])


def _abstract_product(
    x: Any, y: Any, *, x_dims: Dims, y_dims: Dims, out: Dims, dtype: Dtype, gradient: bool, precision: Precision
) -> Any:
    length = axis_lengths(NamedArray(x, x_dims), NamedArray(y, y_dims))
    shape = tuple(length[d] for d in out)
    # The type of an array on a mesh of automatic axes names the mesh, and an entry for each axis of the array.
    sharding = NamedSharding(x.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return x.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _transpose_x(
    cotangent: Array, x: Any, y: Array, *, x_dims: Dims, y_dims: Dims, out: Dims, precision: Precision, **_: Any
) -> Array:
    # The cotangent of the activation sums over the rank or n, not over tokens: no order of it needs a transposed copy.
    dims = {"x_dims": out, "y_dims": y_dims, "out": x_dims}
    x_bar = factor_product_p.bind(cotangent, y, **dims, precision=precision, dtype=cotangent.dtype, gradient=False)
    return x_bar.astype(x.aval.dtype)


def _transpose_y(
    cotangent: Array, x: Array, y: Any, *, x_dims: Dims, y_dims: Dims, out: Dims, precision: Precision, **_: Any
) -> Array:
    dims = {"x_dims": out, "y_dims": x_dims, "out": y_dims}
    y_bar = factor_product_p.bind(cotangent, x, **dims, precision=precision, dtype=cotangent.dtype, gradient=True)
    return y_bar.astype(y.aval.dtype)


def _batch(
    operands: Sequence[Array], axes: Sequence[int | None], *, x_dims: Dims, y_dims: Dims, out: Dims, **params: Any
) -> tuple[Array, int]:
    # A vmap around this one has named an axis already, so each takes a name that is not in use.
    taken = {*x_dims, *y_dims, *out}
    name = next(n for i in range(len(taken) + 1) if (n := ("vmap", i)) not in taken)
    x_dims, y_dims = (
        dims if axis is None else (*dims[:axis], name, *dims[axis:])
        for dims, axis in zip((x_dims, y_dims), axes, strict=True)
    )
    return factor_product_p.bind(*operands, x_dims=x_dims, y_dims=y_dims, out=(name, *out), **params), 0


factor_product_p.def_impl(_multiply)
factor_product_p.def_abstract_eval(_abstract_product)
ad.defbilinear(factor_product_p, _transpose_x, _transpose_y)
batching.primitive_batchers[factor_product_p] = _batch
mlir.register_lowering(factor_product_p, mlir.lower_fun(_multiply, multiple_results=False))
mlir.register_lowering(factor_product_p, mlir.lower_fun(_multiply_on_cpu, multiple_results=False), platform="cpu")
for gpu in ("cuda", "rocm"):
    mlir.register_lowering(factor_product_p, mlir.lower_fun(_multiply_on_gpu, multiple_results=False), platform=gpu)
