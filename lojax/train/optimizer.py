"""Optimizers that see only what trains.

The easy and cheap way is plain optax over ``lora``: differentiate with respect to ``lora`` alone, and no
gradient or optimizer state of a frozen weight exists. Where a trainer insists on one tree (a Flax
`TrainState` that holds everything), `optimizer` masks the frozen half with `optax.multi_transform`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lojax.adapt.adapter import Adapter, is_adapter


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` on everything that trains, nothing on what is frozen (`optax.multi_transform`).

    Args:
        tx: Any optax transformation.

    Returns:
        A transformation over ``lora``, over ``{"frozen": frozen, "lora": lora}``, or over the pair
        ``(frozen, lora)``. Frozen leaves get an update of zero and no state.
    """
    return optax.multi_transform({"train": tx, "frozen": optax.set_to_zero()}, labels)


def labels(tree: Any) -> Any:
    """``"train"`` or ``"frozen"`` for every leaf of a ``lora`` tree or of a combined tree."""
    if isinstance(tree, Mapping) and set(tree) == {"frozen", "lora"}:
        return {"frozen": _all(tree["frozen"], "frozen"), "lora": _all(tree["lora"], "train")}
    if isinstance(tree, tuple) and len(tree) == 2 and _holds_adapter(tree[1]) and not _holds_adapter(tree[0]):
        return (_all(tree[0], "frozen"), _all(tree[1], "train"))
    return _all(tree, "train")


def _all(tree: Any, label: str) -> Any:
    return jax.tree.map(lambda _: label, tree)


def _holds_adapter(tree: Any) -> bool:
    return any(isinstance(node, Adapter) for node in jax.tree.leaves(tree, is_leaf=is_adapter))
