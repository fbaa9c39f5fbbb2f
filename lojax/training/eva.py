"""EVA: adapters that start from the inputs of their weights, with the ranks where those are richest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter, array_shapes
from lojax.adapters.axes import size
from lojax.adapters.initializers import key_for
from lojax.adapters.matrices import zero_above_rank
from lojax.adapters.metadata import unbox
from lojax.lowrank.second_moment import SecondMomentProbe
from lojax.training.subspace_iteration import (
    Columns,
    check_batches,
    draw_columns,
    map_adapters,
    sum_over_batches,
    unit_scale_adapter,
)
from lojax.types import Array, Key, Params, Path, PyTree, Shape

ApplyFn = Callable[[Params, Params, PyTree], PyTree]
"""``(frozen, lora, batch) -> outputs``."""


def eva(
    apply: ApplyFn,
    frozen: Params,
    lora: Params,
    batches: Iterable[PyTree],
    *,
    rho: float = 1.0,
    steps: int = 4,
    key: Key | None = None,
) -> Params:
    """Starts every ``a`` at the leading right singular vectors of its weight's inputs (EVA, Paischer et al. 2024).

    arXiv:2410.07170, §3: with ``x`` ``[tokens, m]`` all inputs of a weight over ``batches``, ``a`` holds the ``r``
    directions that explain most of ``x``, and ``b`` is zero, so the net starts at the pretrained model. With
    ``rho`` above 1 the ranks are reallocated, their sum unchanged, to the directions that explain the largest
    share of their weight's inputs (alg. 1); a weight that gets none is frozen. The scales stay.

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
    batches, adapters = check_batches("eva", frozen, lora, batches, steps)
    # By their adapters: codes that the net dequantizes may be stored in another shape.
    shapes = {path: adapter.weight_shape for path, adapter in adapters.items()}
    weights: Any = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    max_ranks = {path: _max_ranks(adapter, weights[path].shape, rho) for path, adapter in adapters.items()}

    apply_moment = _moment(apply, frozen, lora, batches, weights)
    columns = draw_columns(key, adapters, weights, "in", {path: max(ranks) for path, ranks in max_ranks.items()})
    image = columns
    for _ in range(steps):
        columns = {path: jnp.linalg.qr(c)[0] for path, c in image.items()}
        image = apply_moment(columns)
    variances: Columns = {}
    for path, c in columns.items():
        # Rayleigh-Ritz: the eigenvectors of the moment within the span of the columns.
        projected = c.mT @ image[path]
        variances[path], rotation = jnp.linalg.eigh((projected + projected.mT) / 2)  # ascending
        if not bool(jnp.all(jnp.isfinite(variances[path])) & jnp.all(variances[path][:, -1] > 0)):
            raise ValueError(
                f"{path}: eva saw no finite input other than zero. Its weight meets no activation in a factored "
                "product (a look-up has none), or the outputs do not depend on it. Leave it out of the targets."
            )
        variances[path], columns[path] = variances[path][:, ::-1], c @ rotation[:, :, ::-1]
    ranks = {path: _ranks(adapter, variances[path].shape[0]) for path, adapter in adapters.items()}
    if rho > 1:
        rest = _unexplained_variance(key, columns, apply_moment)
        shares = {path: v / (v.sum(1) + rest[path])[:, None] for path, v in variances.items()}
        ranks = _allocate_ranks(shares, max_ranks, sum(map(sum, ranks.values())))

    def start(path: Path, adapter: Adapter) -> Adapter | None:
        return _start_at(adapter, weights[path].shape, columns[path], ranks[path])

    return map_adapters(lora, start, boxes=frozen)


