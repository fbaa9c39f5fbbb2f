"""The cost model: which way a product with an adapted weight is computed, decided in one place for each use.

T tokens, m in, n out, rank r. Floating-point operations, forward and backward with dA, dB and dx together:

| strategy      | operations                     | beyond the activations                       |
|---------------|--------------------------------|----------------------------------------------|
| factored      | 4Tmn + 6Tr(m + n)              | a second array of the size of the result     |
| fused         | 4Tmn + 4Tr(m + n) + 4mnr       | one array of the size of the weight          |
| materialize   | 6Tmn + 6mnr                    | two of the size of the weight: it, its grad. |

``"auto"`` takes the fused product where it is as exact and costs less, the factored one otherwise. As exact means:
weight, activation and result in float32 or wider *and* products in float32, which a GPU or a TPU only
does at `jax.lax.Precision.HIGHEST`. In bfloat16 the sum ``W0 + s A B`` loses most of a small update (78 % of
the entries do not change where the update is a thousandth of the weight). Costs less means: fewer operations,
``T > 2mn / (m + n)``, with a margin for the room and the time that materializing the weight takes.

Everything is read off static shapes. What `jax.vmap` adds around the program is not seen: to run many adapters on
one input, ask for ``"factored"``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from lojax.lowrank.named_array import Precision
from lojax.text import suggest
from lojax.types import Array, Dtype

Strategy = Literal["factored", "fused", "materialize"]
EXECUTIONS = ("auto", "factored", "fused", "materialize")
"""What a user may ask for."""

MARGIN = 1.25
"""The fused product must save this many times the operations that materializing the weight takes: operations on a
weight-sized array run at the speed of memory and not of the matrix units (`benchmarks/layer_cost.py`)."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The floating-point operations of one product with an adapted weight, forward.

    Attributes:
        base: Of the frozen product, ``2Tmn``.
        low_rank: Of the two products with the factors, ``2Tr(m + n)``.
        materializing: Of the product of the factors, ``2mnr``.
    """

    base: int
    low_rank: int
    materializing: int

    def flops(self, strategy: Strategy) -> int:
        """Forward and backward, with the gradients of both factors and of the activation.

        >>> layer = dense_layer(8192, 4096, 4096, 16)
        >>> [round(layer.flops(way) / (2 * layer.base), 3) for way in ("factored", "fused", "materialize")]
        [1.012, 1.01, 1.503]
        """
        if strategy == "factored":
            return 2 * self.base + 3 * self.low_rank
        if strategy == "fused":
            return 2 * self.base + 2 * self.low_rank + 2 * self.materializing
        return 3 * self.base + 3 * self.materializing


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with an adapted weight: its value, and what the update added to its cost.

    Attributes:
        value: The product.
        flops: Floating-point operations of the frozen product.
        extra_flops: Floating-point operations that the update added.
        extra_bytes: Bytes of the arrays that the update made on the way.
        strategy: How it was computed.
    """

    value: Array
    flops: int
    extra_flops: int
    extra_bytes: int
    strategy: Strategy = "factored"


def dense_layer(tokens: int, m: int, n: int, rank: int) -> Work:
    """The work of ``[T, m] @ [m, n]``."""
    return Work(2 * tokens * m * n, 2 * tokens * rank * (m + n), 2 * m * n * rank)


def check_execution(execution: str, strict: bool) -> str:
    """``execution``, if it is one of `EXECUTIONS` and goes with ``strict``.

    Raises:
        ValueError: It is not, or does not.
    """
    if execution not in EXECUTIONS:
        hint = suggest(execution, EXECUTIONS)
        raise ValueError(f"execution={execution!r} is unknown; expected one of {list(EXECUTIONS)}.{hint}")
    if execution == "materialize" and strict:
        raise ValueError(
            "execution='materialize' materializes every weight, and strict=True forbids that. Leave one of them out."
        )
    return execution


def choose_strategy(execution: str, work: Work, *, dtypes: tuple[Dtype, ...], precision: Precision) -> Strategy:
    """The way to compute a product that can be computed either way.

    Args:
        execution: What the user asked for; ``"materialize"`` is not decided here.
        work: The size of the product.
        dtypes: Those of the weight, the activation and the result.
        precision: As in `jax.lax.dot_general`.
    """
    if execution != "auto":
        return "fused" if execution == "fused" else "factored"
    if not exact(dtypes, precision, jax.default_backend()):
        return "factored"
    return "fused" if work.low_rank >= 2 * MARGIN * work.materializing else "factored"


def exact(dtypes: tuple[Dtype, ...], precision: Precision, platform: str) -> bool:
    """Whether rounding ``W0 + s A B`` to the dtype of the weight loses no more than the product itself does.

    >>> exact((jnp.float32,) * 3, None, "cpu"), exact((jnp.float32,) * 3, None, "tpu")
    (True, False)
    """
    if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        return False
    bits = min(jnp.finfo(dtype).bits for dtype in dtypes)
    if bits != 32:
        return bits > 32
    both = precision if isinstance(precision, tuple) else (precision, precision)
    return platform == "cpu" or all(p == lax.Precision.HIGHEST for p in both)
