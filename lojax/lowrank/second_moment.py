"""Second moments of the inputs of weights, measured by a gradient.

For a weight whose input is ``x`` (rows are tokens), the gradient of ``|x a|^2 / 2`` with respect to ``a`` is
``x^T x a``: the second moment of the input applied to the columns of ``a``, summed over tokens, uses, trips of a scan
and shards, and as large as ``a``.
"""

from __future__ import annotations

import dataclasses

import jax

from lojax.adapters.adapter import Adapter
from lojax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SecondMomentProbe(Adapter):
    """An adapter with ``b = 0``, which does not change the net, and whose gradient for ``a`` is ``x^T x a``."""


@jax.custom_vjp
def second_moment_tap(inner: Array) -> Array:
    """``inner = x a``, unchanged. Its cotangent is its own value, whatever cotangent comes in."""
    return inner


# A rule for cotangents, because no rule for tangents has this transpose: it ignores the cotangent that comes in, which
# with b = 0 would be zero.
second_moment_tap.defvjp(lambda inner: (inner, inner), lambda inner, _: (inner,))
