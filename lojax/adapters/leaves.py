"""What may be a leaf of a parameter tree: an array, a number, or None."""

from __future__ import annotations

import numbers

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import unbox
from lojax.types import Leaf, Path


def check_leaf(path: Path, leaf: Leaf, tree: str) -> None:
    """Raises unless ``leaf`` can be a parameter.

    Args:
        path: Where it is.
        leaf: The leaf, in a box or not.
        tree: What errors call the tree.

    Raises:
        TypeError: It is an adapter, or neither an array nor a number.

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
    if value is None or isinstance(value, numbers.Number):
        return
    # NumPy's kinds of objects, strings, bytes and dates; the extended dtypes of JAX (keys) have no kind.
    if not hasattr(value, "dtype") or getattr(value.dtype, "kind", "V") in "OUSMm":
        text = repr(value)
        text = text if len(text) <= 80 else text[:80] + "…"
        raise TypeError(
            f"{path}: {tree} holds {text} ({type(value).__name__}), which is neither an array nor a number. "
            "Take it out of the tree."
        )
