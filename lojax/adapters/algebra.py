"""Adapters made of adapters: combine, resize, rescale, subtract. Every function takes and returns ``lora`` trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import Adapter, is_adapter, scaled
from lojax.adapters.factor_matrices import even, like, matrices, padded, truncated
from lojax.adapters.initializers import key_for
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.task_vectors import Merge, merger

FACTORWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that merge the factors ``a`` and ``b`` one by one: cheap, and a rough approximation."""
METHODS = (*FACTORWISE, "cat", "svd", *(f"{m}_svd" for m in FACTORWISE[1:]))


def combine(
    adapters: Sequence[Any],
    weights: Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    key: jax.Array | None = None,
) -> Any:
    """One adapter that does ``sum_i weights[i] * update_i``, exactly or nearly.

    The methods and their numbers are those of PEFT's ``add_weighted_adapter``. ``cat`` is exact, with the ranks
    added up; ``svd`` is the nearest of the given rank; the others merge factors entry by entry, or with ``_svd``
    the updates themselves (these alone form an array the size of a weight, one at a time). A single adapter is
    scaled, whatever the method.

    Args:
        adapters: ``lora`` trees of one structure. Where some hold no adapter, the others are combined. A
            parameter trained in full is taken over if a single tree holds it.
        weights: One number each; negative ones subtract.
        method: One of `METHODS`.
        rank: The rank that the ``svd`` methods give; the largest of the inputs by default.
        density: The share of entries that pruning keeps, above 0 and up to 1: for ``ties``, ``dare_linear``,
            ``dare_ties``, ``magnitude_prune`` and their ``_svd`` forms.
        majority: How ``ties`` elects a sign: ``"total"`` or ``"frequency"``.
        key: The PRNG key of the DARE methods; consumed.

    Returns:
        A ``lora`` tree; its adapters have scale 1, and one rank for all entries of a stack, filled with zeros.

    Raises:
        ValueError: An argument is missing or out of range, the trees do not fit together, or ranks differ where
            the method needs them alike.

    >>> import lojax
    >>> params = {"w": jnp.ones((4, 3))}
    >>> (_, one), (_, two) = (lojax.init(jax.random.key(i), params, "w", rank=2) for i in range(2))
    >>> combine([one, two], [0.5, 0.5])["w"].rank
    4
    """
    _check_arguments(adapters, weights, method, rank, density, majority, key)
    trees = [flatten(tree) for tree in adapters]
    for tree in trees[1:]:
        if tree.keys() != trees[0].keys():
            path = sorted(tree.keys() ^ trees[0].keys())[0]
            raise ValueError(f"The adapters are for different trees: {path} is in one of them and not in another.")
    joint = _joint(method if len(adapters) > 1 else "linear", rank, density, majority, key)

    def join(path: str, _: Any) -> Any:
        found = [(tree[path], weight) for tree, weight in zip(trees, weights, strict=True) if tree[path] is not None]
        if not any(is_adapter(leaf) for leaf, _ in found):
            return _only(path, [leaf for leaf, _ in found])
        _check_alike(path, [leaf for leaf, _ in found])
        with jax.default_matmul_precision("highest"):
            return joint(path, [even(leaf) for leaf, _ in found], [float(weight) for _, weight in found])

    return map_paths(join, adapters[0])


