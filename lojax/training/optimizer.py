"""Optimizers that see only what trains.

The easy and cheap way is plain optax over ``lora``: differentiate with respect to ``lora`` alone, and no
gradient or optimizer state of a frozen weight exists. Where a trainer insists on one tree (a Flax
`TrainState` that holds everything), `optimizer` masks the frozen half with `optax.multi_transform`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lojax.adapters.adapter import is_adapter
from lojax.adapters.paths import flatten


def optimizer(
    tx: optax.GradientTransformation,
    *,
    b_ratio: float = 1.0,
    magnitude: optax.GradientTransformation | None = None,
    full: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """``tx`` on everything that trains, nothing on what is frozen (`optax.multi_transform`).

    Args:
        tx: Any optax transformation.
        b_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354, §4): the learning rate of every ``b`` is this many
            times that of ``a``; the paper suggests 16.
        magnitude: Another transformation for the magnitudes of DoRA.
        full: Another transformation for the parameters trained in full.

    Returns:
        A transformation over ``lora``, over ``{"frozen": frozen, "lora": lora}``, or over the pair
        ``(frozen, lora)``. Frozen leaves, and an ``a`` that stays as it is (LoRA-FA), get an update of zero and
        no state.

    Raises:
        ValueError: ``b_ratio`` is not a finite number above 0.

    >>> import jax.numpy as jnp
    >>> tree = {"frozen": {"w": jnp.ones(2)}, "lora": {"w": jnp.ones(3)}}
    >>> tx = optimizer(optax.sgd(0.5))
    >>> updates, _ = tx.update(tree, tx.init(tree))
    >>> {name: half["w"].tolist() for name, half in updates.items()}
    {'frozen': [-0.0, -0.0], 'lora': [-0.5, -0.5, -0.5]}
    """
    if not (isinstance(b_ratio, numbers.Real) and math.isfinite(b_ratio) and b_ratio > 0):
        raise ValueError(f"b_ratio={b_ratio!r}; expected a finite number above 0: the rate of b over that of a.")
    own = {
        "train": tx,
        "b": tx if b_ratio == 1 else optax.chain(tx, optax.scale(b_ratio)),
        "magnitude": tx if magnitude is None else magnitude,
        "full": tx if full is None else full,
    }
    apart = {name for name, other in own.items() if other is not tx}

    def grouped(tree: Any) -> Any:
        return jax.tree.map(lambda group: group if group in apart | {"frozen"} else "train", groups(tree))

    used: dict[Hashable, optax.GradientTransformation] = {
        name: other for name, other in own.items() if name in apart | {"train"}
    }
    return optax.multi_transform(used | {"frozen": _keep()}, grouped)


def decays(tree: Any) -> Any:
    """Where weight decay belongs, for the ``mask=`` of `optax.adamw`: matrices, not magnitudes, biases or norms.

    Args:
        tree: A ``lora`` tree, or one that `optimizer` takes.

    Returns:
        The same tree with True or False for every leaf.

    >>> import jax.numpy as jnp
    >>> decays({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    """
    marks = jax.tree.map(lambda _: True, tree)
    matrix = jax.tree.map(lambda x: jnp.ndim(x) > 1, tree)
    named = jax.tree.map(lambda group: group not in ("magnitude", "frozen"), groups(tree))
    return jax.tree.map(lambda *flags: all(flags), marks, matrix, named)


def _keep() -> optax.GradientTransformation:
    """Updates of -0.0: ``w + -0.0`` is ``w`` bit for bit, where ``w + 0.0`` turns -0.0 into 0.0."""

    def keep(updates: Any, params: Any) -> Any:
        like = updates if params is None else params  # the gradient of an integer is like nothing
        return jax.tree.map(lambda x: -jnp.zeros_like(x), like)

    return optax.stateless(keep)


def labels(tree: Any) -> Any:
    """``"train"`` or ``"frozen"`` for every leaf of a ``lora`` tree or of a combined tree."""
    return jax.tree.map(lambda group: group if group == "frozen" else "train", groups(tree))


def groups(tree: Any) -> Any:
    """``"frozen"``, ``"full"``, or the field of its adapter, for every leaf of a ``lora`` or of a combined tree."""
    if isinstance(tree, Mapping) and set(tree) == {"frozen", "lora"}:
        return {"frozen": _all(tree["frozen"], "frozen"), "lora": _trained(tree["lora"])}
    if isinstance(tree, tuple) and len(tree) == 2 and _is_pair(*tree):
        return (_all(tree[0], "frozen"), _trained(tree[1]))
    return _trained(tree)


def _trained(tree: Any) -> Any:
    def label(leaf: Any) -> Any:
        if not is_adapter(leaf):
            return "full"
        names = {"a": "frozen" if leaf.frozen_a else "a", "b": "b", "magnitude": "magnitude", "rows": "rows"}
        held = {name: group for name, group in names.items() if getattr(leaf, name) is not None}
        return dataclasses.replace(
            leaf, **{n: jax.tree.map(lambda _, g=g: g, getattr(leaf, n)) for n, g in held.items()}
        )

    return jax.tree.map(label, tree, is_leaf=is_adapter)


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
