"""The two trees: `frozen` and `lora` have the structure of `params`, with ``None`` for "not here"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter, array_shapes, is_adapter
from lojax.adapters.axes import size
from lojax.adapters.bank import is_bank
from lojax.adapters.leaves import check_leaf
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import check_same_structure, flatten
from lojax.text import spec
from lojax.types import Leaf, Params, Path, PyTree, Shape


def check_pair(frozen: Params, lora: Params) -> tuple[dict[Path, Leaf], dict[Path, Leaf]]:
    """Both trees by path, or an error that names the first path where they do not fit together."""
    weights, trained = check_structure(frozen, lora)
    for path in weights:
        weight, leaf = unbox(weights[path]), unbox(trained[path])
        check_leaf(path, weight, "frozen")
        if not is_adapter(leaf):
            check_leaf(path, leaf, "lora")
        if is_adapter(leaf):
            _check_adapter(path, weight, leaf)
        elif weight is not None and leaf is not None:
            raise ValueError(f"{path} is an array in both frozen and lora; one of them must hold None there.")
    return weights, trained


def check_structure(frozen: Params, lora: Params, *, name: str = "frozen") -> tuple[dict[Path, Leaf], dict[Path, Leaf]]:
    """Both trees by path, or an error unless they have the same paths in the same containers.

    Args:
        frozen: The tree that goes with ``lora``.
        lora: The trained tree.
        name: What to call the first one.
    """
    _check_places(frozen, lora, flatten(frozen), flatten(lora), name)
    return check_same_structure(frozen, lora, name=name)


def refuse_bank(tree: Params, name: str = "lora") -> None:
    """Raises if ``tree`` is a bank, where one adapter is meant."""
    if is_bank(tree):
        raise ValueError(f"{name} is a stack of {len(tree)} adapters: index one, as bank[0].")


def _check_places(
    frozen: Params, lora: Params, weights: Mapping[Path, Leaf], trained: Mapping[Path, Leaf], name: str
) -> None:
    """Raises if an argument is in the place of another one, which the first differing path would not show."""
    if is_bank(lora):
        raise ValueError(
            f"lora is a stack of {len(lora)} adapters: index one, as bank[0], or say which row uses which with "
            "apply(..., adapter=ids)."
        )
    if weights.keys() != trained.keys():
        for argument, tree in ((name, frozen), ("lora", lora)):
            if type(tree) is tuple and len(tree) == 2 and _holds_adapters(tree[1]) and not _holds_adapters(tree[0]):
                raise ValueError(f"{argument} is the pair (frozen, lora) as one argument. Unpack it: f(*pair, ...).")
        if hasattr(lora, "shape") and hasattr(lora, "dtype"):
            raise ValueError(
                f"lora is an array {spec(lora)}, not a tree like {name}. The order is {name}, lora, inputs: is an "
                "argument missing?"
            )
    misplaced = [path for path, leaf in weights.items() if is_adapter(leaf)]
    if misplaced and not any(map(is_adapter, trained.values())):
        raise ValueError(
            f"{name} holds an adapter at {misplaced[0]}, and lora holds none: they are swapped. The order is {name}, "
            "lora."
        )
    if misplaced:
        raise ValueError(
            f"{name} holds an adapter at {misplaced[0]}, and only lora may hold adapters. Use the pair that one init "
            "returned."
        )


def _holds_adapters(tree: PyTree) -> bool:
    return any(map(is_adapter, jax.tree.leaves(tree, is_leaf=is_adapter)))


def _check_adapter(path: Path, weight: Leaf, adapter: Adapter) -> None:
    if weight is None:
        raise ValueError(f"{path}: lora holds an adapter, but frozen holds no weight there (None).")
    shape = unpacked_shape(weight, adapter.weight_shape)
    if len(adapter.axes) != len(shape):
        raise ValueError(f"{path}: the weight has shape {shape}, but its adapter has axes {adapter.axes}.")
    expected = array_shapes(adapter.axes, shape, adapter.rank, len(adapter.tokens or ()))
    got = {name: tuple(x.shape) for name, x in adapter.arrays.items()}
    if any(expected[name] != got[name] for name in got):
        raise ValueError(
            f"{path}: a weight of shape {shape} with axes {adapter.axes} needs an adapter of "
            f"shapes {_join(expected[name] for name in got)}, got {_join(got.values())}. "
            "Were these params, or this adapter, made for another model?"
        )
    if len({entry.scale for entry in adapter.entries or () if entry is not None}) > 1:
        raise ValueError(
            f"{path}: this is one adapter of a bank whose adapters have different scales, and which one is not known "
            "here. Map over bank.for_vmap(), whose b holds the scales, or pass apply(frozen, bank, x, adapter=ids)."
        )
    entries = size(adapter.axes, shape, "stack")
    if isinstance(adapter.scale, tuple) and len(adapter.scale) != entries:
        raise ValueError(f"{path}: {len(adapter.scale)} scales for a stack of {entries}.")


def unpacked_shape(weight: Leaf, adapted: Sequence[int | None]) -> Shape:
    """The shape of a weight that an adapter is for: that of ``weight``, but codes may be packed, several to an entry.

    Args:
        weight: The weight, out of its box.
        adapted: The shape that the adapter says; None for an axis of which it does not know the length.
    """
    shape = np.shape(weight)
    if len(adapted) != len(shape) or jnp.issubdtype(jnp.result_type(weight), jnp.floating):
        return shape
    return tuple(max(n, own or n) for n, own in zip(shape, adapted, strict=True))


def _join(shapes: Iterable[Shape]) -> str:
    return " and ".join(map(str, shapes))
