"""What nets that hold their own parameters share: the check of a tree passed in their place, and ``method=``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from lojax.adapters.adapter import is_adapter
from lojax.adapters.leaves import check_leaf
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.text import suggest
from lojax.types import Leaf, Params, Path, PyTree

Method: TypeAlias = str | Callable[..., PyTree] | None
"""The method of a net to call: its name, or a function that takes the net first; None calls the net itself."""


def check_params(
    params: Params, expected: Mapping[Path, Leaf], net_name: str, *, optional: Collection[Path] = ()
) -> dict[Path, Leaf]:
    """The leaves of ``params`` by path, or an error that names the first one that does not fit the net.

    Args:
        params: A parameter tree.
        expected: The parameters that the net holds, by path (see `lojax.adapters.paths.flatten`).
        net_name: What the error calls the net.
        optional: Those of the expected paths that need not be there.

    Raises:
        TypeError: A leaf is an adapter, or neither an array nor a number.
        ValueError: A parameter is missing, unknown, or of another shape.
    """
    leaves = {path: leaf for path, leaf in flatten(params).items() if leaf is not None}
    for path, leaf in leaves.items():
        if is_adapter(leaf):
            check_leaf(path, leaf, "params")  # says what to do, where "params lacks" would mislead
    required = [path for path in expected if path not in optional]
    missing = [path for path in required if path not in leaves]
    if missing:
        raise ValueError(
            f"params lacks {missing[0]} (shape {jnp.shape(expected[missing[0]])}): {len(missing)} of the "
            f"{len(required)} parameters of {net_name} are missing. Pass model.params, or a tree of the same structure."
        )
    for path, leaf in leaves.items():
        if path not in expected:
            raise ValueError(f"params holds {path}, which {net_name} does not. Pass model.params, or a tree like it.")
        check_leaf(path, leaf, "params")
        shape, expected_shape = jnp.shape(unbox(leaf)), jnp.shape(expected[path])
        if shape != expected_shape:
            raise ValueError(
                f"{path}: expected shape {expected_shape}, as in {net_name}, got {shape}. "
                "Were these params made for another net?"
            )
    return leaves


def call_method(net: Any, method: Method, args: Sequence[object], kwargs: Mapping[str, object]) -> PyTree:
    """``net(*args, **kwargs)``, or the same call of its ``method``."""
    if method is None:
        return net(*args, **kwargs)
    if isinstance(method, str):
        if not callable(getattr(net, method, None)):
            names = [name for name in dir(type(net)) if not name.startswith("_")]
            raise AttributeError(f"method={method!r}: {type(net).__name__} has no such method.{suggest(method, names)}")
        return getattr(net, method)(*args, **kwargs)
    if not callable(method):
        raise TypeError(f"method={method!r}: expected the name of a method, or a function that takes the net first.")
    # A bound method of the user's own net would run with the weights of that net: only its function is called.
    return getattr(method, "__func__", method)(net, *args, **kwargs)
