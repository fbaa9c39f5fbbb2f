"""Products of one activation with a group of adapted weights, and their derivative."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from lojax.lowrank import product_primitives
from lojax.lowrank.factor_product import is_symbolic_zero
from lojax.lowrank.named_array import NamedArray
from lojax.lowrank.product_form import Form, project_down
from lojax.types import Array


def adapted_products(
    x: Array, z: Array | None, weights: Sequence[Array], factors: Sequence[tuple[Array, Array]], forms: Sequence[Form]
) -> list[Array]:
    """``x . w + (z . a) . b`` for each weight.

    Args:
        x: The activation.
        z: The input of the updates; None for ``x``.
        weights: The frozen weights.
        factors: ``(a, b)`` of each, the scale included.
        forms: What is static of each. If there are several, each ``a`` is ``[m, r]`` with all of m summed.
    """
    group = tuple(forms)

    def compute(x: Array, z: Array | None, w: Sequence[Array], a: Sequence[Array], b: Sequence[Array]) -> Any:
        h = project_down(x if z is None else z, [NamedArray(v, f.a) for v, f in zip(a, group, strict=True)], group)
        y = [product_primitives.product(x, *operands, form=f) for *operands, f in zip(h, w, b, group, strict=True)]
        return h, y

    # A rule for tangents and not for cotangents: jvp, scan, remat and second derivatives follow from it.
    products = jax.custom_jvp(lambda *operands: compute(*operands)[1])

    # Symbolic zeros, because an array of zeros would be multiplied like any other. Where x has no tangent (a first
    # layer) there is no ``dx . w``; with a frozen a (LoRA-FA) no ``z . da``, whose transpose alone would save z.
    @functools.partial(products.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        x, z, w, a, b = primals
        # In the open: a remat policy is to see these products, and to save those that it would save of the frozen net.
        h, y = compute(*primals)
        x_dot, z_dot = (None if dot is None or is_symbolic_zero(dot) else dot for dot in tangents[:2])
        w_dot, a_dot, b_dot = ([None if is_symbolic_zero(dot) else dot for dot in dots] for dots in tangents[2:])
        moving = {"x": x_dot, "z": z_dot, "a": a_dot, "b": b_dot}
        saved = (x if z is None else z) if any(dot is not None for dot in a_dot) else None
        fixed = {"z": saved, "h": h, "w": [None if x_dot is None else v for v in w], "a": list(a), "b": list(b)}
        y_dot = product_primitives.tangent(moving, fixed, group)
        # W0 itself has no tangent, but a program may multiply it with something that has one.
        moved = [None if dot is None else f.frozen(x, dot) for dot, f in zip(w_dot, group, strict=True)]
        return y, [dot if more is None else dot + more for dot, more in zip(y_dot, moved, strict=True)]

    a, b = zip(*factors, strict=True)
    return products(x, z, list(weights), list(a), list(b))
