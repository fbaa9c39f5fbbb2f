"""The forms of `product_form` for a TPU: the rank is appended to the contraction.

    x . w + h . b  =  [x | h] . [w ; b]            g . w^T + u . a^T  =  [g | u] . [w^T ; a^T]

XLA's TPU compiler fuses the concatenations into the product: x and w are read once, the result is written once, and
there is no addition (`benchmarks/layer_cost.py --tpu v5e`). A GPU or a CPU would copy x and w.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lojax.lowrank import product_form
from lojax.lowrank.factor_product import FactorTangent
from lojax.lowrank.named_array import RANK, Name, NamedArray, axis_lengths, multiply
from lojax.lowrank.product_form import Dims, Form
from lojax.types import Array

MIN_TOKENS = 128
"""With fewer tokens than these the weight is the traffic, and a product of its own for the update costs nothing."""


def product(x: Array, h: Array, w: Array, b: Array, *, form: Form) -> Array:
    """``x . w + h . b``."""
    left, right = NamedArray(x, form.x), NamedArray(w, form.w)
    joined = join(left, right, NamedArray(h, form.h), NamedArray(b, form.b), form.out, form)
    if joined is None:
        return product_form.product(x, h, w, b, form=form)
    return form.frozen(*joined)


def cotangent(
    cotangents: Sequence[Array], fixed: dict[str, Any], moving: dict[str, Any], forms: Sequence[Form]
) -> dict[str, Any]:
    """The transpose of `product_form.tangent`."""
    if moving["x"] is None or moving["z"] is not None:
        return product_form.cotangent(cotangents, fixed, moving, forms)
    # All but the cotangent of x is as it is written out. Of x it computes one as well, which XLA removes.
    results = product_form.cotangent(cotangents, fixed, moving, forms)
    summands = []
    for i, (g, form) in enumerate(zip(cotangents, forms, strict=True)):
        u = form.multiply(g.astype(form.kind), form.out, FactorTangent(fixed["b"][i], form.b), form.h)
        left, right = NamedArray(g, form.out), NamedArray(fixed["w"][i], form.w)
        joined = join(left, right, NamedArray(u, form.h), NamedArray(fixed["a"][i], form.a), form.x, form)
        if joined is None:
            return results
        g_u, w_a = NamedArray(joined[0], form.out), NamedArray(joined[1], form.w)
        summands.append(multiply(g_u, w_a, form.x, precision=form.precision, dtype=moving["x"].dtype).array)
    return results | {"x": functools.reduce(jnp.add, summands)}


def join(
    x: NamedArray, w: NamedArray, h: NamedArray, b: NamedArray, out: Dims, form: Form
) -> tuple[Array, Array] | None:
    """``[x | h]`` and ``[w ; b]``, or None where the rank cannot be appended to the contraction."""
    summed = [d for d in x.dims if d in w.dims and d not in out]
    if len(summed) != 1 or x.array.dtype != w.array.dtype or x.array.dtype != jnp.dtype(form.kind):
        return None
    lengths = axis_lengths(x, w)
    if math.prod(n for d, n in lengths.items() if d in x.dims and d not in w.dims) < MIN_TOKENS:
        return None
    name: dict[Name, Name] = {RANK: summed[0]}
    h, b = h.rename(name), b.rename(name)
    if {*h.dims} != {*x.dims} or {*b.dims} != {*w.dims}:
        return None
    x_h, w_b = (
        jnp.concatenate([v.array, more.transpose_to(v.dims).array.astype(v.array.dtype)], v.axis(summed[0]))
        for v, more in ((x, h), (w, b))
    )
    return x_h, w_b
