"""Starts from data, what they share: products with large matrices that are never formed.

`lojax.eva` and `lojax.lora_ga` need the leading singular vectors of a large matrix of which only products with some
columns are at hand, and every such product is a gradient with respect to an adapter that adds nothing: no weight-sized
gradient and no activation is ever held. The vectors come from subspace iteration (Halko et al. 2011, arXiv:0909.4061,
alg. 4.4). Letters: ``S`` entries of a stack, ``m`` in, ``n`` out, ``k`` columns, a few more than are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import array_shapes, size
from lojax.adapters.decompositions import OVERSAMPLES
from lojax.adapters.initializers import key_for
from lojax.adapters.metadata import box_arrays
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.trees import check_pair

Columns = dict[str, jax.Array]
"""For every adapter, by path, the columns of one matrix for each entry of its stack."""


def checked_batches(
    who: str, frozen: Any, lora: Any, batches: Iterable[Any], steps: int
) -> tuple[Sequence[Any], dict[str, Adapter]]:
    """The batches, such that they can be read again, and the adapters by path."""
    check_pair(frozen, lora)
    read = list(batches) if iter(batches) is batches else batches
    if next(iter(read), None) is None:
        raise ValueError(f"{who}: no batches. It starts the adapters from data: give at least one batch.")
    if steps < 1:
        raise ValueError(f"{who}: steps={steps}; expected at least 1.")
    adapters = {path: x for path, x in flatten(lora).items() if is_adapter(x) and x.a is not None}
    if not adapters:
        raise ValueError(f"{who}: lora holds no low-rank adapter. Pass the pair that init returned for some targets.")
    return read, adapters  # type: ignore[return-value]


def replaced(lora: Any, f: Callable[[str, Adapter], Any], *, boxes: Any = None) -> Any:
    """``lora`` with ``f(path, adapter)`` for its adapters, in boxes like those of the weights in ``boxes``."""

    def one(path: str, leaf: Any, box: Any = None) -> Any:
        if not is_adapter(leaf) or leaf.a is None:
            return leaf
        new = f(path, leaf)
        return new if new is None or box is None else box_arrays(box, new)

    return map_paths(one, lora) if boxes is None else map_paths(one, lora, boxes)


def plain(kind: type[Adapter], adapter: Adapter, shape: tuple[int, ...], a: jax.Array, b: jax.Array) -> Adapter:
    """An adapter of scale 1 at the same weight, of ``a`` ``[S, m, k]`` and ``b`` ``[S, k, n]``."""
    shapes = array_shapes(adapter.axes, shape, a.shape[2])
    return kind(a.reshape(shapes["a"]), b.reshape(shapes["b"]), 1.0, adapter.axes)


def total(parts: Iterable[Columns]) -> Columns:
    """The sum of ``parts``, one a batch."""
    found: Columns | None = None
    for part in parts:
        found = part if found is None else jax.tree.map(jnp.add, found, part)
    assert found is not None
    return found


def random_columns(
    key: jax.Array | None,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, Any],
    role: Any,
    wanted: dict[str, int],
) -> Columns:
    """Random columns ``[S, size of the role, k]``, a few more than wanted."""
    key = jax.random.key(0) if key is None else key
    found = {}
    for path, adapter in adapters.items():
        entries, m, n = (size(adapter.axes, weights[path].shape, r) for r in ("stack", "in", "out"))
        k = min(wanted[path] + OVERSAMPLES, m, n) if role == "out" else min(wanted[path] + OVERSAMPLES, m)
        found[path] = jax.random.normal(key_for(key, path), (entries, m if role == "in" else n, k), jnp.float32)
    return found
