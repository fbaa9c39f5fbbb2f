"""The floating-point operations of a traced program, with the iterations of its loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax

from lojax.compat import opened, var_type
from lojax.lowrank.product_primitives import ADAPTED_PRODUCTS
from lojax.types import Eqn, Jaxpr, PyTree


def count_flops(f: Callable[..., PyTree], *args: PyTree) -> int:
    """The operations of all products in ``f(*args)``, over all devices together. Shapes are enough.

    The body of a ``while`` counts once, since its iterations are unknown; a ``cond`` counts its most expensive branch.

    >>> x = jax.ShapeDtypeStruct((3, 3), "float32")
    >>> count_flops(lambda x, y: x @ y, x, x)
    54
    """
    return _count(jax.make_jaxpr(f)(*args))


def _count(jaxpr: Jaxpr) -> int:
    body, _ = opened(jaxpr)
    return sum(_count_equation(eqn) for eqn in body.eqns)


def _count_equation(eqn: Eqn) -> int:
    p, name = eqn.params, eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = p["dimension_numbers"]
        lhs = var_type(eqn.invars[0]).shape
        return 2 * math.prod(var_type(eqn.outvars[0]).shape) * math.prod(lhs[d] for d in contracted)
    if {"x_dims", "y_dims"} <= p.keys():  # a product over named axes, see `lojax.lowrank.factor_product`
        length_by_name = {}
        for dims, var in zip((p["x_dims"], p["y_dims"]), eqn.invars, strict=True):
            length_by_name |= dict(zip(dims, var_type(var).shape, strict=True))
        return 2 * math.prod(length_by_name.values())
    if eqn.primitive in ADAPTED_PRODUCTS:
        written_out = functools.partial(eqn.primitive.impl, **p)
        return _count(jax.make_jaxpr(written_out)(*map(var_type, eqn.invars)))
    if name == "conv_general_dilated":
        kernel, spec = var_type(eqn.invars[1]).shape, p["dimension_numbers"].rhs_spec
        return 2 * math.prod(var_type(eqn.outvars[0]).shape) * math.prod(kernel[d] for d in spec[1:])
    if name == "cond":
        return max(_count(branch) for branch in p["branches"])
    inner = sum(_count(value) for value in p.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr"))
    return inner * (p["length"] if name == "scan" else 1)
