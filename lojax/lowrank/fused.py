"""The fused product ``x . (w + a b)``: the weight is materialized as a temporary, and has no gradient.

The product is one `dot_general` with ``w + a b``. Its derivative is written out by hand, as a rule for
tangents:

    dy = dx . (w + a b) + (x . da) . b + (x . a) . db        x [T, m], w [m, n], a [m, r], b [r, n], y [T, n]

which is linear in ``dx``, ``da`` and ``db``, so JAX transposes it to

    dx = dy . (w + a b)^T        da = x^T (dy . b^T)        db = (x . a)^T dy

and no gradient has the size of the weight (Hu et al. 2021, arXiv:2106.09685, eq. 3; the order of the
products is that of RunLoRA, Cherniuk et al. 2023, arXiv:2312.03415). As it is a rule for tangents, `jvp`, `vmap`,
`scan`, `remat` and second derivatives follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lojax.lowrank.factor_product import FactorTangent, is_symbolic_zero
from lojax.lowrank.frozen import FrozenWeight
from lojax.lowrank.named_array import NamedArray
from lojax.lowrank.value import LowRank, Term
from lojax.types import Array

Base = Callable[[Array, Array], Array]
"""``base(w, x)``: the product with a plain weight."""
Update = Callable[[Array, Term, Array], Array]
"""``update(x, term, like)``: the product of ``x`` with ``a b`` alone, in the dtype and sharding of ``like``."""


def fused_product(x: Array, value: LowRank, *, base: Base, update: Update) -> Array:
    """``x . (w + a b)``, with ``w + a b`` summed in float32 (or wider) and rounded once to the dtype of ``w``.

    Args:
        x: The activation.
        value: The adapted weight, with one term, no dropout and no gain.
        base: The product with a plain weight, linear in both.
        update: The product with the term alone, factored, linear in either factor.

    Returns:
        The product, as ``base`` returns it.
    """

    path = value.path

    def dense(w: FrozenWeight, a: NamedArray, b: NamedArray) -> Array:
        return LowRank(w, ((a, b),), path).dense()

    # Opaque to remat policies: one that saves products would save ``a b``, of the weight's size, for every layer.
    materialize = jax.custom_jvp(dense)
    materialize.defjvp(lambda primals, tangents: jax.jvp(dense, primals, tangents))

    @jax.custom_jvp
    def product(x: Array, w: FrozenWeight, a: NamedArray, b: NamedArray) -> Array:
        return base(materialize(w, a, b), x)

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        x, *weight = primals
        y = base(materialize(*weight), x)  # not `product`: a policy that saves products is to see and save this one
        x_dot, w_dot, a_dot, b_dot = tangents
        moving = {"x": x_dot, "w": w_dot, "a": a_dot, "b": b_dot}
        moving = {name: dot for name, dot in moving.items() if not is_symbolic_zero(dot)}

        # What needs ``w + a b`` or ``x . a`` is under `jax.checkpoint`: both are recomputed where they are needed, and
        # only x, w, a and b are saved. The barrier that `jax.checkpoint` sets is needed: without it XLA saves the
        # weight of every layer of an unrolled net for the backward pass (four 4096 x 4096 layers compiled for a v5e
        # with JAX 0.10: 417 MiB of temporaries instead of 290).
        @jax.checkpoint
        def tangent(primals: Any, moving: dict[str, Any]) -> Array:
            x, w, a, b = primals
            # One function for each operand, called below for those that have a tangent: the weight is materialized a
            # second time only where dx is asked for. lojax never asks for dw, since W0 has no gradient.
            summands = {
                "x": lambda dx: base(materialize(w, a, b), dx),
                "w": lambda dw: base(dw.dense(), x),
                # `FactorTangent` marks the sums over tokens, which a CPU computes in another order (see
                # `factor_product`).
                "a": lambda da: update(x, (FactorTangent(da.array, da.dims), b), y),
                "b": lambda db: update(x, (a, FactorTangent(db.array, db.dims)), y),
            }
            first, *rest = (summands[name](dot) for name, dot in moving.items())
            return functools.reduce(jnp.add, rest, first)

        return y, tangent(primals, moving)

    return product(x, value.frozen, *value.terms[0])
