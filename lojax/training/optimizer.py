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

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from lojax.adapters.adapter import is_adapter
from lojax.adapters.bank import is_bank
from lojax.adapters.paths import flatten
from lojax.types import Leaf, Params, PyTree


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
        ``(frozen, lora)``; ``lora`` may be a `lojax.Bank`. Frozen leaves, and an ``a`` that stays as it is (LoRA-FA),
        get an update of zero and no state.

        What takes each number by itself (Adam, weight decay) moves every adapter of a bank as it would move it alone.
        What sees all leaves at once (clipping by the global norm) sees all adapters at once: to give each adapter its
        own, map it over the bank, ``jax.vmap(tx.init)(bank)`` and ``jax.vmap(tx.update)(grads, state, bank)``.

    Raises:
        TypeError: A transformation is something else.
        ValueError: ``b_ratio`` is not a finite number above 0.

    >>> import jax.numpy as jnp
    >>> tree = {"frozen": {"w": jnp.ones(2)}, "lora": {"w": jnp.ones(3)}}
    >>> tx = optimizer(optax.sgd(0.5))
    >>> updates, _ = tx.update(tree, tx.init(tree))
    >>> {name: half["w"].tolist() for name, half in updates.items()}
    {'frozen': [-0.0, -0.0], 'lora': [-0.5, -0.5, -0.5]}
    """
    for name, transform in (("tx", tx), ("magnitude", magnitude), ("full", full)):
        check_transformation(name, transform)
    traced = isinstance(b_ratio, Tracer)  # in a `lojax.sweep` over ratios
    if not traced and not (isinstance(b_ratio, numbers.Real) and math.isfinite(b_ratio) and b_ratio > 0):
        raise ValueError(f"b_ratio={b_ratio!r}; expected a finite number above 0: the rate of b over that of a.")
    by_group = {
        "train": tx,
        "b": tx if not traced and b_ratio == 1 else optax.chain(tx, optax.scale(b_ratio)),
        "magnitude": tx if magnitude is None else magnitude,
        "full": tx if full is None else full,
    }
    # Groups that share tx stay one group, "train": a transformation that sees all leaves at once, such as clipping by
    # the global norm, must see them together.
    separate = {group for group, other in by_group.items() if other is not tx}

    def label(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda group: group if group in separate | {"frozen"} else "train", groups(tree))

    transforms: dict[Hashable, optax.GradientTransformation] = {
        group: by_group[group] for group in separate | {"train"}
    }
    return optax.multi_transform(transforms | {"frozen": _zero_updates()}, label)


def check_transformation(name: str, value: object) -> None:
    """Raises unless ``value`` is an optax transformation; any but ``tx`` may be None."""
    if (value is None and name != "tx") or (hasattr(value, "init") and hasattr(value, "update")):
        return
    hint = ""
    if isinstance(value, numbers.Real):
        hint = f" Did you mean optax.adamw({value})?"
    elif callable(value):
        hint = " Did you forget to call it?"
    raise TypeError(f"{name} is a {type(value).__name__} ({value!r:.40}), not an optax transformation.{hint}")


def _zero_updates() -> optax.GradientTransformation:
    """Updates of -0.0: ``w + -0.0`` is ``w`` bit for bit, where ``w + 0.0`` turns -0.0 into 0.0."""

    def negative_zeros(updates: PyTree, params: PyTree) -> PyTree:
        template = updates if params is None else params  # the gradient of an integer is float0, which has no zeros
        return jax.tree.map(lambda x: -jnp.zeros_like(x), template)

    return optax.stateless(negative_zeros)


def groups(tree: PyTree) -> PyTree:
    """``"frozen"``, ``"full"``, or the field of its adapter, for every leaf of a ``lora`` or of a combined tree."""
    if isinstance(tree, Mapping) and set(tree) == {"frozen", "lora"}:
        return {"frozen": _label_all(tree["frozen"], "frozen"), "lora": _label_trained(tree["lora"])}
    if isinstance(tree, tuple) and len(tree) == 2 and _is_pair(*tree):
        return (_label_all(tree[0], "frozen"), _label_trained(tree[1]))
    return _label_trained(tree)


def _label_trained(lora: Params) -> PyTree:
    def label(leaf: Leaf) -> PyTree:
        if not is_adapter(leaf):
            return "full"
        fields = {name: name if name in leaf.trained_arrays else "frozen" for name in leaf.arrays}
        return dataclasses.replace(leaf, **{name: _label_all(getattr(leaf, name), g) for name, g in fields.items()})

    return jax.tree.map(label, lora, is_leaf=is_adapter)


def _label_all(tree: PyTree, group: str) -> PyTree:
    return jax.tree.map(lambda _: group, tree)


def _is_pair(left: PyTree, right: PyTree) -> bool:
    """Whether these are ``frozen`` and ``lora``, and not two layers of a ``lora`` tree that is a tuple."""
    if is_bank(right):
        return not is_bank(left)
    weights, trained = flatten(left), flatten(right)
    if weights.keys() != trained.keys() or all(leaf is None for leaf in trained.values()):
        return False
    return all(_are_complementary(weights[path], trained[path]) for path in weights)


def _are_complementary(weight: Leaf, trained: Leaf) -> bool:
    if is_adapter(weight):
        return False
    return weight is not None if is_adapter(trained) else weight is None or trained is None
