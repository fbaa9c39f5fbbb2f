"""Paths: how a leaf of a parameter tree is named, and trees flattened to ``{path: leaf}``.

A path joins the keys from the root with ``/``: ``params/encoder/layer_0/query/kernel``. Boxes,
adapters and ``None`` count as leaves, so `frozen`, `lora` and `params` have the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import is_box


def is_leaf(node: Any) -> bool:
    """Where a parameter tree ends: at an array, a box, an adapter, or ``None``."""
    return node is None or is_box(node) or is_adapter(node)


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of JAX key entries.

    >>> path_of((jax.tree_util.DictKey("params"), jax.tree_util.SequenceKey(0)))
    'params/0'
    """
    return "/".join(_name(key) for key in keys)


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of ``tree`` by path, ``None`` and boxes and adapters included."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_of(keys): leaf for keys, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of leaves by path: the inverse of `flatten` for a tree of dicts.

    >>> unflatten({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_paths(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps ``f(path, leaf, *others)`` over trees of one structure (see `is_leaf`)."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: f(path_of(keys), *leaves), tree, *rest, is_leaf=is_leaf
    )
