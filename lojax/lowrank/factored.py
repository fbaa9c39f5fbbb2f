"""The factored product ``x . w + (x . a) . b``, and the one place where a variant of LoRA acts on a product.

`add_updates` serves every kind of product: dropout on the input of the update, the tap between the factors, the sum of
terms, the gain on the result. What differs between kinds of product is how a term alone is multiplied.

`opaque_product` is what a remat policy sees of an update. A policy decides, primitive by primitive, what
`jax.checkpoint` saves for the backward pass. Written out, a factored product is three products, and a policy that
saves products (`dots_saveable`, `dots_with_no_batch_dims_saveable`) would save ``x W0`` *and* ``(x A) B``, twice
what it saves of the frozen net. So the update is one opaque primitive that no policy saves: ``x W0`` is saved, as in
the frozen net, and the update is recomputed, ``2Tr(m + n)`` operations. The sum has a name, for policies that save it
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

from lojax.adapters.matrices import at_least_float32
from lojax.compat import varying_axes
from lojax.lowrank.factor_product import FactorTangent, factor_product, is_symbolic_zero
from lojax.lowrank.named_array import RANK, Name, NamedArray, Precision, axis_lengths, cast, multiply, reshard_like
from lojax.lowrank.second_moment import second_moment_tap
from lojax.lowrank.value import LowRank, NotFactored, Term, complete_term, compute_dtype
from lojax.types import Array, Dtype

PRODUCT = "lojax_product"
"""The name of every product with an adapted weight, including its update."""

Tap = Callable[[Array], Array]
"""A function of ``x . a``, applied before the product with ``b``: the identity, or a probe."""


def name_product(y: Array) -> Array:
    """``y``, known to remat policies as `PRODUCT`."""
    return checkpoint_name(y, PRODUCT)


# --- variants, for every kind of product ---


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
    """The frozen product plus every update, with the dropout, the tap and the gain of ``value``.

    Args:
        value: The adapted weight.
        x: The activation, with names for its axes; None for a look-up, which has none.
        out: The names of the result's axes.
        base: ``base(x)``, the frozen product.
        update: ``update(x, term, like, tap)``, the product with one term alone, in the dtype of ``like``.
        factor_input: ``x`` for the products with factors, if it is another array (see `rewrite.activations`).
        precomputed: The sum of all updates, if it was computed together with those of other weights.
    """
    dropout, tap, gain = value.dropout, (second_moment_tap if value.tap else _identity), value.gain
    plain_x = x
    if gain is not None and not set(gain.dims) <= set(out):
        # The product sums the axes of the gain (a tied head), so the gain goes on the input instead of the result.
        if x is None or not set(gain.dims) <= set(x.dims):
            raise NotFactored("a product that sums some of the axes of a DoRA magnitude")
        if value.gain_on_update and factor_input is not None:
            factor_input = apply_gain(factor_input, gain, x.dims)
        x = NamedArray(apply_gain(x.array, gain, x.dims), x.dims)
        gain = None
    y = base(None if x is None else x.array)
    if not value.gain_on_update:
        x = plain_x
        y, gain = (y if gain is None else apply_gain(y, gain, out)), None
    if precomputed is not None:
        y = y + precomputed
    else:
        for i, term in enumerate(value.terms):
            own = None if x is None else (x.array if factor_input is None else factor_input)
            if own is not None and dropout is not None:
                own = drop_out(own, dropout.key, dropout.rate)
            y = y + update(own, term, y, _mixed(tap, value.mix) if i == 0 and value.mix is not None else tap)
    return y if gain is None else apply_gain(y, gain, out)


def _identity(inner: Array) -> Array:
    return inner


def _mixed(tap: Tap, mix: NamedArray) -> Tap:
    """``tap``, and then the entries along the rank times ``mix``. The rank is the last axis of ``x a``."""
    return lambda inner: tap(inner) * mix.array.astype(inner.dtype)


def apply_gain(y: Array, gain: NamedArray, dims: Sequence[Name]) -> Array:
    """``y``, with axes called ``dims``, times ``gain`` (DoRA): in float32 or wider, rounded once."""
    # The magnitude starts at the norm, so the gain starts near 1, where bfloat16 has steps of 1/128: rounded to it,
    # training would move the gain in jumps.
    wide = at_least_float32(y.dtype)
    return (y.astype(wide) * reshard_like(gain.broadcastable(dims), y).astype(wide)).astype(y.dtype)


def drop_out(x: Array, key: Array, rate: float) -> Array:
    """``x`` with inverted dropout (Srivastava et al. 2014)."""
    for axis in varying_axes(x):  # under shard_map the key is the same everywhere, so each shard folds in its index
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
    active: Array | None = None,
    opaque: bool = True,
) -> NamedArray:
    """``(x . first) . second``: the axes of ``x`` that are not in ``out`` are summed; the result has the axes ``out``.

    Args:
        x: The activation.
        term: Two factors that together have every axis of the weight; `contraction_order` says which comes first.
        out: The names of the result's axes.
        precision: As in `jax.lax.dot_general`, for the activation and a factor.
        dtype: The dtype in which the sums are accumulated.
        like: The type of an array whose dtype and sharding the result takes.
        tap: What is applied between the two products.
        active: The tokens on which the update acts, see `LowRank`.
        opaque: Whether remat policies see the two products as one primitive (see `opaque_product`).
    """
    first, second, summed = contraction_order(x, term, out)
    kind = compute_dtype(x.array, dtype)
    middle = [d for d in dict.fromkeys((*x.dims, *first.dims)) if d not in summed and d != RANK] + [RANK]
    settings: dict[str, Any] = {"precision": precision, "dtype": dtype}
    # JAX may cache these two functions beyond the trace, so they must close over no tracer (`jax.checking_leaks`): over
    # the names of x and not over x.
    x_dims = x.dims

    def project_down(x: Array, factors: Sequence[NamedArray]) -> list[Array]:
        return [multiply_factor(NamedArray(x, x_dims), factors[0], middle, kind, **settings)]

    def project_up(inner: Array, factor: NamedArray) -> Array:
        y = multiply_factor(
            NamedArray(inner, tuple(middle)), FactorTangent(factor.array, factor.dims), out, kind, **settings, like=like
        )
        return y if like is None else y.astype(like.dtype)

    if active is not None:
        inner = mask_tokens(tap(project_down(x.array, [first])[0]), middle, active)
        return NamedArray(project_up(inner, second), tuple(out))
    if opaque and tap is _identity:
        return NamedArray(opaque_product(project_down, [project_up])(x.array, [first], [second])[0], tuple(out))
    return NamedArray(project_up(tap(project_down(x.array, [first])[0]), second), tuple(out))


def mask_tokens(x: Array, dims: Sequence[Name], active: Array) -> Array:
    """``x`` with zeros at the tokens that are not ``active``. Its axes of an activation have tuples as names."""
    count = active.shape[0]
    axes = [i for i, d in enumerate(dims) if isinstance(d, tuple) and x.shape[i] == count]
    if count == 1:  # one step of a decoder: there is nothing to tell apart
        axes = axes[:1]
    if len(axes) != 1:
        have = "no axis" if not axes else "more than one axis"
        raise NotFactored(f"its activation has {have} of the length of active, {count}")
    shape = [count if i == axes[0] else 1 for i in range(x.ndim)]
    return jnp.where(active.reshape(shape), x, jnp.zeros_like(x))


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
    """The factor that multiplies ``x`` first, the other factor, and the axes that the first product sums."""
    summed = [d for d in x.dims if d not in out]
    own_axes = [[d for d in summed if d in term[i].dims and d not in term[1 - i].dims] for i in (0, 1)]
    if not any(own_axes):
        raise NotFactored("the product sums no axis that one factor has alone")
    sizes = [math.prod(term[i].size(d) for d in own_axes[i]) for i in (0, 1)]
    # Where either factor could be first (both ends of the weight are summed), the one that sums more entries leaves the
    # smaller array between the two products.
    i = 0 if sizes[0] >= sizes[1] else 1
    return term[i], term[1 - i], own_axes[i]


def term_flops(x: NamedArray, term: Term, out: Sequence[Name]) -> int:
    """The floating-point operations of `apply_term`."""
    first, second, summed = contraction_order(x, term, out)
    length = axis_lengths(x, first, second)
    inner = {*x.dims, *first.dims}
    return 2 * sum(math.prod(length[d] for d in dims) for dims in (inner, inner - {*summed} | {*second.dims}))


def term_bytes(x: NamedArray, term: Term, out: Sequence[Name], y: Array) -> int:
    """The bytes of the arrays that `apply_term` computes for the result ``y``: ``x . first``, and the update."""
    first, _, summed = contraction_order(x, term, out)
    length = axis_lengths(x, first)
    inner = math.prod(length[d] for d in {*x.dims, *first.dims} if d not in summed)
    return inner * jnp.dtype(compute_dtype(x.array, y.dtype)).itemsize + y.size * y.dtype.itemsize


def completed(value: LowRank) -> LowRank:
    """``value`` where the factors of each term have every axis of it."""
    return value.with_terms(tuple(complete_term(term, value.shape) for term in value.terms))


# --- one primitive to remat policies ---


def opaque_product(
    down: Callable[[Array, Sequence[NamedArray]], list[Array]], up: Sequence[Callable[[Array, NamedArray], Array]]
) -> Callable[..., list[Array]]:
    """``[up_i(down(x, a)_i, b_i)]`` as one primitive: a policy sees nothing of it but what its derivative needs.

    Args:
        down: ``down(x, a)``, linear in x, and linear in the list of factors a as a whole.
        up: For each result, a function of ``down(x, a)_i`` and the other factor, linear in each of the two.
    """

    def project_up(inner: Sequence[Array], b: Sequence[NamedArray]) -> list[Array]:
        return [f(u, v) for f, u, v in zip(up, inner, b, strict=True)]

    # A rule for tangents and not for cotangents: jvp, vmap, scan, remat and second derivatives follow from it, while
    # a `custom_vjp` has no forward derivative.
    @jax.custom_jvp
    def product(x: Array, a: Sequence[NamedArray], b: Sequence[NamedArray]) -> list[Array]:
        return project_up(down(x, a), b)

    # Symbolic zeros, because an array of zeros would be multiplied like any other. Where x has no tangent (a first
    # layer) there is no ``down(dx, a)``; with a frozen a (LoRA-FA) no ``down(x, da)``, whose transpose alone would save
    # x.
    @functools.partial(product.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        (x, a, b), (dx, da, db) = primals, tangents
        # In the open, unlike the output: db needs x . a in the backward pass. It has the size of the rank.
        inner = down(x, a)
        inner_tangents: list[list[Array]] = (
            [] if is_symbolic_zero(dx) else [down(dx, [FactorTangent(v.array, v.dims) for v in a])]
        )
        if not all(is_symbolic_zero(d.array) for d in da):
            # `down` takes all factors at once (those of a group are joined along the rank), so a factor without a
            # tangent gets zeros here. If no factor has one, the product is left out.
            moved = [
                NamedArray(jnp.zeros_like(v.array), v.dims) if is_symbolic_zero(d.array) else d
                for v, d in zip(a, da, strict=True)
            ]
            inner_tangents.append(down(x, [FactorTangent(d.array, d.dims) for d in moved]))
        # `product` and not `project_up(inner, b)`, which a policy would see and save.
        outputs = product(x, a, b)
        terms: list[list[Array]] = [
            [] if is_symbolic_zero(d.array) else [f(u, FactorTangent(d.array, d.dims))]
            for f, u, d in zip(up, inner, db, strict=True)
        ]
        if inner_tangents:
            # dx . a + x . da is summed before the product with b, not after: one product instead of two, and in the
            # transpose one product dy . b^T, of the size of the rank, which serves the gradients of x and of a.
            sums = [functools.reduce(jnp.add, u) for u in zip(*inner_tangents, strict=True)]
            terms = [[y, *more] for y, more in zip(project_up(sums, b), terms, strict=True)]
        return outputs, [
            functools.reduce(jnp.add, summands) if summands else jnp.zeros_like(y)
            for summands, y in zip(terms, outputs, strict=True)
        ]

    return product
