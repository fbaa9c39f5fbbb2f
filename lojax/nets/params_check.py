"""What the nets that hold their own parameters share: the check of a tree given in their place, and ``method=``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten


def fit(given: Any, held: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The leaves of ``given`` by path, or an error that names the first that does not fit what is held.

    Args:
        given: A parameter tree.
        held: The parameters that the net holds, by path (see `lojax.adapters.paths.flatten`).
        what: The net, for the error.

    Raises:
        ValueError: A parameter is missing, unknown, or of another shape.
    """
    leaves = {path: leaf for path, leaf in flatten(given).items() if leaf is not None}
    missing = [path for path in held if path not in leaves]
    if missing:
        raise ValueError(
            f"params lacks {missing[0]} (shape {jnp.shape(held[missing[0]])}): {len(missing)} of the {len(held)} "
            f"parameters of {what} are missing. Pass model.params, or a tree of the same structure."
        )
    for path, leaf in leaves.items():
        if path not in held:
            raise ValueError(f"params holds {path}, which {what} does not. Pass model.params, or a tree like it.")
        got, expected = jnp.shape(unbox(leaf)), jnp.shape(held[path])
        if got != expected:
            raise ValueError(
                f"{path}: expected shape {expected}, as in {what}, got {got}. Were these params made for another net?"
            )
    return leaves


def call(net: Any, method: Any, args: Any, kwargs: Any) -> Any:
    """``net(*args, **kwargs)``, or its ``method``: a name, or a function that takes the net first."""
    if method is None:
        return net(*args, **kwargs)
    if isinstance(method, str):
        return getattr(net, method)(*args, **kwargs)
    return getattr(method, "__func__", method)(net, *args, **kwargs)
