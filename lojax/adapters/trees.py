"""The two trees: `frozen` and `lora` have the structure of `params`, with ``None`` for "not here"."""

from __future__ import annotations

import math
from typing import Any

import jax

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import array_shapes
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten, is_leaf


def check_pair(frozen: Any, lora: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both trees by path, or an error that names the first path where they do not fit together."""
    left, right = check_structure(frozen, lora)
    for path in left:
        f, t = unbox(left[path]), unbox(right[path])
        if is_adapter(t):
            _check_adapter(path, f, t)
        elif f is not None and t is not None:
            raise ValueError(f"{path} is an array in both frozen and lora; one of them must hold None there.")
    return left, right


def check_structure(frozen: Any, lora: Any, *, name: str = "frozen") -> tuple[dict[str, Any], dict[str, Any]]:
    """Both trees by path, or an error unless they have the same paths in the same containers.

    Args:
        frozen: The tree that goes with ``lora``.
        lora: The trained tree.
        name: What to call the first one.
    """
    left, right = flatten(frozen), flatten(lora)
    for path in (*left, *right):
        if path not in left or path not in right:
            missing, holder = ("lora", name) if path in left else (name, "lora")
            raise ValueError(
                f"{name} and lora have different structure: {path} is in {holder} but not in {missing}. "
                "Use the pair that one init (or restore onto the same frozen) returned."
            )
    if jax.tree.structure(frozen, is_leaf=is_leaf) != jax.tree.structure(lora, is_leaf=is_leaf):
        raise ValueError(
            f"{name} and lora have the same paths in different containers (such as a dict against a FrozenDict, or a "
            "list against a tuple). Convert one, or use the pair that one init returned."
        )
    return left, right


def _check_adapter(path: str, weight: Any, adapter: Adapter) -> None:
    if weight is None:
        raise ValueError(f"{path}: lora holds an adapter, but frozen holds no weight there (None).")
    if len(adapter.axes) != len(weight.shape):
        got = f"axes {adapter.axes}"
        raise ValueError(f"{path}: the weight has shape {tuple(weight.shape)}, but its adapter has {got}.")
    expected = array_shapes(adapter.axes, weight.shape, adapter.rank, len(adapter.tokens or ()))
    got = {name: tuple(x.shape) for name, x in adapter.arrays.items()}
    wanted = {name: expected[name] for name in got}
    if got != wanted:
        raise ValueError(
            f"{path}: a weight of shape {tuple(weight.shape)} with axes {adapter.axes} needs an adapter of "
            f"shapes {_listed(wanted)}, got {_listed(got)}. "
            "Were these params, or this adapter, made for another model?"
        )
    stack = math.prod(n for n, role in zip(weight.shape, adapter.axes, strict=True) if role == "stack")
    if isinstance(adapter.scale, tuple) and len(adapter.scale) != stack:
        raise ValueError(f"{path}: {len(adapter.scale)} scales for a stack of {stack}.")


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return " and ".join(str(shape) for shape in shapes.values())
