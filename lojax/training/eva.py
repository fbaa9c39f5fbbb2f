"""EVA: adapters that start from the inputs of their weights, with the ranks where those are richest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import array_shapes, size
from lojax.adapters.create import within
from lojax.adapters.initializers import key_for, zeros
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.lowrank.second_moment import SecondMomentProbe
from lojax.training.subspace_iteration import Columns, checked_batches, plain, random_columns, replaced, total


def eva(
    apply: Callable[[Any, Any, Any], Any],
    frozen: Any,
    lora: Any,
    batches: Iterable[Any],
    *,
    rho: float = 1.0,
    steps: int = 4,
    key: jax.Array | None = None,
) -> Any:
    """Starts every ``a`` at the leading right singular vectors of its weight's inputs (EVA, Paischer et al. 2024).

    arXiv:2410.07170, §3: with ``x`` ``[tokens, m]`` all inputs of a weight over ``batches``, ``a`` holds the ``r``
    directions that explain most of ``x``, and ``b`` is zero, so the net starts at the pretrained model. With
    ``rho`` above 1 the ranks are dealt out again, their sum unchanged, to the directions that explain the
    largest share of their weight's inputs (alg. 1); a weight that gets none is frozen. The scales stay.

    Args:
        apply: ``apply(frozen, lora, batch)`` runs the net with `Model.apply`; any outputs that depend on all
            adapted weights will do, and a loss too.
        frozen: The frozen tree.
        lora: The trained tree; only where its adapters are and their ranks matter.
        batches: Read ``steps`` times (once more with ``rho`` above 1): a list, or what can be iterated again.
        rho: The largest rank that an entry may get, over the rank that it has.
        steps: Steps of subspace iteration.
        key: Where the iteration starts; the result hardly depends on it.

    Returns:
        The new ``lora``; ``frozen`` stays.

    Raises:
        ValueError: No batches, a setting out of range, or an adapter whose weight meets no input in a factored product.

    >>> import lojax
    >>> model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=1)
    >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> frozen, lora = model.init(jax.random.key(0), {"w": jnp.ones((3, 4))}, x)
    >>> lora = eva(model.apply, frozen, lora, [x])
    >>> jnp.abs(lora["w"].a[:, 0]).round(3).tolist()
    [1.0, 0.0, 0.0]
    """
    if not (math.isfinite(rho) and rho >= 1):
        raise ValueError(f"eva: rho={rho}; expected a finite number of at least 1 (1 leaves the ranks as they are).")
    batches, adapters = checked_batches("eva", frozen, lora, batches, steps)
    weights = {path: unbox(leaf) for path, leaf in flatten(frozen).items() if path in adapters}
    most = {path: _most(adapter, weights[path].shape, rho) for path, adapter in adapters.items()}

    on = _moments(apply, frozen, lora, batches, weights)
    columns = random_columns(key, adapters, weights, "in", {path: max(ranks) for path, ranks in most.items()})
    image = columns
    for _ in range(steps):
        columns = {path: jnp.linalg.qr(c)[0] for path, c in image.items()}
        image = on(columns)
    values: Columns = {}
    for path, c in columns.items():
        squares, turn = jnp.linalg.eigh(_symmetric(c.mT @ image[path]))
        values[path], columns[path] = squares[:, ::-1], c @ turn[:, :, ::-1]
        if not bool(jnp.all(jnp.isfinite(squares)) & jnp.all(squares[:, -1] > 0)):
            raise ValueError(
                f"{path}: eva saw no finite input other than zero. Its weight meets no activation in a factored "
                "product (a look-up has none), or the outputs do not depend on it. Leave it out of the targets."
            )
    ranks = {path: _ranks(adapter, values[path].shape[0]) for path, adapter in adapters.items()}
    if rho > 1:
        rest = _unexplained(key, columns, on)
        shares = {path: values[path] / (values[path].sum(1) + rest[path])[:, None] for path in values}
        ranks = _dealt(shares, most, sum(map(sum, ranks.values())))

    def started(path: str, adapter: Adapter) -> Adapter | None:
        return _of_ranks(adapter, weights[path].shape, columns[path], ranks[path])

    return replaced(lora, started, boxes=frozen)


def _moments(
    apply: Callable[[Any, Any, Any], Any], frozen: Any, lora: Any, batches: Sequence[Any], weights: Mapping[str, Any]
) -> Callable[[Columns], Columns]:
    """``x^T x`` on columns, with ``x`` the inputs over all batches: the gradient of watching adapters."""

    @jax.jit
    def moments(frozen: Any, lora: Any, columns: Columns, batch: Any) -> Columns:
        def outputs(columns: Columns) -> Any:
            watching = replaced(lora, lambda path, adapter: _watching(adapter, weights[path].shape, columns[path]))
            found = jax.tree.leaves(apply(frozen, watching, batch))
            return sum(jnp.sum(y.astype(jnp.float32)) for y in found if jnp.issubdtype(y.dtype, jnp.inexact))

        return jax.grad(outputs)(columns)

    return lambda columns: total(moments(frozen, lora, columns, batch) for batch in batches)


def _watching(adapter: Adapter, shape: tuple[int, ...], columns: jax.Array) -> Adapter:
    entries, _, k = columns.shape
    return plain(
        SecondMomentProbe, adapter, shape, columns, zeros((entries, k, size(adapter.axes, shape, "out")), columns.dtype)
    )


def _ranks(adapter: Adapter, entries: int) -> tuple[int, ...]:
    return adapter.ranks or (adapter.rank,) * entries


def _most(adapter: Adapter, shape: tuple[int, ...], rho: float) -> tuple[int, ...]:
    """The largest rank that each entry of the stack may get."""
    entries, m, n = (size(adapter.axes, shape, role) for role in ("stack", "in", "out"))
    return tuple(min(round(rho * r), m, n) for r in _ranks(adapter, entries))


def _symmetric(x: jax.Array) -> jax.Array:
    return (x + x.mT) / 2


def _unexplained(key: jax.Array | None, columns: Columns, on: Callable[[Columns], Columns]) -> Columns:
    """The trace of ``x^T x`` outside of the columns ``[S]``, estimated as Hutch++ does (Meyer et al. 2020)."""
    key = jax.random.fold_in(jax.random.key(0) if key is None else key, 1)
    probes = {}
    for path, c in columns.items():
        signs = jax.random.rademacher(key_for(key, path), c.shape, c.dtype)
        probes[path] = signs - c @ (c.mT @ signs)
    image = on(probes)
    return {path: jnp.maximum(jnp.sum(p * image[path], (1, 2)) / p.shape[2], 0) for path, p in probes.items()}


def _dealt(shares: Columns, most: Mapping[str, tuple[int, ...]], budget: int) -> dict[str, tuple[int, ...]]:
    """The rank of every entry: the ``budget`` directions of the largest shares, at most so many an entry."""
    numbers = {path: np.asarray(x) for path, x in shares.items()}
    places = [(path, i, j) for path, ms in most.items() for i, count in enumerate(ms) for j in range(count)]
    places.sort(key=lambda place: -numbers[place[0]][place[1:]])
    ranks = {path: [0] * len(ms) for path, ms in most.items()}
    for path, i, _ in places[:budget]:
        ranks[path][i] += 1
    return {path: tuple(counts) for path, counts in ranks.items()}


def _of_ranks(adapter: Adapter, shape: tuple[int, ...], columns: jax.Array, ranks: tuple[int, ...]) -> Adapter | None:
    """``adapter`` with the first columns for ``a`` and zero for ``b``; None where no entry has a rank."""
    rank, dtype = max(ranks), unbox(adapter.a).dtype
    if not rank:
        return None
    shapes = array_shapes(adapter.axes, shape, rank)
    uneven = ranks if len(set(ranks)) > 1 else None
    a = columns[:, :, :rank].reshape(shapes["a"])
    if uneven:
        a = a * within(ranks, rank, a, stack=adapter.axes.count("stack")).astype(a.dtype)
    return dataclasses.replace(adapter, a=a.astype(dtype), b=zeros(shapes["b"], dtype), ranks=uneven)
