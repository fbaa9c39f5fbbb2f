"""What may be a leaf of a parameter tree: an array, a number, or None."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import unbox
from lojax.text import spec
from lojax.types import Array, Leaf, Path


def check_finite(path: Path, weight: Array, purpose: str, remedy: str) -> None:
    """Raises if a weight holds NaN or infinity. Tracers and shapes have no values, and pass.

    Args:
        path: Where it is.
        weight: The weight.
        purpose: What needs finite values, for the error.
        remedy: What to do instead.
    """
    if isinstance(weight, (Tracer, jax.ShapeDtypeStruct)):
        return
    # Of the weight itself: what is computed of it, such as the largest value of a block, may pass over a NaN.
    bad = int(jnp.sum(~jnp.isfinite(weight)))
    if bad:
        raise ValueError(
            f"{path}: {bad} of the {weight.size} entries of the weight are not finite, and {purpose}. {remedy}"
        )


def check_leaf(path: Path, leaf: Leaf, tree: str) -> None:
    """Raises unless ``leaf`` can be a parameter.

    Args:
        path: Where it is.
        leaf: The leaf, in a box or not.
        tree: What errors call the tree.

    Raises:
        TypeError: It is an adapter, neither an array nor a number, or of a kind that JAX does not take.

    >>> check_leaf("config/name", "bert", "params")
    Traceback (most recent call last):
        ...
    TypeError: config/name: params holds 'bert' (str), which is neither an array nor a number. Take it out of the tree.
    """
    value = unbox(leaf)
    if is_adapter(value):
        hint = (
            "Were frozen and lora swapped?"
            if tree == "frozen"
            else "Pass the parameters of the net, or make them with lojax.merge(frozen, lora)."
        )
        raise TypeError(f"{path}: {tree} holds an adapter, which belongs in lora. {hint}")
    if value is None or isinstance(value, jax.Array):
        return
    # NumPy's kinds of objects, strings, bytes and dates; the extended dtypes of JAX (keys) have no kind.
    is_number = isinstance(value, numbers.Number)
    if not (is_number or hasattr(value, "dtype")) or getattr(getattr(value, "dtype", None), "kind", "V") in "OUSMm":
        text = repr(value)
        text = text if len(text) <= 80 else text[:80] + "…"
        raise TypeError(
            f"{path}: {tree} holds {text} ({type(value).__name__}), which is neither an array nor a number. "
            "Take it out of the tree."
        )
    if is_number or isinstance(value, (np.ndarray, np.generic)):
        try:
            jax.typeof(value)
        except (TypeError, ValueError):
            # Left to JAX, the error would name the place of an argument ("leaves[0]") and print the whole array.
            described = f"{type(value).__name__} {spec(value)}" if hasattr(value, "dtype") else repr(value)
            raise TypeError(
                f"{path}: {tree} holds {described}, which JAX does not take as an array. Convert it, such as with "
                "np.asarray(x, np.float32), or take it out of the tree."
            ) from None
