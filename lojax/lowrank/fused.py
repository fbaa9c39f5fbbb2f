"""The fused way of a product: ``x . (w + a b)`` with the weight formed for the moment, and no gradient of it.

The product is one `dot_general` with ``w + a b``. Its derivative is written out by hand, as a rule for
tangents:

    dy = dx . (w + a b) + (x . da) . b + (x . a) . db

which is linear in ``dx``, ``da`` and ``db``, so JAX transposes it to

    dx = dy . (w + a b)^T        da = x^T (dy . b^T)        db = (x . a)^T dy

and nothing of the weight's size is ever a gradient (Hu et al. 2021, arXiv:2106.09685, eq. 3; the order of the
products is that of RunLoRA, Cherniuk et al. 2023, arXiv:2312.03415). What needs ``w + a b`` or ``x . a`` is
wrapped in `jax.checkpoint`: both are built again where they are needed and only ``x``, ``w``, ``a`` and ``b``
are kept. (The barrier that `jax.checkpoint` sets is needed: without it XLA keeps the weight of every layer of an
unrolled net for the backward pass; on a v5e, ahead of time, four 4096 x 4096 layers then took 417 MiB of temporaries
instead of 290.) As it is a rule for tangents, `jvp`, `vmap`, `scan`, `remat` and second derivatives follow.
Pure maths: no jaxprs here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lojax.lowrank.factor_product import Moving
from lojax.lowrank.named_array import Named
from lojax.lowrank.value import LowRank

Base = Callable[[Any, Any], Any]
"""``base(w, x)``: the product with a plain weight."""
Update = Callable[[Any, LowRank, Any], Any]
"""``update(x, value, like)``: the product of ``x`` with ``a b`` alone, in the dtype and sharding of ``like``."""


def product(x: Any, value: LowRank, *, base: Base, update: Update) -> Any:
    """``x . (w + a b)``, with ``w + a b`` summed in float32 (or wider) and rounded once to the dtype of ``w``.

    Args:
        x: The activation.
        value: The adapted weight, with one update and no dropout. Its gain is the caller's.
        base: The product with a plain weight, linear in both.
        update: The product with the update alone, factored, linear in either factor.

    Returns:
        The product, as ``base`` gives it.
    """

    def low_rank(w: Any, a: Named, b: Named) -> LowRank:
        return dataclasses.replace(value, w=w, factors=(a, b), gain=None)

    def dense(w: Any, a: Named, b: Named) -> Any:
        return low_rank(w, a, b).dense()

    # Opaque to remat policies: one that saves products would save ``a b``, of the weight's size, for every layer.
    formed = jax.custom_jvp(dense)
    formed.defjvp(lambda primals, tangents: jax.jvp(dense, primals, tangents))

    @jax.custom_jvp
    def multiplied(x: Any, w: Any, a: Named, b: Named) -> Any:
        return base(formed(w, a, b), x)

    @functools.partial(multiplied.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        x, *weight = primals
        y = base(formed(*weight), x)  # in the open, so that a policy that saves products saves this one
        moving = {k: t for k, t in zip("xwab", tangents, strict=True) if not _still(t)}

        @jax.checkpoint
        def tangent(primals: Any, moving: dict[str, Any]) -> Any:
            x, w, a, b = primals
            terms = {
                "x": lambda dx: base(formed(w, a, b), dx),
                "w": lambda dw: base(dw, x),
                "a": lambda da: update(x, low_rank(w, Moving(da.array, da.dims), b), y),
                "b": lambda db: update(x, low_rank(w, a, Moving(db.array, db.dims)), y),
            }
            first, *rest = (terms[k](dk) for k, dk in moving.items())
            return functools.reduce(jnp.add, rest, first)

        return y, tangent(primals, moving)

    return multiplied(x, value.w, *value.factors)


def _still(tangent: Any) -> bool:
    return isinstance(tangent.array if isinstance(tangent, Named) else tangent, SymbolicZero)
