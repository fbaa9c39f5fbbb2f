"""The forms of `product_form` as kernels of `lojax.kernels`: ``x . w + h . b`` in one pass over x and w."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lojax.lowrank import product_form
from lojax.lowrank.named_array import RANK, NamedArray
from lojax.lowrank.product_form import Dims, Form
from lojax.types import Array

Lowering = Literal["triton", "mosaic"]
DTYPES = ("bfloat16", "float16", "float32")
"""Of the activation and the weight."""


def unsupported(form: Form, x: Array, w: Array) -> str:
    """Why a product has no kernel, or ""."""
    dtypes = {str(d) for d in (x.dtype, w.dtype, form.kind, form.result)}
    if len(dtypes) > 1 or not dtypes <= {*DTYPES}:
        return f"kernels take one dtype of {list(DTYPES)}, got x {x.dtype}, weight {w.dtype}, result {form.result}"
    if form.precision is not None:
        return f"kernels multiply at the default precision, the program asks for {form.precision}"
    if _matrices(form) is None:
        return "kernels take an activation [T, m] and a weight [m, n] or [n, m], whose axes are in this order"
    return ""


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """The names of the axes of T, m and n, and whether the weight is stored as ``[n, m]``."""

    rows: Dims
    inner: Dims
    columns: Dims
    turned: bool


def _matrices(form: Form) -> _Matrices | None:
    """The matrices that the operands are without a transpose of x or w; None if they are not."""
    inner = tuple(form.summed)
    rows = form.x[: len(form.x) - len(inner)]
    columns = tuple(d for d in form.w if d not in inner)
    in_order = form.x == (*rows, *inner) and form.out == (*rows, *columns) and not {*rows} & {*columns}
    if not in_order or {*form.a} != {*inner, RANK} or {*form.b} != {RANK, *columns}:
        return None
    if form.w not in ((*inner, *columns), (*columns, *inner)):
        return None
    return _Matrices(rows, inner, columns, form.w != (*inner, *columns))


def _matrix(x: Array, dims: Dims, first: Dims, second: Dims) -> Array:
    """``x``, whose axes are ``dims``, as a matrix."""
    moved = NamedArray(x, dims).transpose_to([*first, *second]).array
    return moved.reshape(math.prod(moved.shape[: len(first)]), -1)


def _array(matrix: Array, like: Array, dims: Dims, first: Dims, second: Dims) -> Array:
    """The inverse of `_matrix`, in the shape and dtype of ``like``."""
    length = dict(zip(dims, like.shape, strict=True))
    moved = NamedArray(matrix.reshape([length[d] for d in (*first, *second)]), (*first, *second))
    return moved.transpose_to(dims).array.astype(like.dtype)


def product(x: Array, h: Array, w: Array, b: Array, *, form: Form, lowering: Lowering) -> Array:
    """``x . w + h . b``."""
    from lojax.kernels import pieces  # Pallas takes a while to import

    axes = _matrices(form)
    assert axes is not None
    rows, inner, columns, turned = dataclasses.astuple(axes)
    y = pieces.product_with_update(
        _matrix(x, form.x, rows, inner),
        w.reshape(-1, math.prod(w.shape[len(columns if turned else inner) :])),
        _matrix(h, form.h, rows, (RANK,)),
        _matrix(b, form.b, *((columns, (RANK,)) if turned else ((RANK,), columns))),
        transposed=turned,
        lowering=lowering,
    )
    like = jax.eval_shape(form.frozen, x, w)
    return _array(y, like, form.out, rows, columns)


def cotangent(
    cotangents: Sequence[Array],
    fixed: dict[str, Any],
    moving: dict[str, Any],
    forms: Sequence[Form],
    *,
    lowering: Lowering,
) -> dict[str, Any]:
    """The transpose of `product_form.tangent`."""
    if moving["z"] is not None or fixed["z"] is None:
        return product_form.cotangent(cotangents, fixed, moving, forms)
    results: dict[str, Any] = {"x": None, "z": None, "a": [], "b": []}
    x_bars = []
    for i, (g, form) in enumerate(zip(cotangents, forms, strict=True)):
        w = None if moving["x"] is None else fixed["w"][i]
        h, a, b = (fixed[name][i] for name in "hab")
        x_bar, a_bar, b_bar = _gradients(g, fixed["z"], w, h, a, b, form, lowering)
        x_bars.append(x_bar)
        results["a"].append(None if moving["a"][i] is None else a_bar)
        results["b"].append(None if moving["b"][i] is None else b_bar)
    if moving["x"] is not None:
        results["x"] = functools.reduce(jnp.add, x_bars)
    return results


def _gradients(
    g: Array, x: Array, w: Array | None, h: Array, a: Array, b: Array, form: Form, lowering: Lowering
) -> tuple[Array | None, Array, Array]:
    """The cotangents of ``x`` (None without a ``w``), ``a`` and ``b``."""
    from lojax.kernels import pieces

    axes = _matrices(form)
    assert axes is not None
    rows, inner, columns, turned = dataclasses.astuple(axes)
    rank = (RANK,)
    g2, x2, h2 = _matrix(g, form.out, rows, columns), _matrix(x, form.x, rows, inner), _matrix(h, form.h, rows, rank)
    a2, b2 = _matrix(a, form.a, inner, rank), _matrix(b, form.b, rank, columns)
    x_bar = None
    if w is not None and not turned:
        x_bar, a_bar, b_bar = pieces.gradients(g2, x2, w.reshape(x2.shape[1], -1), h2, a2, b2, lowering=lowering)
    else:
        u, b_bar = pieces.cotangents(g2, h2, b2, lowering=lowering)
        a_bar = pieces.down_cotangent(x2, u, a2)
        if w is not None:
            w2 = w.reshape(-1, x2.shape[1])
            x_bar = pieces.product_with_update(g2, w2, u, a2.T, lowering=lowering)
    x_bar = None if x_bar is None else _array(x_bar, x, form.x, rows, inner)
    return x_bar, _array(a_bar, a, form.a, inner, rank), _array(b_bar, b, form.b, rank, columns)
