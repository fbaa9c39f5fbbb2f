"""Products of one activation with a group of adapted weights, written out.

For each weight of a group, x [T, m], w [m, n], a [m, r], b [r, n]; z is the input of the updates, mostly x itself:

    product      y = x . w + h . b                                      h = z . a
    tangent      dy = dx . w + (dz . a + z . da) . b + h . db
    cotangent    x_bar = g . w^T, z_bar = u . a^T, a_bar = z^T . u, b_bar = h^T . g        u = g . b^T

The last is the transpose of the second. These are the forms for a CPU; `product_primitives` has those of other devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lojax.lowrank.factor_product import FactorTangent
from lojax.lowrank.factored import multiply_factor
from lojax.lowrank.named_array import RANK, Name, NamedArray, Precision, cast
from lojax.types import Array, Dtype

Dims = tuple[Name, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static in the product of an activation with an adapted weight.

    Attributes:
        x: The names of the axes of the activation.
        w: Those of the weight: an axis that is summed, or shared with a batch, is called as in ``x``.
        a: Those of the first factor.
        b: Those of the second factor.
        out: Those of the result.
        dot: The parameters of the frozen product, a `jax.lax.dot_general`.
        weight_on_left: Whether its left operand is the weight.
        kind: The dtype of the products with factors.
        result: The dtype of the result.
        kernel: Whether devices that have kernels for it use them (see `kernel_forms`).
    """

    x: Dims
    w: Dims
    a: Dims
    b: Dims
    out: Dims
    dot: tuple[tuple[str, Any], ...]
    weight_on_left: bool
    kind: Dtype
    result: Dtype
    kernel: bool = False

    @property
    def summed(self) -> list[Name]:
        """The axes that the frozen product sums."""
        return [d for d in self.x if d in self.w and d not in self.out]

    @property
    def h(self) -> Dims:
        """The names of the axes of ``z . a``."""
        return (*(d for d in dict.fromkeys((*self.x, *self.a)) if d not in self.summed and d != RANK), RANK)

    @property
    def precision(self) -> Precision:
        """That of the activation and a factor, in this order."""
        precision: Precision = dict(self.dot)["precision"]
        return precision[::-1] if self.weight_on_left and isinstance(precision, tuple) else precision

    def multiply(self, x: Array, dims: Dims, factor: NamedArray, out: Dims) -> Array:
        """The product of ``x``, whose axes are ``dims``, with a factor."""
        dtype = dict(self.dot)["preferred_element_type"]
        return multiply_factor(NamedArray(x, dims), factor, out, self.kind, precision=self.precision, dtype=dtype)

    def frozen(self, x: Array, w: Array) -> Array:
        """``x . w``."""
        return lax.dot_general(*((w, x) if self.weight_on_left else (x, w)), **dict(self.dot))

    def update(self, h: Array, b: Array) -> Array:
        """``h . b``, in the dtype of the result."""
        # Marked as in a tangent: a product over the rank, which a GPU computes in another form.
        return self.multiply(h, self.h, FactorTangent(b, self.b), self.out).astype(self.result)


def project_down(z: Array, factors: Sequence[NamedArray], forms: Sequence[Form]) -> list[Array]:
    """``h = z . a`` for each factor: one product with all of them side by side."""
    form = forms[0]
    if len(factors) == 1:
        return [form.multiply(z, form.x, factors[0], form.h)]
    joined = jnp.concatenate([cast(factor, form.kind).array for factor in factors], factors[0].axis(RANK))
    # `replace` returns an object of the same class, `FactorTangent` for tangents.
    inner = form.multiply(z, form.x, dataclasses.replace(factors[0], array=joined), form.h)
    return list(lax.split(inner, [factor.size(RANK) for factor in factors], axis=inner.ndim - 1))


def product(x: Array, h: Array, w: Array, b: Array, *, form: Form) -> Array:
    """``x . w + h . b``."""
    return form.frozen(x, w) + form.update(h, b)


def tangent(moving: dict[str, Any], fixed: dict[str, Any], forms: Sequence[Form]) -> list[Array]:
    """The tangent of each product.

    Args:
        moving: The tangents ``x``, ``z`` (None: that of x) and, of each weight, ``a`` and ``b``; None for zero.
        fixed: ``z`` (None if no ``a`` moves) and of each weight ``h``, ``w``, ``a`` and ``b``.
        forms: What is static of each.
    """
    x_dot = moving["x"]
    z_dot = x_dot if moving["z"] is None else moving["z"]
    h_dots: list[list[Array]] = []
    if z_dot is not None:
        # Marked, like tangents of factors: in the transpose these are products over the rank.
        h_dots.append(
            project_down(z_dot, [FactorTangent(v, f.a) for v, f in zip(fixed["a"], forms, strict=True)], forms)
        )
    if any(dot is not None for dot in moving["a"]):
        # All factors are multiplied at once, so one without a tangent gets zeros.
        pairs = zip(fixed["a"], moving["a"], forms, strict=True)
        moved = [FactorTangent(jnp.zeros_like(v) if dot is None else dot, f.a) for v, dot, f in pairs]
        h_dots.append(project_down(fixed["z"], moved, forms))
    results = []
    for i, form in enumerate(forms):
        terms = [] if x_dot is None else [form.frozen(x_dot, fixed["w"][i])]
        if h_dots:
            # dz . a + z . da is summed before the product with b: one product instead of two, and in the transpose one
            # g . b^T, which serves the cotangents of z and of a.
            terms.append(form.update(functools.reduce(jnp.add, [h[i] for h in h_dots]), fixed["b"][i]))
        if moving["b"][i] is not None:
            terms.append(form.update(fixed["h"][i], moving["b"][i]))
        if not terms:
            zero = jax.eval_shape(form.update, fixed["h"][i], fixed["b"][i])
            terms.append(jnp.zeros(zero.shape, zero.dtype))
        results.append(functools.reduce(jnp.add, terms))
    return results


def cotangent(
    cotangents: Sequence[Array], fixed: dict[str, Any], moving: dict[str, Any], forms: Sequence[Form]
) -> dict[str, Any]:
    """The transpose of `tangent`: a cotangent for each leaf of ``moving``, which holds their types."""
    (result,) = jax.linear_transpose(lambda moving: tangent(moving, fixed, forms), moving)(list(cotangents))
    return result
