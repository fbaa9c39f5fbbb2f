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
from lojax.quantized.quantized import is_quantized
from lojax.types import Leaf, Params, Path, PyTree


def is_leaf(node: object) -> bool:
    """Where a parameter tree ends: at an array, a box, an adapter, a quantized weight, or ``None``."""
    return node is None or is_box(node) or is_adapter(node) or is_quantized(node)


def path_of(keys: tuple[Any, ...]) -> Path:
    """The path of JAX key entries.

    >>> path_of((jax.tree_util.DictKey("params"), jax.tree_util.SequenceKey(0)))
    'params/0'
    """
    return "/".join(_name(key) for key in keys)


def _name(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: PyTree) -> dict[Path, Leaf]:
    """The leaves of ``tree`` by path, ``None`` and boxes and adapters included."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_of(keys): leaf for keys, leaf in leaves}


def unflatten(leaves: Mapping[Path | tuple[Any, ...], Leaf]) -> PyTree:
    """Nested dicts of leaves by path: the reverse of `flatten` for a tree of dicts.

    Args:
        leaves: By path, or by the tuple of keys where a key is not a string or holds a ``/``. The leaf at the empty
            tuple is the whole tree.

    Raises:
        ValueError: A path is a leaf and a dict at once.

    >>> unflatten({"a/b": 1, "a/c": 2, ("d", 0): 3})
    {'a': {'b': 1, 'c': 2}, 'd': {0: 3}}
    """
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        if path == ():
            return leaf
        *parents, last = path.split("/") if isinstance(path, str) else path
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} is below {key!r}, which is a leaf.")
        if last in node:
            raise ValueError(f"{path!r} is a leaf and holds other leaves, or is there twice.")
        node[last] = leaf
    return tree


def map_paths(f: Callable[..., Leaf], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps ``f(path, leaf, *others)`` over trees of one structure (see `is_leaf`)."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: f(path_of(keys), *leaves), tree, *rest, is_leaf=is_leaf
    )


def check_same_structure(
    frozen: Params, lora: Params, *, name: str = "frozen", other: str = "lora"
) -> tuple[dict[Path, Leaf], dict[Path, Leaf]]:
    """Both trees by path, or an error unless they have the same paths in the same containers. Both may hold adapters.

    Args:
        frozen: The tree that goes with ``lora``.
        lora: The trained tree.
        name: What to call the first one.
        other: What to call the second one.
    """
    weights, trained = flatten(frozen), flatten(lora)
    for path in (*weights, *trained):
        if path not in weights or path not in trained:
            missing, holder = (other, name) if path in weights else (name, other)
            raise ValueError(
                f"{name} and {other} have different structure: {path} is in {holder} but not in {missing}. "
                "Use the pair that one init (or restore onto the same frozen) returned."
            )
    if jax.tree.structure(frozen, is_leaf=is_leaf) != jax.tree.structure(lora, is_leaf=is_leaf):
        raise ValueError(
            f"{name} and {other} have the same paths in different containers (such as a dict against a FrozenDict, or "
            "a list against a tuple). Convert one, or use the pair that one init returned."
        )
    return weights, trained
