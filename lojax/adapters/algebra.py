"""Adapters made of adapters: combine, resize, rescale, subtract. Every function takes and returns ``lora`` trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lojax.adapters.adapter import Adapter, is_adapter, scale_update
from lojax.adapters.bank import Bank
from lojax.adapters.initializers import key_for
from lojax.adapters.matrices import factor_matrices, pad_rank, truncate_rank, unify_scale_and_rank, with_factors
from lojax.adapters.paths import check_same_structure, flatten, map_paths
from lojax.adapters.rule import is_finite, is_integer
from lojax.adapters.task_vectors import prune_and_sum
from lojax.adapters.trees import refuse_bank
from lojax.text import suggest
from lojax.types import Array, Key, Leaf, Params, Path

FACTORWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that merge the factors ``a`` and ``b`` one by one: cheap, and a rough approximation."""
METHODS = (*FACTORWISE, "cat", "svd", *(f"{m}_svd" for m in FACTORWISE[1:]))


def combine(
    adapters: Sequence[Params] | Bank,
    weights: Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    key: Key | None = None,
) -> Params:
    """One adapter that does ``sum_i weights[i] * update_i``, exactly or nearly.

    The methods and their numbers are those of PEFT's ``add_weighted_adapter``. ``cat`` is exact, with the ranks
    added up; ``svd`` is the nearest of the given rank; the others merge factors entry by entry, or with ``_svd``
    the updates themselves (these alone form an array the size of a weight, one at a time). A single adapter is
    scaled, whatever the method.

    Args:
        adapters: ``lora`` trees of one structure, or the bank of them. Where some hold no adapter, the others are
            combined. A parameter trained in full is taken over if a single tree holds it.
        weights: One number each; negative ones subtract.
        method: One of `METHODS`.
        rank: The rank that the ``svd`` methods give, for a single adapter too; the largest of the inputs by default.
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
    settings = _Settings(method, rank, density, majority, key)
    adapters = list(adapters) if isinstance(adapters, Bank) else adapters
    settings.check(adapters, weights)
    for i, tree in enumerate(adapters):
        refuse_bank(tree, f"adapters[{i}]")
    weights = [_as_number(weight, f"weights[{i}]") for i, weight in enumerate(weights)]
    if len(adapters) == 1:  # scaled, whatever the method, and truncated where a rank is given
        settings = _Settings("linear") if rank is None else _Settings("svd", rank)
    trees = [flatten(tree) for tree in adapters]
    for tree in trees[1:]:
        if tree.keys() != trees[0].keys():
            path = sorted(tree.keys() ^ trees[0].keys())[0]
            raise ValueError(f"The adapters are for different trees: {path} is in one of them and not in another.")

    def combine_at(path: Path, _: Leaf) -> Leaf:
        pairs = [(tree[path], weight) for tree, weight in zip(trees, weights, strict=True) if tree[path] is not None]
        leaves = [leaf for leaf, _ in pairs]
        if not any(is_adapter(leaf) for leaf in leaves):
            return _take_only(path, leaves)
        _check_same_weight(path, leaves)
        with jax.default_matmul_precision("highest"):
            plain = [unify_scale_and_rank(leaf) for leaf in leaves]
            return _combine_leaf(path, plain, [weight for _, weight in pairs], settings)

    return map_paths(combine_at, adapters[0])


def resize(lora: Params, rank: int) -> Params:
    """The nearest adapter of another rank (Eckart and Young 1936), without forming any weight.

    ``a @ b = Qa (Ra Rb^T) Qb^T``: two thin QR decompositions and the SVD of an ``[r, r]`` matrix. The singular
    values are shared evenly between ``a`` and ``b``; the scale stays. A higher rank is filled with zeros.

    Args:
        lora: A ``lora`` tree.
        rank: The new rank of every adapter.

    Returns:
        A tree of the same structure; other leaves stay as they are.

    Raises:
        ValueError: ``rank`` is not an integer of at least 1.

    >>> import lojax
    >>> _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=3)
    >>> resize(lora, 1)["w"].a.shape
    (4, 1)
    """
    if not is_integer(rank) or rank < 1:
        raise ValueError(f"rank={rank!r}; expected an integer of at least 1.")
    refuse_bank(lora)

    def resize_at(path: Path, leaf: Leaf) -> Leaf:
        if not is_adapter(leaf) or leaf.rank == rank:
            return leaf
        refuse_variant(path, leaf)
        leaf = unify_scale_and_rank(leaf)
        a, b = factor_matrices(leaf)
        if rank < leaf.rank:
            with jax.default_matmul_precision("highest"):
                a, b = truncate_rank(a, b, rank)
        return with_factors(leaf, pad_rank(a, rank, 2), pad_rank(b, rank, 1), leaf.one_scale)

    return map_paths(resize_at, lora)


def rescale(lora: Params, factor: float) -> Params:
    """The adapter with its update times ``factor``: 0 is the base, 1 the adapter, negative ones unlearn.

    Args:
        lora: A ``lora`` tree.
        factor: A number; it is static, as the scale is.

    Returns:
        The same arrays with other scales.

    Raises:
        ValueError: ``factor`` is not a finite number, or a parameter is trained in full and so has no update to scale.

    >>> import lojax
    >>> _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=2, alpha=4)
    >>> rescale(lora, 0.25)["w"].scale
    0.5
    """
    factor = _as_number(factor, "factor", "To take an adapter out, use factor=0.0.")
    refuse_bank(lora)
    _refuse_full(lora, "scaled")

    def rescale_at(path: Path, leaf: Leaf) -> Leaf:
        if is_adapter(leaf) and leaf.magnitude is not None:
            refuse_variant(path, leaf)
        return scale_update(leaf, factor) if is_adapter(leaf) else leaf

    return map_paths(rescale_at, lora)


def subtract(lora: Params, other: Params) -> Params:
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
    for tree, name in ((lora, "lora"), (other, "other")):
        refuse_bank(tree, name)
        _refuse_full(tree, "subtracted")
    return combine([lora, other], [1.0, -1.0], method="cat")


def moved_paths(lora: Params) -> list[Path]:
    """The paths of the adapters whose start was taken out of their weight (PiSSA, OLoRA, MiLoRA, LoftQ, LoRA-GA)."""
    return sorted(path for path, leaf in flatten(lora).items() if is_adapter(leaf) and leaf.moved_base)


def subtract_start(lora: Params, start: Params) -> Params:
    """``lora`` with the adapters at its `moved_paths` as differences from ``start``, for the pretrained weights.

    Args:
        lora: A ``lora`` tree.
        start: The same tree as init returned it.

    Returns:
        A ``lora`` tree, with twice the rank at those paths; the rest is as it was.

    Raises:
        ValueError: No weight was moved, or the trees do not fit together.
    """
    moved = moved_paths(lora)
    if not moved:
        raise ValueError(
            "start= is for adapters whose start was taken out of their weight (PiSSA, OLoRA, MiLoRA, LoftQ, LoRA-GA), "
            "and lora holds none. Leave it out."
        )
    check_same_structure(start, lora, name="start")
    leaves = flatten(start)
    for path in moved:
        if not is_adapter(leaves[path]):
            raise ValueError(f"{path}: start holds no adapter there. Pass the lora tree as init returned it.")

    def difference(path: Path, leaf: Leaf, at_start: Leaf) -> Leaf:
        return subtract({path: leaf}, {path: at_start})[path] if path in moved else leaf

    return map_paths(difference, lora, start)


# --- one weight ---


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of `combine` that say how."""

    method: str
    rank: int | None = None
    density: float | None = None
    majority: str = "total"
    key: Key | None = None

    @property
    def prunes(self) -> bool:
        return self.method.startswith(("ties", "dare", "magnitude"))

    def check(self, adapters: Sequence[Params], weights: Sequence[float]) -> None:
        """Raises unless these fit together and what goes with them."""
        method, density = self.method, self.density
        if not isinstance(adapters, Sequence) or not len(adapters):
            raise ValueError("adapters must be a sequence of at least one lora tree.")
        if isinstance(weights, str) or not hasattr(weights, "__len__"):
            raise ValueError(f"weights={weights!r}; expected one number for each adapter, such as [0.5, 0.5].")
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters, but {len(weights)} weights; give one weight each.")
        if method not in METHODS:
            raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}.{suggest(method, METHODS)}")
        if self.prunes and not (is_finite(density) and 0 < density <= 1):
            raise ValueError(
                f"method={method!r} needs density, the share of entries to keep, in (0, 1]; got {density!r}."
            )
        if self.majority not in ("total", "frequency"):
            raise ValueError(f"majority={self.majority!r}; expected 'total' or 'frequency'.")
        if method.startswith("dare") and self.key is None:
            raise ValueError(f"method={method!r} drops entries at random; pass key=jax.random.key(...).")
        if self.rank is not None and not (is_integer(self.rank) and self.rank >= 1 and method.endswith("svd")):
            raise ValueError(f"rank={self.rank!r} with method={method!r}; it is for the svd methods, and at least 1.")

    def merge(self, x: Array, weights: Array, key: Key | None) -> Array:
        """`prune_and_sum` of ``x`` ``[N, S, ...]``."""
        density = self.density if self.prunes else None
        return prune_and_sum(x, weights, method=self.method, density=density, majority=self.majority, key=key)


