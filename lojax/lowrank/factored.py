"""The factored product ``x . w + (x . a) . b``, and the one place where a variant of LoRA acts on a product.

`add_updates` serves every kind of product: dropout on the input of the update, the tap between the factors, the sum of
terms, the gain on the result. What differs between kinds of product is how a term alone is multiplied.

`opaque_product` is what a remat policy sees of an update. A policy decides, primitive by primitive, what
`jax.checkpoint` keeps for the backward pass. Written out, a factored product is three products, and a policy that
keeps products (`dots_saveable`, `dots_with_no_batch_dims_saveable`) would keep ``x W0`` *and* ``(x A) B``, twice
what the frozen net keeps. So the update is one opaque primitive that no policy saves: ``x W0`` is kept, as in the
frozen net, and the update is computed again, ``2Tr(m + n)`` operations. The sum has a name, for policies that keep it
instead (`lojax.remat`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero

from lojax.adapters.matrices import at_least_float32
from lojax.compat import varying_axes
from lojax.lowrank.factor_product import FactorTangent, factor_product
from lojax.lowrank.named_array import RANK, Name, NamedArray, Precision, axis_lengths, cast, multiply, reshard_like
from lojax.lowrank.second_moment import second_moment_tap
from lojax.lowrank.value import LowRank, NotFactored, Term, complete_term, compute_dtype
from lojax.types import Array, Dtype

PRODUCT = "lojax_product"
"""The name of every product with an adapted weight, update included."""

Tap = Callable[[Array], Array]
"""What happens to ``x . a`` before it meets ``b``: the identity, or a probe."""


def name_product(y: Array) -> Array:
    """``y``, known to remat policies as `PRODUCT`."""
    return checkpoint_name(y, PRODUCT)


# --- what a variant adds, for every kind of product ---


def add_updates(
    value: LowRank,
    x: NamedArray | None,
    out: Sequence[Name],
    *,
    base: Callable[[Any], Array],
    update: Callable[[Any, Term, Array, Tap], Array],
    factor_input: Array | None = None,
    precomputed: Array | None = None,
) -> Array:
    """The frozen product plus every update, with what the variant of ``value`` adds.

    Args:
        value: The adapted weight.
        x: The activation, with names for its axes; None for a look-up, which has none.
        out: The names of the result's axes.
        base: ``base(x)``, the frozen product.
        update: ``update(x, term, like, tap)``, the product with one term alone, in the dtype of ``like``.
        factor_input: ``x`` as the factors are to meet it, where that is another array (see `rewrite.activations`).
        precomputed: The sum of all updates, where it was computed with those of other weights.
    """
    dropout, tap, gain = value.dropout, (second_moment_tap if value.tap else _identity), value.gain
    if gain is not None and not set(gain.dims) <= set(out):
        # The product sums the axes of the gain (a tied head): it goes on the input instead of the result.
        if x is None or not set(gain.dims) <= set(x.dims):
            raise NotFactored("a product that sums some of the axes of a DoRA magnitude")
        factor_input = None if factor_input is None else apply_gain(factor_input, gain, x.dims)
        x = NamedArray(apply_gain(x.array, gain, x.dims), x.dims)
        gain = None
    y = base(None if x is None else x.array)
    if precomputed is not None:
        y = y + precomputed
    else:
        for term in value.terms:
            own = None if x is None else (x.array if factor_input is None else factor_input)
            if own is not None and dropout is not None:
                own = drop_out(own, dropout.key, dropout.rate)
            y = y + update(own, term, y, tap)
    return y if gain is None else apply_gain(y, gain, out)


def _identity(inner: Array) -> Array:
    return inner


def apply_gain(y: Array, gain: NamedArray, dims: Sequence[Name]) -> Array:
    """``y``, with axes called ``dims``, times ``gain`` (DoRA): in float32 or wider, rounded once."""
    wide = at_least_float32(y.dtype)
    return (y.astype(wide) * reshard_like(gain.broadcastable(dims), y).astype(wide)).astype(y.dtype)


def drop_out(x: Array, key: Array, rate: float) -> Array:
    """``x`` with inverted dropout (Srivastava et al. 2014)."""
    for axis in varying_axes(x):  # under shard_map, a mask of its own for every shard of x
        key = jax.random.fold_in(key, lax.axis_index(axis))
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


# --- the product with one term ---


def apply_term(
    x: NamedArray,
    term: Term,
    out: Sequence[Name],
    *,
    precision: Precision = None,
    dtype: Dtype | None = None,
    like: ShapedArray | None = None,
    tap: Tap = _identity,
    opaque: bool = True,
) -> NamedArray:
    """``(x . first) . second`` summed over the axes of ``x`` that are not in ``out``, axes in the order ``out``.

    Args:
        x: The activation.
        term: Two factors that have every axis of the weight. The first is the one that sums away the most.
        out: The names of the result's axes.
        precision: As in `jax.lax.dot_general`, for the activation and a factor.
        dtype: The dtype in which the sums are accumulated.
        like: The type of an array whose dtype and sharding the result takes.
        tap: What happens between the factors.
        opaque: Whether the two products are one to remat policies (see `opaque_product`).
    """
    first, second, summed = contraction_order(x, term, out)
    kind = compute_dtype(x.array, dtype)
    middle = [d for d in dict.fromkeys((*x.dims, *first.dims)) if d not in summed and d != RANK] + [RANK]
    settings: dict[str, Any] = {"precision": precision, "dtype": dtype}
    x_dims = x.dims  # JAX may keep these two functions for longer than the trace: they must hold no tracer

    def project_down(x: Array, factors: Sequence[NamedArray]) -> list[Array]:
        return [multiply_factor(NamedArray(x, x_dims), factors[0], middle, kind, **settings)]

    def project_up(inner: Array, factor: NamedArray) -> Array:
        y = multiply_factor(NamedArray(inner, tuple(middle)), factor, out, kind, **settings, like=like)
        return y if like is None else y.astype(like.dtype)

    if opaque and tap is _identity:
        return NamedArray(opaque_product(project_down, [project_up])(x.array, [first], [second])[0], tuple(out))
    return NamedArray(project_up(tap(project_down(x.array, [first])[0]), second), tuple(out))


def multiply_factor(
    x: NamedArray,
    factor: NamedArray,
    out: Sequence[Name],
    kind: Dtype,
    *,
    precision: Precision = None,
    dtype: Dtype | None = None,
    like: ShapedArray | None = None,
) -> Array:
    """The array of the product of ``x`` with a factor, both in the dtype ``kind``; the rest as in `multiply`."""
    product = factor_product if isinstance(factor, FactorTangent) else multiply
    return product(cast(x, kind), cast(factor, kind), out, precision=precision, dtype=dtype, like=like).array


def contraction_order(x: NamedArray, term: Term, out: Sequence[Name]) -> tuple[NamedArray, NamedArray, list[Name]]:
    """The factor that meets ``x`` first, the other one, and the axes that the first product sums away."""
    summed = [d for d in x.dims if d not in out]
    own_axes = [[d for d in summed if d in term[i].dims and d not in term[1 - i].dims] for i in (0, 1)]
    if not any(own_axes):
        raise NotFactored("the product sums no axis that one factor has alone")
    sizes = [math.prod(term[i].size(d) for d in own_axes[i]) for i in (0, 1)]
    i = 0 if sizes[0] >= sizes[1] else 1
    return term[i], term[1 - i], own_axes[i]


def term_flops(x: NamedArray, term: Term, out: Sequence[Name]) -> int:
    """The floating-point operations of `apply_term`."""
    first, second, summed = contraction_order(x, term, out)
    length = axis_lengths(x, first, second)
    inner = {*x.dims, *first.dims}
    return 2 * sum(math.prod(length[d] for d in dims) for dims in (inner, inner - {*summed} | {*second.dims}))


def term_bytes(x: NamedArray, term: Term, out: Sequence[Name], y: Array) -> int:
    """The bytes that `apply_term` makes for the result ``y``: the product with one factor, and the update."""
    first, _, summed = contraction_order(x, term, out)
    length = axis_lengths(x, first)
    inner = math.prod(length[d] for d in {*x.dims, *first.dims} if d not in summed)
    return inner * jnp.dtype(compute_dtype(x.array, y.dtype)).itemsize + y.size * y.dtype.itemsize


def completed(value: LowRank) -> LowRank:
    """``value`` with every one of its axes in some factor of each term."""
    return value.with_terms(tuple(complete_term(term, value.shape) for term in value.terms))


# --- what a remat policy sees ---


def opaque_product(
    down: Callable[[Array, Sequence[NamedArray]], list[Array]], up: Sequence[Callable[[Array, NamedArray], Array]]
) -> Callable[..., list[Array]]:
    """``[up_i(down(x, a)_i, b_i)]``, with nothing inside for a policy to keep but what its derivative asks for.

    Args:
        down: ``down(x, a)``, linear in x and in all of the factors a together, whatever the order of their axes.
        up: For each result, a function of ``down(x, a)_i`` and the other factor, linear in either.
    """

    def project_up(inner: Sequence[Array], b: Sequence[NamedArray]) -> list[Array]:
        return [f(u, v) for f, u, v in zip(up, inner, b, strict=True)]

    # A rule for tangents and not for cotangents: jvp, vmap, scan, remat and second derivatives follow from it.
    @jax.custom_jvp
    def product(x: Array, a: Sequence[NamedArray], b: Sequence[NamedArray]) -> list[Array]:
        return project_up(down(x, a), b)

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        (x, a, b), (dx, da, db) = primals, tangents
        inner = down(x, a)
        inner_tangents: list[list[Array]] = [] if _is_zero(dx) else [down(dx, a)]
        if not all(_is_zero(d.array) for d in da):
            moved = [
                NamedArray(jnp.zeros_like(v.array), v.dims) if _is_zero(d.array) else d
                for v, d in zip(a, da, strict=True)
            ]
            inner_tangents.append(down(x, [FactorTangent(d.array, d.dims) for d in moved]))
        outputs = product(x, a, b)
        terms: list[list[Array]] = [
            [] if _is_zero(d.array) else [f(u, FactorTangent(d.array, d.dims))]
            for f, u, d in zip(up, inner, db, strict=True)
        ]
        if inner_tangents:
            sums = [functools.reduce(jnp.add, u) for u in zip(*inner_tangents, strict=True)]
            terms = [[y, *more] for y, more in zip(project_up(sums, b), terms, strict=True)]
        return outputs, [
            functools.reduce(jnp.add, summands) if summands else jnp.zeros_like(y)
            for summands, y in zip(terms, outputs, strict=True)
        ]

    return product


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)
