"""An adapter of a stack as adapters of single matrices, on the host: what analyses go through, one after another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import ARRAYS, Adapter
from lojax.adapters.axes import Axes, positions
from lojax.types import Leaf, Path, Shape

Index = tuple[int, ...]
"""The place of a matrix in its stack, a number for each stack axis; empty for a weight without a stack."""


def stack_shape(adapter: Adapter) -> Shape:
    """The lengths of the stack axes of the weight."""
    count = len(positions(adapter.axes, "stack"))
    shapes = [x.shape for name, x in adapter.arrays.items() if ARRAYS[name][0] == "stack"]
    return tuple(shapes[0][:count]) if count else ()


def single_adapters(path: Path, adapter: Adapter) -> Iterator[tuple[Index, Adapter]]:
    """The adapters of the single matrices ``[m, n]`` of a weight, in the order of its stack.

    Args:
        path: Where it is, for errors.
        adapter: An adapter of any variant, in boxes or not.

    Yields:
        The place in the stack, and an adapter with axes ``("in", "out")`` and NumPy arrays: those that `ARRAYS` says,
        with one axis for each role. ``b`` is multiplied by the scale, which is then 1, and ``a`` and ``b`` have the
        rank of that entry, without padding.

    Raises:
        ValueError: The arrays have no values here: under `jit`, as shapes alone, or on other processes.
    """
    arrays = {name: host_array(f"{path}: {name}", x) for name, x in adapter.arrays.items()}
    counts = {role: len(positions(adapter.axes, role)) for role in ("stack", "in", "out")}
    shape = stack_shape(adapter)
    for i, index in enumerate(np.ndindex(*shape)):
        single = {}
        for name, x in arrays.items():
            roles = ARRAYS[name]
            x = x[index] if roles[0] == "stack" else x
            single[name] = x.reshape(_lengths(x.shape, [role for role in roles if role != "stack"], counts))
        if "a" in single:
            rank = adapter.ranks[i] if adapter.ranks else single["a"].shape[1]
            scale = adapter.scale[i] if isinstance(adapter.scale, tuple) else adapter.scale
            single["a"] = single["a"][:, :rank]
            single["b"] = single["b"][:rank].astype(np.float64) * scale
        plain = Adapter(None, None, 1.0, ("in", "out"), tokens=adapter.tokens)
        yield index, dataclasses.replace(plain, **single)


def single_weight(path: Path, weight: Leaf, axes: Axes, index: Index) -> np.ndarray:
    """One matrix ``[m, n]`` of a weight, in float64.

    Args:
        path: Where it is, for errors.
        weight: An array ``[*stack, *in, *out]``, its axes in any order, out of its box and not quantized.
        axes: Their roles.
        index: The place in the stack.
    """
    places = dict(zip(positions(axes, "stack"), index, strict=True))
    matrix = weight[tuple(places.get(axis, slice(None)) for axis in range(len(axes)))]
    remaining = [axis for axis in range(len(axes)) if axis not in places]
    order = [remaining.index(axis) for role in ("in", "out") for axis in positions(axes, role)]
    x = host_array(path, matrix).transpose(order)
    return x.reshape(math.prod(x.shape[: len(positions(axes, "in"))]), -1).astype(np.float64)


def update_factors(adapter: Adapter, m: int | None) -> tuple[np.ndarray, np.ndarray] | None:
    """The update of a single matrix as one product ``[m, q] @ [q, n]``; None where it is not of low rank (DoRA).

    Args:
        adapter: As `single_adapters` gives it.
        m: The length of the in axis. None where it is not known, since the adapter has only token rows; their factor
            then stands for the rows alone, which have the same singular values.
    """
    extra = adapter.arrays.keys() - {"a", "b", "rows"}
    if extra:
        return None
    factors = []
    if adapter.a is not None:
        m = adapter.a.shape[0]
        factors.append((adapter.a.astype(np.float64), adapter.b))
    if adapter.rows is not None:
        assert adapter.tokens is not None
        tokens = len(adapter.tokens)
        picks = np.eye(tokens)
        if m is not None:
            picks = np.zeros((m, tokens))
            picks[list(adapter.tokens), range(tokens)] = 1
        factors.append((picks, adapter.rows.astype(np.float64)))
    return np.concatenate([a for a, _ in factors], 1), np.concatenate([b for _, b in factors], 0)


def host_array(name: str, x: Any) -> np.ndarray:
    """``x`` as a NumPy array, or an error that says why it has no values here."""
    if isinstance(x, Tracer):
        raise ValueError(f"{name} is traced, and this reads values, which do not exist under jit: call it outside.")
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} is a shape, and this reads values. Pass arrays.")
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"{name} is sharded over several processes, and this reads values on one. Gather it first: "
            "jax.experimental.multihost_utils.process_allgather."
        )
    return np.asarray(x)


def _lengths(shape: Shape, roles: list[str], counts: dict[str, int]) -> Shape:
    """The shape with all axes of one role made one."""
    lengths, start = [], 0
    for role in roles:
        stop = start + counts.get(role, 1)
        lengths.append(math.prod(shape[start:stop]))
        start = stop
    return tuple(lengths)
