"""The forms of `product_form` for a GPU: the frozen product and the thin ones stay separate products.

XLA merges products that share an operand, ``x . w`` and ``z . a`` into ``x . [w | a]``. For that it copies the weight
at every step, and cuts the result in two. A barrier before one of the two prevents it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lojax.lowrank import product_form
from lojax.lowrank.product_form import Form
from lojax.types import Array


def product(x: Array, h: Array, w: Array, b: Array, *, form: Form) -> Array:
    """``x . w + h . b``."""
    return product_form.product(lax.optimization_barrier(x), h, w, b, form=form)


def cotangent(
    cotangents: Sequence[Array], fixed: dict[str, Any], moving: dict[str, Any], forms: Sequence[Form]
) -> dict[str, Any]:
    """The transpose of `product_form.tangent`."""
    x = moving["x"]
    if x is None:
        return product_form.cotangent(cotangents, fixed, moving, forms)
    # The update's part of the cotangent of x is that of z, as if z were another array.
    separate = moving | {"x": None, "z": x if moving["z"] is None else moving["z"]}
    results = product_form.cotangent(cotangents, fixed, separate, forms)
    summands = []
    for g, w, form in zip(cotangents, fixed["w"], forms, strict=True):
        transposed = jax.linear_transpose(functools.partial(form.frozen, w=w), x)
        summands += transposed(lax.optimization_barrier(g))
    if moving["z"] is None:
        summands.append(results["z"])
        results["z"] = None
    return results | {"x": functools.reduce(jnp.add, summands)}
