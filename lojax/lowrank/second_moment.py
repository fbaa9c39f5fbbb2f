"""Watching the inputs of weights: second moments of activations, by the means of a gradient.

For a weight whose input is ``x`` (rows are tokens), the gradient of ``|x a|^2 / 2`` with respect to ``a`` is
``x^T x a``: the second moment of the input on the columns of ``a``, summed over tokens, uses, trips of a scan and
shards, and as large as ``a``. `echo` is the identity whose cotangent is its own value, whatever the cotangent that
comes in; put after ``x a`` it makes any gradient with respect to ``a`` that moment.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lojax.adapters.adapter import Adapter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watching(Adapter):
    """An adapter with ``b = 0`` that leaves the net as it is, and whose gradient is ``x^T x a`` for ``a``."""


@jax.custom_vjp
def echo(x: Any) -> Any:
    """``x``, with ``x`` as its cotangent."""
    return x


echo.defvjp(lambda x: (x, x), lambda x, _: (x,))
