"""Optimizers that see only what trains.

The easy and cheap way is plain optax over ``lora``: differentiate with respect to ``lora`` alone, and no
gradient or optimizer state of a frozen weight exists. Where a trainer insists on one tree (a Flax
`TrainState` that holds everything), `optimizer` masks the frozen half with `optax.multi_transform`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lojax.adapt.adapter import is_adapter
from lojax.adapt.paths import flatten


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` on everything that trains, nothing on what is frozen (`optax.multi_transform`).

    Args:
        tx: Any optax transformation.

    Returns:
        A transformation over ``lora``, over ``{"frozen": frozen, "lora": lora}``, or over the pair
        ``(frozen, lora)``. Frozen leaves get an update of zero and no state.

    >>> import jax.numpy as jnp
    >>> tree = {"frozen": {"w": jnp.ones(2)}, "lora": {"w": jnp.ones(3)}}
    >>> tx = optimizer(optax.sgd(0.5))
    >>> updates, _ = tx.update(tree, tx.init(tree))
    >>> {name: half["w"].tolist() for name, half in updates.items()}
    {'frozen': [-0.0, -0.0], 'lora': [-0.5, -0.5, -0.5]}
    """
    return optax.multi_transform({"train": tx, "frozen": _keep()}, labels)


def _keep() -> optax.GradientTransformation:
    """Updates of -0.0: ``w + -0.0`` is ``w`` bit for bit, where ``w + 0.0`` turns -0.0 into 0.0."""

    def keep(updates: Any, params: Any) -> Any:
        like = updates if params is None else params  # the gradient of an integer is like nothing
        return jax.tree.map(lambda x: -jnp.zeros_like(x), like)

    return optax.stateless(keep)


def labels(tree: Any) -> Any:
    """``"train"`` or ``"frozen"`` for every leaf of a ``lora`` tree or of a combined tree."""
    if isinstance(tree, Mapping) and set(tree) == {"frozen", "lora"}:
        return {"frozen": _all(tree["frozen"], "frozen"), "lora": _all(tree["lora"], "train")}
    if isinstance(tree, tuple) and len(tree) == 2 and _is_pair(*tree):
        return (_all(tree[0], "frozen"), _all(tree[1], "train"))
    return _all(tree, "train")


def _all(tree: Any, label: str) -> Any:
    return jax.tree.map(lambda _: label, tree)


def _is_pair(left: Any, right: Any) -> bool:
    """Whether these are ``frozen`` and ``lora``, and not two layers of a ``lora`` tree that is a tuple."""
    weights, trained = flatten(left), flatten(right)
    if weights.keys() != trained.keys() or all(t is None for t in trained.values()):
        return False
    return all(_fit(weights[path], trained[path]) for path in weights)


def _fit(weight: Any, trained: Any) -> bool:
    if is_adapter(weight):
        return False
    return weight is not None if is_adapter(trained) else weight is None or trained is None
