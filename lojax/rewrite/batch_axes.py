"""Which axis of each argument and each output counts the rows of a batch, and whether the rows of a net meet.

The outputs are not asked for: the net is traced once on shapes, with a number of rows so odd that an axis of this
length can be nothing else (`PROBE`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lojax.adapters.paths import path_of
from lojax.compat import opened, var_type
from lojax.text import spec
from lojax.types import Array, Eqn, Jaxpr, PyTree

BatchAxes: TypeAlias = int | Sequence[Any] | Mapping[Any, Any] | None
"""``batch_axes=`` of `lojax.Model.apply`."""

PROBE = 1009
"""A prime: an axis whose length is a multiple of it (and of the number of rows) holds the rows of the probe."""

SHARED = "shared"
"""In the place of an axis: all rows share the leaf."""

KEY = "key"
"""In the place of an axis: the leaf is one PRNG key, and every row gets its own."""

CACHE = "cache"
"""The collection of a Linen ``variables`` dict that holds an entry for each row: keys and values while decoding."""

REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
CUMULATIONS = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of a call, split into leaves with an axis of rows and all others.

    Attributes:
        leaves: All leaves.
        tree: Their tree.
        axes: For each leaf, its axis of rows, `KEY`, or None.
        names: For each leaf, what errors call it.
    """

    leaves: list[Any]
    tree: Any
    axes: list[int | str | None]
    names: list[str]

    @property
    def mapped(self) -> list[int]:
        """The positions of the leaves that differ from row to row."""
        return [i for i, axis in enumerate(self.axes) if axis is not None]

    def rebuild(self, values: Mapping[int, Any]) -> Any:
        """The arguments with other leaves at the positions in ``values``."""
        return jax.tree.unflatten(self.tree, [values.get(i, leaf) for i, leaf in enumerate(self.leaves)])

    def own_keys(self, rows: int) -> list[Any]:
        """The leaves that differ from row to row; of one key, a key for each row."""
        return [
            jax.vmap(jax.random.fold_in, (None, 0))(self.leaves[i], jnp.arange(rows))
            if self.axes[i] == KEY
            else self.leaves[i]
            for i in self.mapped
        ]

    def in_axes(self) -> list[int]:
        """The axes of `own_keys` that count the rows."""
        return [axis if isinstance(axis := self.axes[i], int) else 0 for i in self.mapped]

    def shard_like_rows(self, x: Array) -> Array:
        """``x``, with an entry for each row in front, sharded as the rows of the arguments on explicit mesh axes."""
        for i in self.mapped:
            sharding, axis = getattr(jax.typeof(self.leaves[i]), "sharding", None), self.axes[i]
            if isinstance(axis, int) and sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
                spec = PartitionSpec(sharding.spec[axis], *[None] * (x.ndim - 1))
                return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))
        return x

    def one_row(self, values: Sequence[Array]) -> Any:
        """The arguments of one row, whose batch has length one."""
        own = {}
        for i, x in zip(self.mapped, values, strict=True):
            axis = self.axes[i]
            own[i] = jnp.expand_dims(x, axis) if isinstance(axis, int) else x
        return self.rebuild(own)

    def probe(self, rows: int) -> dict[int, jax.ShapeDtypeStruct]:
        """The shapes of the leaves with rows, for another number of rows."""
        shapes = {}
        for i in self.mapped:
            x, axis = self.leaves[i], self.axes[i]
            if isinstance(axis, int):
                shapes[i] = jax.ShapeDtypeStruct((*x.shape[:axis], rows, *x.shape[axis + 1 :]), x.dtype)
        return shapes


def split_arguments(arguments: dict[str, PyTree], rows: int, batch_axes: Mapping[str, Any]) -> Arguments:
    """The leaves of ``arguments`` with their axes of rows.

    Args:
        arguments: The arguments by name.
        rows: The number of rows of the batch.
        batch_axes: The axis for each argument, or a tree of axes that is a prefix of it, by the same names.

    Raises:
        ValueError: An array has no axis of rows where there should be one.
    """
    named, tree = jax.tree_util.tree_flatten_with_path(arguments)
    broadcast = {name: _broadcast(name, batch_axes[name], value) for name, value in arguments.items()}
    asked = jax.tree.leaves(broadcast)
    leaves, axes, names = [], [], []
    for (keys, leaf), axis in zip(named, asked, strict=True):
        name = path_of(keys)
        leaves.append(leaf)
        names.append(name)
        axes.append(_row_axis(name, leaf, axis, rows))
    return Arguments(leaves, tree, axes, names)


