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
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

PRODUCT = "lojax_product"
"""The name of every product with an adapted weight, update included."""


def named(y: Any) -> Any:
    """``y``, known to policies as `PRODUCT`."""
    return checkpoint_name(y, PRODUCT)


def one_step(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, with nothing inside that a policy could keep, other than what its derivative asks for."""

    @jax.custom_jvp
    def step(*args: Any) -> Any:
        return f(*args)

    @functools.partial(step.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        moving = {i: t for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)}

        def along(moved: dict[int, Any]) -> Any:
            return f(*(moved.get(i, x) for i, x in enumerate(primals)))

        return step(*primals), jax.jvp(along, ({i: primals[i] for i in moving},), (moving,))[1]

    return step
