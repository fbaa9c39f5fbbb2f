"""The products of `product_form` as primitives, which each device computes in its own form.

| device | x . w + h . b                                                                                  |
|--------|------------------------------------------------------------------------------------------------|
| CPU    | two products and an addition                                                                   |
| GPU    | the same, not merged (`unmerged`); the second as a sum over r, which XLA fuses into the        |
|        | addition (`factor_product`)                                                                    |
| TPU    | one product, the rank appended to the contraction (`joined_rank`)                              |
| either, `Form.kernel` | a kernel (`kernel_forms`)                                                       |

The forms for a TPU and the kernels are for programs of one device: a partitioner does not see through them.

The device is asked for when a program is lowered, so that one traced program serves all of them. A policy of
`jax.checkpoint` is asked about a product as if it were its `dot_general`: what it saves is ``x . w + h . b``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lojax.compat import device_count, result_types, save_as_if
from lojax.lowrank import joined_rank, kernel_forms, product_form, unmerged
from lojax.lowrank.product_form import Form
from lojax.types import Array

Computation = Callable[..., Any]
Platform = Literal["cuda", "tpu"]
KERNELS: dict[Platform, kernel_forms.Lowering] = {"cuda": "triton", "tpu": "mosaic"}
"""Who compiles the kernels for a platform."""


def product(x: Array, h: Array, w: Array, b: Array, form: Form) -> Array:
    """`product_form.product`."""
    return product_p.bind(x, h, w, b, form=form)


def tangent(moving: dict[str, Any], fixed: dict[str, Any], forms: tuple[Form, ...]) -> list[Array]:
    """`product_form.tangent`."""
    (linear, linear_tree), (rest, rest_tree) = jax.tree.flatten(moving), jax.tree.flatten(fixed)
    return tangent_p.bind(*linear, *rest, trees=(linear_tree, rest_tree), forms=forms)


product_p = Primitive("lojax_adapted_product")
tangent_p = Primitive("lojax_adapted_product_tangent")
tangent_p.multiple_results = True
cotangent_p = Primitive("lojax_adapted_product_cotangent")
cotangent_p.multiple_results = True
ADAPTED_PRODUCTS = (product_p, tangent_p, cotangent_p)
"""Their ``impl`` writes them out."""


def _tangent(*operands: Array, trees: Any, forms: tuple[Form, ...]) -> list[Array]:
    return product_form.tangent(*_unflatten(operands, trees), forms)


def _cotangent(
    *operands: Array, trees: Any, types: tuple[Any, ...], forms: tuple[Form, ...], compute: Computation
) -> list[Array]:
    count = len(forms)
    fixed = jax.tree.unflatten(trees[1], operands[count:])
    return jax.tree.leaves(compute(operands[:count], fixed, jax.tree.unflatten(trees[0], types), forms))


def _unflatten(operands: Sequence[Any], trees: Any) -> tuple[Any, Any]:
    count = trees[0].num_leaves
    return jax.tree.unflatten(trees[0], operands[:count]), jax.tree.unflatten(trees[1], operands[count:])


def _transpose_tangent(cotangents: Sequence[Any], *operands: Any, trees: Any, forms: tuple[Form, ...]) -> list[Any]:
    # A tree takes the type of an operand as a leaf, and would look into an `UndefinedPrimal`.
    moving, fixed = _unflatten([_type(v) if ad.is_undefined_primal(v) else v for v in operands], trees)
    live = [i for i, g in enumerate(cotangents) if not isinstance(g, ad.Zero)]
    # Of the weights whose product nothing reads, the factors have no cotangent.
    of_live = lambda tree: {name: [v[i] for i in live] if isinstance(v, list) else v for name, v in tree.items()}
    linear, linear_tree = jax.tree.flatten(of_live(moving))
    rest, rest_tree = jax.tree.flatten(of_live(fixed))
    results = cotangent_p.bind(
        *(cotangents[i] for i in live),
        *rest,
        trees=(linear_tree, rest_tree),
        types=tuple(linear),
        forms=tuple(forms[i] for i in live),
    )
    by_live = jax.tree.unflatten(linear_tree, results)
    spread = {}
    for name, types in moving.items():
        if isinstance(types, list):
            found = dict(zip(live, by_live[name], strict=True))
            spread[name] = [v if v is None else found.get(i, _zero(v)) for i, v in enumerate(types)]
        else:
            spread[name] = by_live[name]
    # `ad.Zero` is a leaf, and so is each result.
    return [*jax.tree.leaves(spread, is_leaf=lambda v: isinstance(v, ad.Zero)), *[None] * trees[1].num_leaves]


def _type(operand: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(operand.aval.shape, operand.aval.dtype)


def _zero(type: Any) -> ad.Zero:
    return ad.Zero(ShapedArray(type.shape, type.dtype))


def _transpose_cotangent(
    cotangents: Sequence[Any], *operands: Any, trees: Any, types: tuple[Any, ...], forms: tuple[Form, ...]
) -> list[Any]:
    moving = jax.tree.unflatten(trees[0], [None if isinstance(t, ad.Zero) else t for t in cotangents])
    fixed = jax.tree.unflatten(trees[1], operands[len(forms) :])
    return [*tangent(moving, fixed, forms), *[None] * trees[1].num_leaves]


def _register(p: Primitive, plain: Computation, choose: Callable[[Platform, dict[str, Any]], Computation]) -> None:
    """Everything but the transpose."""
    several = p.multiple_results

    @functools.lru_cache(maxsize=4096)
    def types(*avals: Any, **params: Any) -> Any:
        results = result_types(functools.partial(plain, **params), *avals)
        return results if several else results[0]

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
        moving = [i for i, dot in enumerate(tangents) if not isinstance(dot, ad.Zero)]

        def along(*values: Array) -> Any:
            operands = list(primals)
            for i, value in zip(moving, values, strict=True):
                operands[i] = value
            return plain(*operands, **params)

        return jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])

    def batch(operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> Any:
        results = jax.vmap(functools.partial(plain, **params), in_axes=tuple(axes))(*operands)
        return (results, [0] * len(results)) if several else (results, 0)

    def lower_for(platform: Platform) -> Any:
        def lower(context: Any, *operands: Any, **params: Any) -> Any:
            # The partitioner would shard a joined axis, and move activations for it; and it does not divide a kernel.
            compute = plain if device_count(context) > 1 else choose(platform, params)
            return mlir.lower_fun(compute, multiple_results=several)(context, *operands, **params)

        return lower

    p.def_impl(plain)
    p.def_abstract_eval(types)
    ad.primitive_jvps[p] = jvp
    batching.primitive_batchers[p] = batch
    mlir.register_lowering(p, mlir.lower_fun(plain, multiple_results=several))
    for platform in ("cuda", "tpu"):
        mlir.register_lowering(p, lower_for(platform), platform=platform)


def _choose_product(platform: Platform, params: dict[str, Any]) -> Computation:
    if params["form"].kernel:
        return functools.partial(kernel_forms.product, lowering=KERNELS[platform])
    return joined_rank.product if platform == "tpu" else unmerged.product


def _choose_cotangent(platform: Platform, params: dict[str, Any]) -> Computation:
    compute = joined_rank.cotangent if platform == "tpu" else unmerged.cotangent
    if params["forms"][0].kernel:  # all of a group are, or none
        compute = functools.partial(kernel_forms.cotangent, lowering=KERNELS[platform])
    return functools.partial(_cotangent, compute=compute)


_register(product_p, product_form.product, _choose_product)
_register(tangent_p, _tangent, lambda platform, params: _tangent)
_register(cotangent_p, functools.partial(_cotangent, compute=product_form.cotangent), _choose_cotangent)
ad.primitive_transposes[tangent_p] = _transpose_tangent
ad.primitive_transposes[cotangent_p] = _transpose_cotangent


def _as_dot_general(types: Sequence[Any], params: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    form: Form = params["form"]
    x, _, w, _ = types
    return lax.dot_general_p, (w, x) if form.weight_on_left else (x, w), dict(form.dot)


save_as_if(product_p, _as_dot_general)