def named_axes(args: Sequence[Any], kwargs: Mapping[str, Any], batch_axes: BatchAxes) -> dict[str, Any]:
    """``batch_axes`` by the name of each argument: ``args/0``, or ``kwargs/mask``.

    >>> named_axes((1, 2), {"mask": 3}, {0: 1})
    {'args/0': 1, 'args/1': 0, 'kwargs/mask': 0}
    """
    names = {i: f"args/{i}" for i in range(len(args))} | {name: f"kwargs/{name}" for name in kwargs}
    if batch_axes is None or isinstance(batch_axes, int):
        return dict.fromkeys(names.values(), batch_axes)
    if isinstance(batch_axes, Mapping):
        unknown = [key for key in batch_axes if key not in names]
        if unknown:
            raise ValueError(
                f"batch_axes names the argument {unknown[0]!r}, and apply got {', '.join(map(repr, names)) or 'none'}. "
                "Use the position of an argument after lora, or its keyword."
            )
        return {name: batch_axes.get(key, 0) for key, name in names.items()}
    if not isinstance(batch_axes, Sequence) or isinstance(batch_axes, str) or len(batch_axes) != len(args):
        raise ValueError(
            f"batch_axes={batch_axes!r}; expected an axis, one for each of the {len(args)} positional arguments after "
            "lora, or a dict by position or keyword."
        )
    return {name: batch_axes[key] if isinstance(key, int) else 0 for key, name in names.items()}


def split_cache_axes(batch_axes: BatchAxes, kwargs: Mapping[str, Any]) -> tuple[BatchAxes, Any]:
    """``batch_axes`` without its entry for the cache, and that entry: axes, or "auto"."""
    if isinstance(batch_axes, Mapping) and CACHE in batch_axes and CACHE not in kwargs:
        return {name: axis for name, axis in batch_axes.items() if name != CACHE}, batch_axes[CACHE]
    return batch_axes, "auto"


def find_cache_axes(cache: PyTree, rows: int, asked: Any) -> PyTree:
    """The axis of rows of each leaf of a Linen cache: the one of their number. What counts the steps has none."""
    if asked != "auto":
        return asked

    def axis(keys: tuple[Any, ...], leaf: Any) -> int | None:
        axes = [d for d, n in enumerate(jnp.shape(leaf)) if n == rows]
        if len(axes) > 1:
            raise ValueError(
                f"{CACHE}/{path_of(keys)} ({spec(leaf)}) has {len(axes)} axes of the length of the batch, {rows}. Say "
                'which one counts the rows with batch_axes={"cache": axis}, or a tree of axes.'
            )
        return axes[0] if axes else None

    return jax.tree_util.tree_map_with_path(axis, cache)


def _broadcast(name: str, prefix: Any, tree: PyTree) -> PyTree:
    """The axes in ``prefix`` for every leaf of ``tree``."""
    # None is a leaf of the prefix, and no leaf of the arguments.
    prefix = jax.tree.map(lambda axis: SHARED if axis is None else axis, prefix, is_leaf=lambda x: x is None)
    try:
        return jax.tree.broadcast(prefix, tree)
    except ValueError as error:
        raise ValueError(f"batch_axes of {name} is no prefix of the argument: {error}") from None


def is_raw_key(leaf: Any) -> bool:
    """Whether an array may be one PRNG key in the old style, as `jax.random.PRNGKey` makes it."""
    return leaf.dtype == jnp.uint32 and leaf.shape == jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape


def _row_axis(name: str, leaf: Any, axis: Any, rows: int) -> int | str | None:
    """The axis of rows of one leaf, `KEY` for a single key, None for what all rows share."""
    if axis == SHARED or not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return None
    shape, dtype = leaf.shape, leaf.dtype
    if not shape:
        return KEY if jnp.issubdtype(dtype, jax.dtypes.prng_key) else None
    if is_raw_key(leaf):
        return KEY
    if not isinstance(axis, int) or not -len(shape) <= axis < len(shape) or shape[axis] != rows:
        got = f"{shape[axis]} at axis {axis}" if isinstance(axis, int) and axis < len(shape) else f"no axis {axis}"
        raise ValueError(
            f"adapter= or active= has {rows} rows, and {name} ({spec(leaf)}) has {got}. Say where its rows are with "
            "batch_axes={position or keyword: axis}, with None where all rows share the argument."
        )
    return axis % len(shape)


