"""A warning for base weights that a jitted function captures: JAX makes them constants of the compiled program."""

from __future__ import annotations

import warnings

import jax
import numpy as np
from jax.core import Tracer

from lojax.types import Params

LIMIT = 64 * 2**20
"""Bytes of captured base weights that are worth a warning."""


def warn_if_frozen_is_constant(frozen: Params, lora: Params) -> None:
    """Warns if ``lora`` is traced into a program while ``frozen`` is large and concrete, as if captured by a jit.

    JAX copies captured arrays into the program: two 2048 x 2048 weights make 67 MB of program text and a multiple of
    the compilation time (``benchmarks/results/frozen_argument.md``).

    `jax.grad`, `jax.vmap` and the like outside of jit do not warn. `jax.eval_shape`, and `jax.lax.scan` or
    `jax.checkpoint` around ``apply`` outside of jit, are traced like a jit and cannot be told from it, so they warn
    although nothing is copied; passing ``frozen`` as an argument is right there too.

    Args:
        frozen: The frozen tree, as passed to ``apply``.
        lora: The trained tree, as passed to ``apply``.
    """
    if getattr(jax.config, "jax_use_simplified_jaxpr_constants", False):
        return  # JAX then passes captured arrays as arguments; off by default up to JAX 0.12
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(lora)):
        return
    arrays = [leaf for leaf in jax.tree.leaves(frozen) if isinstance(leaf, (jax.Array, np.ndarray))]
    size = sum(array.nbytes for array in arrays if not isinstance(array, Tracer))
    if size >= LIMIT and _is_staging():
        # The location is this line, so Python's default filter prints the warning once.
        warnings.warn(
            f"frozen ({size / 2**20:,.0f} MiB) is captured by the function that is traced here, so under jit the base "
            "is copied into the compiled program, which makes compilation slow and the program large. "
            "Pass it as an argument: jax.jit(lambda frozen, lora, x: model.apply(frozen, lora, x)).",
            stacklevel=1,
        )


def _is_staging() -> bool:
    # Every operation inside of a jit is staged into its program, even on constants. Outside, grad and vmap compute with
    # constants at once (omnistaging, JEP 4410). No public function tells which of the two it is, so this looks at a
    # result. The price is one dead equation in a program that is about to have 64 MiB of constants.
    return isinstance(jax.lax.stop_gradient(np.float32(0)), Tracer)
