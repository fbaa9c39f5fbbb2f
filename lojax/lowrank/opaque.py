"""What a remat policy sees of a product with an adapted weight.

A policy decides, primitive by primitive, what `jax.checkpoint` keeps for the backward pass. Written out, a factored
product is three products, and one that keeps products (`dots_saveable`, `dots_with_no_batch_dims_saveable`) would keep
``x W0`` *and* ``(x A) B``, twice what the frozen net keeps. So the update is one step to a policy, and not one that
it keeps: what is kept is ``x W0``, as in the frozen net, and the update is computed again, ``2Tr(m + n)``
operations. The sum has a name, for policies that keep it instead (`lojax.remat`). Pure maths: no jaxprs here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from lojax.lowrank.factor_product import Moving
from lojax.lowrank.named_array import Named

PRODUCT = "lojax_product"
"""The name of every product with an adapted weight, update included."""


def named(y: Any) -> Any:
    """``y``, known to policies as `PRODUCT`."""
    return checkpoint_name(y, PRODUCT)


def one_step(
    first: Callable[[Any, Sequence[Named]], list[Any]], second: Sequence[Callable[[Any, Named], Any]]
) -> Callable[..., list[Any]]:
    """``[second_i(first(x, a)_i, b_i)]``, with nothing inside for a policy to keep but what its derivative asks for.

    Args:
        first: ``first(x, a)``, linear in x and in all of the factors a together, whatever the order of their axes.
        second: For each result, a function of ``first(x, a)_i`` and the other factor, linear in either.
    """

    def spread(inner: Sequence[Any], b: Sequence[Named]) -> list[Any]:
        return [f(u, v) for f, u, v in zip(second, inner, b, strict=True)]

    @jax.custom_jvp
    def step(x: Any, a: Sequence[Named], b: Sequence[Named]) -> list[Any]:
        return spread(first(x, a), b)

    @functools.partial(step.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        (x, a, b), (dx, da, db) = primals, tangents
        inner = first(x, a)
        along: list[Any] = [] if _still(dx) else [first(dx, a)]
        if not all(_still(d.array) for d in da):
            moved = [
                Named(jnp.zeros_like(v.array), v.dims) if _still(d.array) else d for v, d in zip(a, da, strict=True)
            ]
            along.append(first(x, [Moving(d.array, d.dims) for d in moved]))
        outputs = step(x, a, b)
        terms: list[list[Any]] = [
            [] if _still(d.array) else [f(u, Moving(d.array, d.dims))]
            for f, u, d in zip(second, inner, db, strict=True)
        ]
        if along:
            sums = [functools.reduce(jnp.add, u) for u in zip(*along, strict=True)]
            terms = [[y, *more] for y, more in zip(spread(sums, b), terms, strict=True)]
        return outputs, [
            functools.reduce(jnp.add, found) if found else jnp.zeros_like(y)
            for found, y in zip(terms, outputs, strict=True)
        ]

    return step


def _still(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)