# --- outputs ---


@dataclasses.dataclass(frozen=True)
class OutputAxes:
    """Where the rows are in the outputs of a net.

    Attributes:
        axes: For each leaf, its axis of rows; None where it has none.
        names: For each leaf, what errors call it.
    """

    axes: list[int | None]
    names: list[str]


def probe_outputs(f: Callable[[dict[int, Any]], PyTree], arguments: Arguments, rows: int, check: bool) -> OutputAxes:
    """The axes of rows of what ``f(leaves)`` returns, by a trace on shapes.

    Args:
        f: The net as a function of those leaves of ``arguments`` that have rows.
        arguments: The arguments.
        rows: The number of rows of the batch.
        check: Whether to refuse a net whose rows meet.

    Raises:
        ValueError: An output merges its rows with another axis, or two rows meet.
    """
    # A multiple of the number of rows: what divides that divides this (shards, micro-batches).
    count = max(rows, 1) * PROBE
    try:
        program, shapes = jax.make_jaxpr(f, return_shape=True)(arguments.probe(count))
    except Exception as error:
        error.add_note(
            f"lojax traced the net with {count} rows instead of {rows}, to see where the rows are in its outputs. If "
            "the net depends on their number, or the axis is not that of the rows, use jax.vmap over the rows and "
            "bank.for_vmap(), or say batch_axes=."
        )
        raise
    if check and (meeting := _find_meeting(program, count)):
        raise ValueError(
            f"The net lets the rows of a batch meet ({meeting}), as batch statistics in training or experts of limited "
            "capacity do, so that its result for a row depends on which rows are beside it, and each row has another "
            "adapter. Call it with one adapter (bank[i]); or, if the rows do not influence each other, pass "
            "check_rows=False: each is then computed as a batch of one."
        )
    named, _ = jax.tree_util.tree_flatten_with_path(shapes)
    names = [path_of(keys) or "(the whole output)" for keys, _ in named]
    return OutputAxes([_output_axis(name, x.shape, count) for name, (_, x) in zip(names, named, strict=True)], names)


def _output_axis(name: str, shape: Sequence[int], count: int) -> int | None:
    axes = [d for d, n in enumerate(shape) if n % count == 0 and n]
    if len(axes) > 1 or any(shape[d] != count for d in axes):
        raise ValueError(
            f"The output {name} merges the rows of the batch with another axis, or has them twice, so that rows with "
            "different adapters cannot be told apart. Return it with an axis of its own for the rows."
        )
    return axes[0] if axes else None


def _find_meeting(program: Jaxpr, count: int) -> str:
    """The first operation that combines entries along an axis of rows, as "a sum at net.py:12", or ""."""
    jaxpr, _ = opened(program)
    for eqn in jaxpr.eqns:
        for body in _bodies(eqn):
            if found := _find_meeting(body, count):
                # The body of a function of JAX itself has no line of the user's; the call does.
                return found if " at " in found else found + _at(eqn)
        shapes = [getattr(var_type(v), "shape", ()) for v in eqn.invars]
        if any(shapes[i][d] % count == 0 and shapes[i][d] for i, d in _combined_axes(eqn, shapes)):
            return eqn.primitive.name + _at(eqn)
    return ""


def _at(eqn: Eqn) -> str:
    where = source_info_util.summarize(eqn.source_info)
    return f" at {where}" if where and "unknown" not in where else ""


def _combined_axes(eqn: Eqn, shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The axes, as ``(operand, axis)``, along which an equation combines entries."""
    name, p = eqn.primitive.name, eqn.params
    if name in REDUCTIONS:
        return [(0, d) for d in p["axes"]]
    if name in CUMULATIONS:
        return [(0, p["axis"])]
    if name == "sort":
        return [(0, p["dimension"])]
    if name == "rev":
        return [(0, d) for d in p["dimensions"]]
    if name == "dot_general":
        return [(0, d) for d in p["dimension_numbers"][0][0]]
    if name in ("slice", "dynamic_slice"):
        out = var_type(eqn.outvars[0]).shape
        return [(0, d) for d, n in enumerate(shapes[0]) if out[d] != n]
    return []


def _bodies(eqn: Eqn) -> list[Jaxpr]:
    """The programs that an equation holds."""
    values = [x for value in eqn.params.values() for x in (value if isinstance(value, (tuple, list)) else (value,))]
    return [x for x in values if hasattr(opened(x)[0], "eqns")]
