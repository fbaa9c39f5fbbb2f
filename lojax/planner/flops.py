"""The floating-point operations of a traced program, loops counted as often as they turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from lojax.compat import opened


def count_flops(f: Callable[..., Any], *args: Any) -> int:
    """The operations of all products in ``f(*args)``, over all chips together. Shapes are enough.

    A ``while`` whose trips are not known counts once; of a ``cond`` the dearest branch counts.

    >>> x = jax.ShapeDtypeStruct((3, 3), "float32")
    >>> count_flops(lambda x, y: x @ y, x, x)
    54
    """
    return _count(jax.make_jaxpr(f)(*args))


def _count(jaxpr: Any) -> int:
    body, _ = opened(jaxpr)
    return sum(_equation(eqn) for eqn in body.eqns)


def _equation(eqn: Any) -> int:
    p, name = eqn.params, eqn.primitive.name
    if name == "dot_general":
        (summed, _), _ = p["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in summed)
    if name == "moving_product":  # by name of axis, see `lojax.lowrank.factor_product`
        named = [
            zip(p[dims], v.aval.shape, strict=True) for dims, v in zip(("x_dims", "y_dims"), eqn.invars, strict=True)
        ]
        return 2 * math.prod(dict(pair for axes in named for pair in axes).values())
    if name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval.shape, p["dimension_numbers"].rhs_spec
        return 2 * eqn.outvars[0].aval.size * math.prod(kernel[d] for d in spec[1:])
    if name == "cond":
        return max(_count(branch) for branch in p["branches"])
    inner = sum(_count(value) for value in p.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr"))
    return inner * (p["length"] if name == "scan" else 1)
