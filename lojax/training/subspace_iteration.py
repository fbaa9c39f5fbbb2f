"""What the starts from data share: subspace iteration on large matrices that are never materialized.

`lojax.eva` and `lojax.lora_ga` need the leading singular vectors of a large matrix of which only products with a few
columns are at hand. Every such product is a gradient with respect to an adapter that adds nothing, so neither a
weight-sized gradient nor an activation is ever kept. The vectors come from subspace iteration (Halko et al. 2011,
arXiv:0909.4061, alg. 4.4). Letters: ``S`` entries of a stack, ``m`` in, ``n`` out, ``k`` columns, a few more than
are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import Adapter, array_shapes, box_arrays, is_adapter
from lojax.adapters.axes import size
from lojax.adapters.initializers import OVERSAMPLES, key_for
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.trees import check_pair
from lojax.types import Array, Key, Leaf, Params, Path, PyTree, Shape

Columns = dict[Path, Array]
"""For every adapter, by path, the columns of one matrix for each entry of its stack."""


def check_batches(
    caller: str, frozen: Params, lora: Params, batches: Iterable[PyTree], steps: int
) -> tuple[Sequence[PyTree], dict[Path, Adapter]]:
    """The batches, such that they can be read again, and the adapters by path."""
    check_pair(frozen, lora)
    readable: Any = list(batches) if iter(batches) is batches else batches  # an iterator can be read only once
    if next(iter(readable), None) is None:
        raise ValueError(f"{caller}: no batches. It starts the adapters from data: give at least one batch.")
    if steps < 1:
        raise ValueError(f"{caller}: steps={steps}; expected at least 1.")
    adapters = {path: x for path, x in flatten(lora).items() if is_adapter(x) and x.a is not None}
    if not adapters:
        raise ValueError(f"{caller}: lora holds no low-rank adapter. Pass the pair that init returned for its targets.")
    for path, adapter in adapters.items():
        if adapter.moved_base is not None:
            raise ValueError(
                f"{path}: init={adapter.moved_base!r} took the start of this adapter out of the frozen weight, and "
                f"{caller} would drop the adapter: the net would no longer start at the pretrained model. Call "
                f'{caller} on what init="kaiming" returns.'
            )
    return readable, adapters


def map_adapters(lora: Params, f: Callable[[Path, Adapter], Adapter | None], *, boxes: Params = None) -> Params:
    """``lora`` with ``f(path, adapter)`` for its adapters, in boxes like those of the weights in ``boxes``."""

    def replace(path: Path, leaf: Leaf, box: Leaf = None) -> Leaf:
        if not is_adapter(leaf) or leaf.a is None:
            return leaf
        adapter = f(path, leaf)
        return adapter if adapter is None or box is None else box_arrays(box, adapter)

    return map_paths(replace, lora) if boxes is None else map_paths(replace, lora, boxes)


def unit_scale_adapter(kind: type[Adapter], adapter: Adapter, shape: Shape, a: Array, b: Array) -> Adapter:
    """A plain adapter of scale 1 at the same weight, with ``a`` ``[S, m, k]`` and ``b`` ``[S, k, n]``."""
    shapes = array_shapes(adapter.axes, shape, a.shape[2])
    return kind(a.reshape(shapes["a"]), b.reshape(shapes["b"]), 1.0, adapter.axes)


def sum_over_batches(products: Iterable[Columns]) -> Columns:
    """The sum of the products of all batches."""
    return functools.reduce(lambda total, product: jax.tree.map(jnp.add, total, product), products)


def draw_columns(
    key: Key | None,
    adapters: Mapping[Path, Adapter],
    weights: Mapping[Path, Array],
    role: Literal["in", "out"],
    ranks: Mapping[Path, int],
) -> Columns:
    """Random columns ``[S, size of the role, k]`` to start from, `OVERSAMPLES` more than the rank where they fit."""
    key = jax.random.key(0) if key is None else key
    columns = {}
    for path, adapter in adapters.items():
        entries, m, n = (size(adapter.axes, weights[path].shape, r) for r in ("stack", "in", "out"))
        # The matrix is [m, m] for the moments of inputs and [m, n] for gradients: no more columns than its rank.
        k = min(ranks[path] + OVERSAMPLES, m) if role == "in" else min(ranks[path] + OVERSAMPLES, m, n)
        columns[path] = jax.random.normal(key_for(key, path), (entries, m if role == "in" else n, k), jnp.float32)
    return columns
