"""What a remat policy sees of a product with an adapted weight.

A policy decides, primitive by primitive, what `jax.checkpoint` keeps for the backward pass. Written out, a factored
product is three products, and one that keeps products (`dots_saveable`, `dots_with_no_batch_dims_saveable`) would keep
``x W0`` *and* ``(x A) B``, twice what the frozen net keeps. So the update is one step to a policy, and not one that
it keeps: what is kept is ``x W0``, as in the frozen net, and the update is computed again, ``2Tr(m + n)``
operations. The sum has a name, for policies that keep it instead (`lojax.remat`). Pure maths: no jaxprs here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

PRODUCT = "lojax_product"
"""The name of every product with an adapted weight, update included."""


def named(y: Any) -> Any:
    """``y``, known to policies as `PRODUCT`."""
    return checkpoint_name(y, PRODUCT)


def one_step(first: Callable[[Any, Any], Any], second: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """``second(first(x, a), b)``, with nothing inside that a policy could keep but what its derivative asks for.

    Args:
        first: Linear in either argument.
        second: Linear in either argument.
    """

    @jax.custom_jvp
    def step(x: Any, a: Any, b: Any) -> Any:
        return second(first(x, a), b)

    @functools.partial(step.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        x, a, b = primals
        dx, da, db = (None if isinstance(t, SymbolicZero) else t for t in tangents)
        inner = [] if dx is None else [first(dx, a)]
        inner += [] if da is None else [first(x, da)]
        terms = [second(functools.reduce(jnp.add, inner), b)] if inner else []
        terms += [] if db is None else [second(first(x, a), db)]
        return step(x, a, b), functools.reduce(jnp.add, terms)

    return step