def _moment(
    apply: ApplyFn, frozen: Params, lora: Params, batches: Sequence[PyTree], weights: Mapping[Path, Array]
) -> Callable[[Columns], Columns]:
    """``c -> x^T x c`` with ``x`` the inputs over all batches: the gradient of watching adapters."""

    @jax.jit
    def batch_moment(frozen: Params, lora: Params, columns: Columns, batch: PyTree) -> Columns:
        def sum_of_outputs(columns: Columns) -> Array:
            watching = map_adapters(lora, lambda path, adapter: _watch(adapter, weights[path].shape, columns[path]))
            outputs = jax.tree.leaves(apply(frozen, watching, batch))
            # Any scalar will do: a watching adapter answers with its own cotangent, whatever the one that comes in.
            floating = [y for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact)]
            return sum((jnp.sum(y.astype(jnp.float32)) for y in floating), start=jnp.zeros(()))

        return jax.grad(sum_of_outputs)(columns)

    return lambda columns: sum_over_batches(batch_moment(frozen, lora, columns, batch) for batch in batches)


def _watch(adapter: Adapter, shape: Shape, columns: Array) -> Adapter:
    """An adapter that leaves the net as it is and whose gradient is the moment on the columns."""
    entries, _, k = columns.shape
    b = jnp.zeros((entries, k, size(adapter.axes, shape, "out")), columns.dtype)
    return unit_scale_adapter(SecondMomentProbe, adapter, shape, columns, b)


def _ranks(adapter: Adapter, entries: int) -> tuple[int, ...]:
    return adapter.ranks or (adapter.rank,) * entries


def _max_ranks(adapter: Adapter, shape: Shape, rho: float) -> tuple[int, ...]:
    """The largest rank that each entry of the stack may get."""
    entries, m, n = (size(adapter.axes, shape, role) for role in ("stack", "in", "out"))
    return tuple(min(round(rho * r), m, n) for r in _ranks(adapter, entries))


def _unexplained_variance(
    key: Key | None, columns: Columns, apply_moment: Callable[[Columns], Columns]
) -> dict[Path, Array]:
    """The trace of ``x^T x`` outside of the columns ``[S]``, estimated as Hutch++ does (Meyer et al. 2020)."""
    key = jax.random.fold_in(jax.random.key(0) if key is None else key, 1)
    probes = {}
    for path, c in columns.items():
        signs = jax.random.rademacher(key_for(key, path), c.shape, c.dtype)
        probes[path] = signs - c @ (c.mT @ signs)
    image = apply_moment(probes)
    return {path: jnp.maximum(jnp.sum(p * image[path], (1, 2)) / p.shape[2], 0) for path, p in probes.items()}


def _allocate_ranks(
    shares: Columns, max_ranks: Mapping[Path, tuple[int, ...]], budget: int
) -> dict[Path, tuple[int, ...]]:
    """The rank of every entry: the ``budget`` directions with the largest shares, up to ``max_ranks`` for each."""
    values = {path: np.asarray(x) for path, x in shares.items()}
    directions = [(path, i, j) for path, limits in max_ranks.items() for i, n in enumerate(limits) for j in range(n)]
    directions.sort(key=lambda direction: -values[direction[0]][direction[1:]])
    ranks = {path: [0] * len(limits) for path, limits in max_ranks.items()}
    for path, i, _ in directions[:budget]:
        ranks[path][i] += 1
    return {path: tuple(counts) for path, counts in ranks.items()}


def _start_at(adapter: Adapter, shape: Shape, columns: Array, ranks: tuple[int, ...]) -> Adapter | None:
    """``adapter`` with the first columns for ``a`` and zero for ``b``; None where no entry has a rank."""
    rank, dtype = max(ranks), unbox(adapter.a).dtype
    if not rank:
        return None
    shapes = array_shapes(adapter.axes, shape, rank)
    uneven = ranks if len(set(ranks)) > 1 else None
    a = columns[:, :, :rank].reshape(shapes["a"])
    if uneven:
        a = zero_above_rank(a, ranks, adapter.axes)
    requested_rank = adapter.requested_rank if rank == adapter.rank else None
    a, b = a.astype(dtype), jnp.zeros(shapes["b"], dtype)
    return dataclasses.replace(adapter, a=a, b=b, ranks=uneven, requested_rank=requested_rank)
