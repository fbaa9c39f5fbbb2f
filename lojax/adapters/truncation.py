"""Fewer ranks, and low rank from full weights: `trim` and `extract`. Both on the host, matrix by matrix."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter, array_shapes, box_arrays, is_adapter
from lojax.adapters.algebra import refuse_variant
from lojax.adapters.axes import Axes, convention, positions
from lojax.adapters.matrices import factor_matrices, unify_scale_and_rank, with_factors
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import check_same_structure, flatten, map_paths
from lojax.adapters.rule import is_finite, is_integer
from lojax.adapters.single_matrices import host_array, single_adapters, single_weight
from lojax.adapters.spectrum import leading_directions, least_rank, out_directions, share_evenly, thin_svd
from lojax.adapters.trees import refuse_bank
from lojax.quantized.quantized import dense
from lojax.text import check_flags
from lojax.types import Leaf, Params, Path

Factors = tuple[np.ndarray, np.ndarray]
"""``[m, k]`` and ``[k, n]``."""


def trim(lora: Params, energy: float = 0.99) -> Params:
    """The adapter with the least ranks that keep this share of every update: ``sum sigma^2`` of what stays over all.

    For each matrix by itself, layer by layer in a stack, which then has ranks of its own. What is left out is the
    smallest that could be (Eckart and Young 1936).

    Args:
        lora: A ``lora`` tree.
        energy: The share to keep, above 0 and up to 1. With 1 only what is zero goes: ranks that nothing uses.

    Returns:
        A ``lora`` tree with the same scales, and ranks of at least 1. An adapter that needs all of its ranks stays
        as it is. `lojax.resize` gives all adapters one rank.

    Raises:
        ValueError: ``energy`` is out of range; an adapter is of another variant, or its start was taken out of the
            weight; or it is called under `jit`.

    >>> import lojax
    >>> a, b = jnp.eye(4)[:, :3], jnp.diag(jnp.array([3.0, 1.0, 0.1]))
    >>> lora = {"w": Adapter(a, b, scale=1.0, axes=("in", "out"))}
    >>> [trim(lora, energy)["w"].rank for energy in (0.8, 0.99, 1.0)]
    [1, 2, 3]
    """
    _check_energy(energy)
    refuse_bank(lora)

    def trim_at(path: Path, leaf: Leaf) -> Leaf:
        if not is_adapter(leaf):
            return leaf
        refuse_variant(path, leaf)
        refuse_moved(path, leaf)
        return _trim_adapter(path, leaf, energy)

    return map_paths(trim_at, lora)


def _trim_adapter(path: Path, adapter: Adapter, energy: float) -> Adapter:
    ranks = adapter.ranks or (adapter.rank,) * max(1, len(factor_matrices(adapter)[0]))
    parts = [thin_svd(single.a, single.b) for _, single in single_adapters(path, adapter)]
    if not all(np.isfinite(s).all() for _, s, _ in parts):
        raise ValueError(f"{path}: the adapter holds NaN or infinity. Restore an earlier checkpoint.")
    # A rank of 0 stays: that layer has no adapter.
    new = tuple(min(old, max(1, least_rank(s, energy))) for (_, s, _), old in zip(parts, ranks, strict=True))
    if new == ranks:
        return adapter
    scale = 1.0 if isinstance(adapter.scale, tuple) else adapter.scale
    if not scale:  # nothing to decompose: every direction is as good as another
        a, b = factor_matrices(adapter)
        return dataclasses.replace(with_factors(adapter, a[:, :, :1], b[:, :1], scale), ranks=None)
    shared = [share_evenly(u[:, :k], s[:k], vt[:k], scale) for (u, s, vt), k in zip(parts, new, strict=True)]
    return _with_ranks(unify_scale_and_rank(adapter), shared, scale)


def extract(
    base: Params,
    tuned: Params,
    *,
    rank: int | None = None,
    energy: float | None = None,
    like: Params | None = None,
    full: bool = True,
    steps: int | None = None,
) -> Params:
    """An adapter out of two checkpoints: of each changed weight, what is nearest to ``tuned - base`` of low rank.

    By the singular value decomposition of the difference (Eckart and Young 1936), weight by weight, on the host.
    Serve a fully fine-tuned net as an adapter beside its base, with ``frozen = lojax.peft.freeze(base, lora)``.

    Args:
        base: The parameters before, its weights quantized or not.
        tuned: The parameters after, of the same structure and shapes.
        rank: The rank of the adapters, lowered where min(m, n) is below it.
        energy: The least rank of each matrix that keeps this share of its difference, ``sum sigma^2`` of what stays
            over all; with ``rank`` no more than that. One of the two is needed.
        like: A ``lora`` tree, or its shapes, that says which weights get an adapter and what their axes mean, such as
            ``model.init`` returned for the base. None: every changed weight of two axes or more, the last one out
            (`lojax.adapters.axes.convention`), which is not how attention heads, stacked layers and experts are.
        full: Whether ``lora`` holds in full what else changed: biases and norms, and what ``like`` leaves out. False
            leaves it as it is in the base.
        steps: None for exact decompositions, of time ``m n min(m, n)``; an integer for randomized ones with so many
            steps of subspace iteration, of time ``m n rank``, for large weights. It needs ``rank``.

    Returns:
        A ``lora`` tree: float32 adapters of scale 1 where a weight changed, None where nothing did.

    Raises:
        ValueError: Neither rank nor energy is given, or one is out of range; the trees differ in structure or shapes;
            ``like`` does not fit; a difference is not finite; or it is called under `jit`.

    >>> import jax, lojax
    >>> base = {"w": jnp.ones((4, 3)), "bias": jnp.zeros(3), "norm": jnp.ones(3)}
    >>> tuned = {**base, "w": base["w"].at[1].add(2.0), "bias": jnp.ones(3)}
    >>> lora = extract(base, tuned, energy=0.99)
    >>> lora["w"].rank, lora["norm"]
    (1, None)
    >>> params = lojax.merge(lojax.peft.freeze(base, lora), lora)
    >>> bool(jnp.allclose(params["w"], tuned["w"])), params["bias"].tolist()
    (True, [1.0, 1.0, 1.0])
    """
    how = Truncation(rank, energy, steps)
    how.check()
    check_flags(full=full)
    before, after = check_same_structure(base, tuned, name="base", other="tuned")
    wanted = None
    if like is not None:
        refuse_bank(like, "like")
        check_same_structure(like, base, name="like", other="base")
        wanted = {path: leaf for path, leaf in flatten(like).items() if is_adapter(leaf) and leaf.a is not None}

    def extract_at(path: Path, _: Leaf) -> Leaf:
        old, new = _as_array(unbox(before[path])), _as_array(unbox(after[path]))
        if old is None and new is None:
            return None
        _check_shapes(path, old, new)
        assert old is not None and new is not None
        axes = _axes(path, old, new, wanted)
        adapter = None if axes is None else _extract_adapter(path, dense(old), dense(new), axes, how)
        if adapter is not None:
            return box_arrays(before[path], adapter)
        if axes is not None or not full or np.array_equal(host_array(path, dense(old)), host_array(path, dense(new))):
            return None
        return after[path]

    return map_paths(extract_at, base)


class Truncation(NamedTuple):
    """How many directions of a difference are taken, and how they are found; see `extract`."""

    rank: int | None
    energy: float | None = None
    steps: int | None = None

    def check(self) -> None:
        """Raises unless the settings fit together."""
        if self.rank is None and self.energy is None:
            raise ValueError(
                "Pass rank=, energy=, or both: rank=8 for adapters of rank 8, energy=0.99 for what it takes."
            )
        if self.rank is not None and (not is_integer(self.rank) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r}; expected an integer of at least 1.")
        if self.energy is not None:
            _check_energy(self.energy)
        if self.steps is not None and (not is_integer(self.steps) or self.steps < 0 or self.rank is None):
            raise ValueError(
                f"steps={self.steps!r} with rank={self.rank!r}; expected an integer of at least 0, and a rank."
            )

    def factors(self, path: Path, difference: np.ndarray) -> Factors:
        """The factors of what is nearest to a difference ``[m, n]``; of rank 0 for one of zero.

        Args:
            path: Where it is, for errors.
            difference: In float64.
        """
        if not np.isfinite(difference).all():
            raise ValueError(f"{path}: tuned - base holds NaN or infinity. Load both checkpoints again.")
        if not difference.any():
            return difference[:, :0], difference[:0]
        rank = min(self.rank or min(difference.shape), *difference.shape)
        if self.steps is None:
            s, v = out_directions(difference)
        else:
            s, v = leading_directions(difference, rank, steps=self.steps)
        rank = min(rank, len(s))
        if self.energy is not None:
            rest = max(0.0, float(np.square(difference).sum() - np.square(s).sum()))  # of what was not decomposed
            rank = min(
                rank, max(1, least_rank(np.append(s, np.sqrt(rest)) if self.steps is not None else s, self.energy))
            )
        root = np.sqrt(s[:rank])
        return difference @ v[:, :rank] / root, root[:, None] * v[:, :rank].T


def _as_array(leaf: Any) -> Any:
    return leaf if leaf is None or hasattr(leaf, "dtype") else np.asarray(leaf)


def _check_shapes(path: Path, old: Any, new: Any) -> None:
    if old is None or new is None or np.shape(old) != np.shape(new):
        got = " and ".join("nothing" if x is None else str(np.shape(x)) for x in (old, new))
        raise ValueError(
            f"{path}: base and tuned hold {got}. They must be checkpoints of one net; a resized embedding or a new "
            "head has no counterpart in the base: take its leaf out of both trees."
        )


def _axes(path: Path, old: Leaf, new: Leaf, wanted: dict[Path, Adapter] | None) -> Axes | None:
    """The axes of the adapter of a parameter; None for one without."""
    is_float = jnp.issubdtype(old.dtype, jnp.floating) and jnp.issubdtype(new.dtype, jnp.floating)
    if wanted is None:
        return convention(len(old.shape)) if is_float and len(old.shape) > 1 and 0 not in old.shape else None
    if path not in wanted:
        return None
    adapter = wanted[path]
    fits = len(adapter.axes) == len(old.shape)
    if (
        not is_float
        or not fits
        or any(n not in (None, m) for n, m in zip(adapter.weight_shape, old.shape, strict=True))
    ):
        raise ValueError(
            f"{path}: like has an adapter for a weight of shape {adapter.weight_shape}, and base holds "
            f"{old.dtype}{list(old.shape)}."
        )
    return adapter.axes


def _extract_adapter(path: Path, old: Leaf, new: Leaf, axes: Axes, how: Truncation) -> Adapter | None:
    """The adapter of one weight; None if it did not change."""
    stack = tuple(old.shape[axis] for axis in positions(axes, "stack"))
    factors = []
    for index in np.ndindex(*stack):
        difference = single_weight(path, new, axes, index) - single_weight(path, old, axes, index)
        factors.append(how.factors(path, difference))
    ranks = [b.shape[0] for _, b in factors]
    if not any(ranks):
        return None
    shapes = array_shapes(axes, tuple(old.shape), max(ranks))
    empty = Adapter(jnp.zeros(shapes["a"], jnp.float32), jnp.zeros(shapes["b"], jnp.float32), 1.0, axes)
    adapter = _with_ranks(empty, factors, 1.0)
    lowered = how.rank is not None and how.energy is None and how.rank > max(ranks)
    return dataclasses.replace(adapter, requested_rank=how.rank if lowered else None)


def _with_ranks(adapter: Adapter, factors: list[Factors], scale: float) -> Adapter:
    """``adapter`` with these factors for the entries of its stack, each of a rank of its own, and this scale."""
    ranks = tuple(b.shape[0] for _, b in factors)
    rank = max(ranks)
    a = np.stack([np.pad(a, ((0, 0), (0, rank - a.shape[1]))) for a, _ in factors])
    b = np.stack([np.pad(b, ((0, rank - b.shape[0]), (0, 0))) for _, b in factors])
    dtype = jnp.result_type(unbox(adapter.a))
    uneven = ranks if len(set(ranks)) > 1 else None
    return dataclasses.replace(with_factors(adapter, jnp.asarray(a, dtype), jnp.asarray(b, dtype), scale), ranks=uneven)


def refuse_moved(path: Path, adapter: Adapter) -> None:
    """Raises if the start of an adapter was taken out of its weight: its product is then not what it learned."""
    if adapter.moved_base:
        raise ValueError(
            f"{path}: the start of this adapter ({adapter.moved_base}) was taken out of its weight, so its product is "
            "not what it learned. Use lojax.subtract(lora, start), which goes with the pretrained weights."
        )


def _check_energy(energy: float) -> None:
    if not is_finite(energy) or not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r}; expected a share above 0 and up to 1, such as 0.99.")
