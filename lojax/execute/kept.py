"""`kept`: the identity, as an operation that XLA does not look through on a CPU and never sees elsewhere."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

kept_p = Primitive("kept")
"""The primitive of `kept`."""


def kept(x: Any) -> Any:
    """``x``. On a CPU, XLA joins nothing before it with what comes after it: a `jax.lax.reduce_precision` to the
    precision that ``x`` has, which reduces nothing.
    """
    return kept_p.bind(x)


def _reduced_to_its_own(x: Any) -> Any:
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


kept_p.def_impl(lambda x: x)
kept_p.def_abstract_eval(lambda x: x)
ad.deflinear2(kept_p, lambda cotangent, _: [kept(cotangent)])
batching.defvectorized(kept_p)
mlir.register_lowering(kept_p, lambda ctx, x: [x])
mlir.register_lowering(kept_p, mlir.lower_fun(_reduced_to_its_own, multiple_results=False), platform="cpu")