def resize(lora: Any, rank: int) -> Any:
    """The nearest adapter of another rank (Eckart and Young 1936), without forming any weight.

    ``a @ b = Qa (Ra Rb^T) Qb^T``: two thin QR decompositions and the SVD of an ``[r, r]`` matrix. The singular
    values are shared evenly between ``a`` and ``b``; the scale stays. A higher rank is filled with zeros.

    Args:
        lora: A ``lora`` tree.
        rank: The new rank of every adapter.

    Returns:
        A tree of the same structure; what is no adapter stays as it is.

    Raises:
        ValueError: ``rank`` is below 1.

    >>> import lojax
    >>> _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=3)
    >>> resize(lora, 1)["w"].a.shape
    (4, 1)
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; expected at least 1.")

    def change(path: str, leaf: Any) -> Any:
        if not is_adapter(leaf) or leaf.rank == rank:
            return leaf
        _refuse_variant(path, leaf)
        leaf = even(leaf)
        a, b = matrices(leaf)
        if rank < leaf.rank:
            with jax.default_matmul_precision("highest"):
                a, b = truncated(a, b, rank)
        return like(leaf, padded(a, rank, 2), padded(b, rank, 1), leaf.one_scale)

    return map_paths(change, lora)


def rescale(lora: Any, factor: float) -> Any:
    """The adapter with its update times ``factor``: 0 is the base, 1 the adapter, negative ones unlearn.

    Args:
        lora: A ``lora`` tree.
        factor: A number; it is static, as the scale is.

    Returns:
        The same arrays with other scales.

    Raises:
        ValueError: A parameter is trained in full: there is no update to scale.

    >>> import lojax
    >>> _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=2, alpha=4)
    >>> rescale(lora, 0.25)["w"].scale
    0.5
    """
    _refuse_full(lora, "scaled")

    def change(path: str, leaf: Any) -> Any:
        if is_adapter(leaf) and leaf.magnitude is not None:
            _refuse_variant(path, leaf)
        return scaled(leaf, factor) if is_adapter(leaf) else leaf

    return map_paths(change, lora)


def subtract(lora: Any, other: Any) -> Any:
    """The adapter whose update is that of ``lora`` less that of ``other``, exactly; the ranks add up.

    Args:
        lora: A ``lora`` tree.
        other: One of the same structure.

    Returns:
        A ``lora`` tree; `resize` makes it smaller.

    Raises:
        ValueError: The trees do not fit together, or a parameter is trained in full.

    >>> import lojax
    >>> _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=2)
    >>> nothing = subtract(lora, lora)
    >>> nothing["w"].rank
    4
    """
    for tree in (lora, other):
        _refuse_full(tree, "subtracted")
    return combine([lora, other], [1.0, -1.0], method="cat")


# --- one weight ---


Joint = Callable[[str, Sequence[Adapter], Sequence[float]], Adapter]


def _joint(method: str, rank: int | None, density: float | None, majority: str, key: jax.Array | None) -> Joint:
    """The function that combines the adapters of one weight."""
    merge = merger(method, density if _prunes(method) else None, majority)

    def join(path: str, found: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        keys = [None, None] if key is None else list(jax.random.split(key_for(key, path)))
        if method in FACTORWISE:
            a, b = _factorwise(path, found, weights, merge, keys)
        elif method in ("cat", "svd"):
            a, b = _side_by_side(found, weights)
        else:
            a, b = _updatewise(found, weights, merge, keys[0])
        if method.endswith("svd"):
            target = rank or max(leaf.rank for leaf in found)
            a, b = truncated(a, b, target)
            a, b = padded(a, target, 2), padded(b, target, 1)
        return like(found[0], a, b, 1.0)

    return join


def _side_by_side(found: Sequence[Adapter], weights: Sequence[float]) -> tuple[jax.Array, jax.Array]:
    pairs = [matrices(leaf) for leaf in found]
    factors = [weight * leaf.one_scale for leaf, weight in zip(found, weights, strict=True)]
    a = jnp.concatenate([x * factor for (x, _), factor in zip(pairs, factors, strict=True)], 2)
    return a, jnp.concatenate([y for _, y in pairs], 1)


def _factorwise(
    path: str, found: Sequence[Adapter], weights: Sequence[float], merge: Merge, keys: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    ranks = [leaf.rank for leaf in found]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"{path}: ranks {ranks} differ; this method needs them alike. Use 'cat', 'svd', or resize first."
        )
    pairs = [matrices(leaf) for leaf in found]
    factors = jnp.asarray(
        [weight * leaf.one_scale for leaf, weight in zip(found, weights, strict=True)], pairs[0][0].dtype
    )
    root = jnp.sqrt(jnp.abs(factors))
    signed = jnp.where(factors >= 0, root, -root)
    stacked = [jnp.stack(side) for side in zip(*pairs, strict=True)]
    return merge(stacked[0], signed, keys[0]), merge(stacked[1], root, keys[1])


def _updatewise(
    found: Sequence[Adapter], weights: Sequence[float], merge: Merge, key: Any
) -> tuple[jax.Array, jax.Array]:
    updates = jnp.stack([leaf.one_scale * (a @ b) for leaf in found for a, b in [matrices(leaf)]])
    merged = merge(updates, jnp.asarray(weights, updates.dtype), key)
    m = merged.shape[1]
    return jnp.broadcast_to(jnp.eye(m, dtype=merged.dtype), (merged.shape[0], m, m)), merged


# --- checks ---


def _prunes(method: str) -> bool:
    return method.startswith(("ties", "dare", "magnitude"))


def _check_arguments(
    adapters: Sequence[Any], weights: Sequence[float], method: str, rank: Any, density: Any, majority: str, key: Any
) -> None:
    if isinstance(adapters, Mapping) or not len(adapters):
        raise ValueError("adapters must be a sequence of at least one lora tree.")
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters, but {len(weights)} weights; give one weight each.")
    if method not in METHODS:
        raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}.")
    if _prunes(method) and not (density is not None and 0 < density <= 1):
        raise ValueError(f"method={method!r} needs density, the share of entries to keep, in (0, 1]; got {density}.")
    if majority not in ("total", "frequency"):
        raise ValueError(f"majority={majority!r}; expected 'total' or 'frequency'.")
    if method.startswith("dare") and key is None:
        raise ValueError(f"method={method!r} drops entries at random; pass key=jax.random.key(...).")
    if rank is not None and (rank < 1 or not method.endswith("svd")):
        raise ValueError(f"rank={rank} with method={method!r}; it is for the svd methods, and at least 1.")


def _check_alike(path: str, found: Sequence[Any]) -> None:
    for leaf in filter(is_adapter, found):
        _refuse_variant(path, leaf)
    kinds = {(leaf.axes, _weight(leaf)) if is_adapter(leaf) else "an array trained in full" for leaf in found}
    if len(kinds) > 1:
        listed = " and ".join(sorted(map(str, kinds)))
        raise ValueError(f"{path}: the adapters are of different weights: {listed}.")


def _weight(adapter: Adapter) -> tuple[int, ...]:
    a, b = matrices(adapter)
    return a.shape[0], a.shape[1], b.shape[2]


def _refuse_variant(path: str, adapter: Adapter) -> None:
    held = [name for name in adapter.extras if name not in ("ranks", "scale")]
    if held:
        raise ValueError(f"{path}: the adapter holds {held[0]}; only plain low-rank updates can be composed.")


def _only(path: str, found: Sequence[Any]) -> Any:
    if len(found) > 1:
        raise ValueError(
            f"{path} is trained in full in {len(found)} of the adapters, and such values cannot be combined."
        )
    return found[0] if found else None


def _refuse_full(lora: Any, done: str) -> None:
    full = [path for path, leaf in flatten(lora).items() if leaf is not None and not is_adapter(leaf)]
    if full:
        raise ValueError(f"{', '.join(full[:5])}: trained in full, not as an update, so it cannot be {done}.")