def _combine_leaf(path: Path, adapters: Sequence[Adapter], weights: Sequence[float], settings: _Settings) -> Adapter:
    """The adapter of one weight, of scale 1."""
    method = settings.method
    keys = [None, None] if settings.key is None else list(jax.random.split(key_for(settings.key, path)))
    if method in FACTORWISE:
        a, b = _combine_factors(path, adapters, weights, settings, keys)
    elif method in ("cat", "svd"):
        a, b = _concatenate_factors(adapters, weights)
    else:
        a, b = _combine_updates(adapters, weights, settings, keys[0])
    if method.endswith("svd"):
        rank = settings.rank or max(adapter.rank for adapter in adapters)
        a, b = truncate_rank(a, b, rank)
        a, b = pad_rank(a, rank, 2), pad_rank(b, rank, 1)
    combined = with_factors(adapters[0], a, b, 1.0)
    return dataclasses.replace(combined, moved_base=_moved_base(adapters, weights))


def _moved_base(adapters: Sequence[Adapter], weights: Sequence[float]) -> str | None:
    """The base that the result belongs to: the pretrained one again where what was taken out of it cancels.

    With ``s a0 b0`` taken out of W0, ``(W0 - s a0 b0) + s a b`` is W0 and the difference of two such adapters.
    """
    moved = [(adapter.moved_base, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    total = sum(weight for name, weight in moved if name)
    return next((name for name, _ in moved if name), None) if total else None


def _concatenate_factors(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Array, Array]:
    """``[w1 s1 a1 | w2 s2 a2 | ...]`` and ``[b1 | b2 | ...]``, whose product is the weighted sum of the updates."""
    pairs = [factor_matrices(adapter) for adapter in adapters]
    scales = [weight * adapter.one_scale for adapter, weight in zip(adapters, weights, strict=True)]
    a = jnp.concatenate([a * scale for (a, _), scale in zip(pairs, scales, strict=True)], 2)
    return a, jnp.concatenate([b for _, b in pairs], 1)


def _combine_factors(
    path: Path,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    settings: _Settings,
    keys: Sequence[Key | None],
) -> tuple[Array, Array]:
    """``a`` and ``b`` each merged on its own."""
    ranks = [adapter.rank for adapter in adapters]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"{path}: ranks {ranks} differ; this method needs them alike. Use 'cat', 'svd', or resize first."
        )
    pairs = [factor_matrices(adapter) for adapter in adapters]
    scales = [weight * adapter.one_scale for adapter, weight in zip(adapters, weights, strict=True)]
    scales = jnp.asarray(scales, pairs[0][0].dtype)
    # As PEFT does: the square root of weight and scale goes on both factors, and its sign on a alone.
    root = jnp.sqrt(jnp.abs(scales))
    signed_root = jnp.where(scales >= 0, root, -root)
    all_a, all_b = (jnp.stack(factors) for factors in zip(*pairs, strict=True))
    return settings.merge(all_a, signed_root, keys[0]), settings.merge(all_b, root, keys[1])


def _combine_updates(
    adapters: Sequence[Adapter], weights: Sequence[float], settings: _Settings, key: Key | None
) -> tuple[Array, Array]:
    """The identity and the merged updates themselves ``[S, m, n]``: a product for `truncate_rank`."""
    updates = jnp.stack([adapter.one_scale * (a @ b) for adapter in adapters for a, b in [factor_matrices(adapter)]])
    merged = settings.merge(updates, jnp.asarray(weights, updates.dtype), key)
    entries, m, _ = merged.shape
    return jnp.broadcast_to(jnp.eye(m, dtype=merged.dtype), (entries, m, m)), merged


# --- checks ---


def _check_same_weight(path: Path, leaves: Sequence[Leaf]) -> None:
    for leaf in filter(is_adapter, leaves):
        refuse_variant(path, leaf)
    if len({leaf.invocation_tokens for leaf in filter(is_adapter, leaves)}) > 1:
        raise ValueError(
            f"{path}: the adapters act from different invocation tokens on, and their sum from none of them."
        )
    kinds = {(leaf.axes, leaf.weight_shape) if is_adapter(leaf) else "an array trained in full" for leaf in leaves}
    if len(kinds) > 1:
        listed = " and ".join(sorted(map(str, kinds)))
        raise ValueError(f"{path}: the adapters are of different weights: {listed}.")


def refuse_variant(path: Path, adapter: Adapter) -> None:
    """Raises unless the adapter is a plain low-rank update."""
    extras = [name for name in adapter.extras if name not in ("ranks", "scale")]
    if extras:
        raise ValueError(f"{path}: the adapter holds {extras[0]}; only plain low-rank updates can be composed.")


def _take_only(path: Path, leaves: Sequence[Leaf]) -> Leaf:
    if len(leaves) > 1:
        raise ValueError(
            f"{path} is trained in full in {len(leaves)} of the adapters, and such values cannot be combined."
        )
    return leaves[0] if leaves else None


def _refuse_full(lora: Params, done: str) -> None:
    full = [path for path, leaf in flatten(lora).items() if leaf is not None and not is_adapter(leaf)]
    if full:
        raise ValueError(f"{', '.join(full[:5])}: trained in full, not as an update, so it cannot be {done}.")


def _as_number(value: object, name: str, remedy: str = "") -> float:
    """``value`` as a `float`: scales are static, and an array of JAX has no hash."""
    if getattr(value, "shape", None) == () and not isinstance(value, Tracer):
        value = value.item()  # type: ignore[attr-defined]
    if not is_finite(value):
        hint = " It is static: pass a number from outside of jit." if isinstance(value, Tracer) else ""
        raise ValueError(" ".join(filter(None, [f"{name}={value!r}; expected a finite number.{hint}", remedy])))
    return float(value)
