"""The cost model: which strategy computes a product with an adapted weight, decided in one place for each use.

T tokens, m in, n out, rank r. Floating-point operations, forward and backward with dA, dB and dx together:

| strategy      | operations                     | beyond the activations                       |
|---------------|--------------------------------|----------------------------------------------|
| factored      | 4Tmn + 6Tr(m + n)              | a second array of the size of the result     |
| fused         | 4Tmn + 4Tr(m + n) + 4mnr       | one array of the size of the weight          |
| kernel        | as factored                    | nothing                                      |
| materialize   | 6Tmn + 6mnr                    | two of the size of the weight: it, its grad. |

An `execution` is what the user asks for, a strategy what is chosen for one use. ``execution="auto"`` chooses the fused
product where it is as exact and costs less, and the factored one otherwise. As exact means: weight, activation and
result are in float32 or wider *and* products are computed in float32, which a GPU or a TPU only does at
`jax.lax.Precision.HIGHEST`. In bfloat16 the sum ``W0 + s A B`` loses most of a small update (78 % of the entries do not
change where the update is a thousandth of the weight). Costs less means: fewer operations, ``T > 2mn / (m + n)``, with
a margin for the memory and the time that materializing the weight takes.

All of it is computed from static shapes. The axes that `jax.vmap` adds around the program are not visible: to run many
adapters on one input, ask for ``"factored"``.
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

Strategy = Literal["factored", "fused", "kernel", "materialize"]
EXECUTIONS = ("auto", "factored", "fused", "kernel", "materialize")
"""What a user may pass as ``execution``."""

MARGIN = 1.25
"""The fused product must save this many times the operations that materializing the weight takes, because those run at
the speed of memory and not at that of the matrix units (`benchmarks/layer_cost.py`)."""


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
        >>> [round(layer.flops(s) / (2 * layer.base), 3) for s in ("factored", "fused", "materialize")]
        [1.012, 1.01, 1.503]
        """
        if strategy in ("factored", "kernel"):
            return 2 * self.base + 3 * self.low_rank
        if strategy == "fused":
            return 2 * self.base + 2 * self.low_rank + 2 * self.materializing
        return 3 * self.base + 3 * self.materializing


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with an adapted weight: its value, and what its update costs.

    Attributes:
        value: The product.
        flops: Floating-point operations of the frozen product.
        extra_flops: Floating-point operations that the update added.
        extra_bytes: Bytes of the intermediate arrays of the update.
        strategy: The strategy that computed it.
        no_kernel: Why a product that could have been computed by a kernel was not, or "".
    """

    value: Array
    flops: int
    extra_flops: int
    extra_bytes: int
    strategy: Strategy = "factored"
    no_kernel: str = ""


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
    """The strategy for a product that can be factored or fused.

    Args:
        execution: What the user asked for, other than ``"materialize"``, which the interpreter handles.
        work: The size of the product.
        dtypes: Those of the weight, the activation and the result.
        precision: As in `jax.lax.dot_general`.
    """
    if execution != "auto":
        return "fused" if execution == "fused" else "factored"
    if not exact(dtypes, precision, jax.default_backend()):
        return "factored"
    # fused < factored is 4mnr < 2Tr(m + n) by the table above: 2 materializing < low_rank.
    return "fused" if work.low_rank >= 2 * MARGIN * work.materializing else "factored"


def exact(dtypes: tuple[Dtype, ...], precision: Precision, platform: str) -> bool:
    """Whether rounding ``W0 + s A B`` to the dtype of the weight loses no more than the product itself does.

    >>> exact((jnp.float32,) * 3, None, "cpu"), exact((jnp.float32,) * 3, None, "tpu")
    (True, False)
    """
    if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        return False
    # Float64 products run in float64 everywhere; below float32 the sum W0 + s A B is rounded too coarsely.
    bits = min(jnp.finfo(dtype).bits for dtype in dtypes)
    if bits != 32:
        return bits > 32
    both = precision if isinstance(precision, tuple) else (precision, precision)
    return platform == "cpu" or all(p == lax.Precision.HIGHEST for p in both)
