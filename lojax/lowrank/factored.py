"""The product of an activation with an update alone: ``(x . a) . b``, and what it costs. Pure maths: no jaxprs here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lojax.compat import varying_axes
from lojax.lowrank.factor_product import Moving, product
from lojax.lowrank.named_array import RANK, Name, Named, cast, multiply, sizes
from lojax.lowrank.opaque import one_step
from lojax.lowrank.second_moment import echo
from lojax.lowrank.value import LowRank, NotFactored, complete


def compute_dtype(x: Any, accumulated: Any) -> Any:
    """The dtype in which the factors meet ``x``: that of ``x``, but never less than 16 bits."""
    if jnp.dtype(x.dtype).itemsize >= 2:
        return x.dtype
    return accumulated if accumulated is not None else jnp.bfloat16


def apply_factors(
    x: Named,
    value: LowRank,
    out: Sequence[Name],
    *,
    precision: Any = None,
    dtype: Any = None,
    like: Any = None,
    opaque: bool = True,
) -> Named:
    """``(x . first) . second`` summed over the axes of ``x`` that are not in ``out``, axes in the order ``out``.

    The first factor is the one that sums away the most. In the dtype of ``like``, where it is given; one step to remat
    policies where ``opaque`` (see `residuals`).
    """
    first, second, gone = ends(x, complete(value).factors, out)
    kind = compute_dtype(x.array, dtype)
    x = dropped_out(x, value)
    middle = [d for d in dict.fromkeys((*x.dims, *first.dims)) if d not in gone and d != RANK] + [RANK]
    settings = {"precision": precision, "dtype": dtype}

    def meet(x_: Any, factors: Sequence[Named]) -> list[Any]:
        return [product_of(Named(x_, x.dims), factors[0], middle, kind, **settings)]

    def spread(inner: Any, factor: Named) -> Any:
        y = product_of(Named(inner, tuple(middle)), factor, out, kind, **settings, like=like)
        return y if like is None else y.astype(like.dtype)

    if opaque and not value.watching:
        return Named(one_step(meet, [spread])(x.array, [first], [second])[0], tuple(out))
    inner = meet(x.array, [first])[0]
    return Named(spread(echo(inner) if value.watching else inner, second), tuple(out))


def product_of(x: Named, factor: Named, out: Sequence[Name], kind: Any, **settings: Any) -> Any:
    """The array of the product of ``x`` with a factor, both in the dtype ``kind``; settings as in `named.multiply`."""
    if isinstance(factor, Moving):
        return product(cast(x, kind), cast(factor, kind), out, **settings).array
    return multiply(cast(x, kind), cast(factor, kind), out, **settings).array


def ends(x: Named, factors: tuple[Named, ...], out: Sequence[Name]) -> tuple[Named, Named, list[Name]]:
    """The factor that meets ``x`` first, the other one, and the axes that the first product sums away."""
    summed = [d for d in x.dims if d not in out]

    def alone(i: int) -> list[Name]:
        return [d for d in summed if d in factors[i].dims and d not in factors[1 - i].dims]

    weight = [math.prod(factors[i].size(d) for d in alone(i)) for i in (0, 1)]
    if max(weight) == 1 and not (alone(0) or alone(1)):
        raise NotFactored("no axis of one factor alone is summed")
    i = 0 if weight[0] >= weight[1] else 1
    return factors[i], factors[1 - i], alone(i)


def low_rank_flops(x: Named, value: LowRank, out: Sequence[Name]) -> int:
    """The floating-point operations of `apply_factors`."""
    first, second, gone = ends(x, complete(value).factors, out)
    length = sizes(x, first, second)
    inner = {*x.dims, *first.dims}
    return 2 * sum(math.prod(length[d] for d in dims) for dims in (inner, inner - {*gone} | {*second.dims}))


def low_rank_bytes(x: Named, value: LowRank, out: Sequence[Name], y: Any) -> int:
    """The bytes of what `apply_factors` makes for the result ``y``: the product with one factor, and the update."""
    first, _, gone = ends(x, complete(value).factors, out)
    length = sizes(x, first)
    inner = math.prod(length[d] for d in {*x.dims, *first.dims} if d not in gone)
    return inner * jnp.dtype(compute_dtype(x.array, y.dtype)).itemsize + y.size * y.dtype.itemsize


def dropped_out(x: Named, value: LowRank) -> Named:
    """``x`` with dropout, where the value asks for it (Srivastava et al. 2014, inverted)."""
    if value.key is None or not value.rate:
        return x
    key = value.key
    for axis in varying_axes(x.array):  # under shard_map, a mask of its own for every shard of x
        key = jax.random.fold_in(key, lax.axis_index(axis))
    keep = jax.random.bernoulli(key, 1 - value.rate, x.array.shape)
    return Named(jnp.where(keep, x.array / (1 - value.rate), jnp.zeros_like(x.array)), x.dims)
