"""Steps that turn a weight into another one, drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

Step = Callable[[Any], Any]


@st.composite
def carriers(draw: Any, shape: tuple[int, ...]) -> tuple[str, Step, tuple[int, ...]]:
    """One step that turns a weight of ``shape`` into another: its name, itself, the new shape."""
    kinds = ["transpose", "scale", "negate", "reverse", "slice", "unit", "stride", "cast", "channels", "pad"]
    if len(shape) > 2:
        kinds += ["index", "dynamic_index", "merge", "take"]
    if any(n == 4 for n in shape):
        kinds.append("split")
    kind = draw(st.sampled_from(kinds))
    axis = draw(st.integers(0, len(shape) - 1))
    n = shape[axis]
    without = shape[:axis] + shape[axis + 1 :]
    if kind == "transpose":
        order = tuple(draw(st.permutations(range(len(shape)))))
        return f"transpose{order}", lambda w: w.transpose(order), tuple(shape[i] for i in order)
    if kind == "slice":
        stop = draw(st.integers(1, n))
        return (
            f"slice[{axis}:{stop}]",
            lambda w: lax.slice_in_dim(w, 0, stop, axis=axis),
            (*shape[:axis], stop, *shape[axis + 1 :]),
        )
    if kind == "stride":
        new = (*shape[:axis], math.ceil(n / 2), *shape[axis + 1 :])
        return f"stride[{axis}]", lambda w: lax.slice_in_dim(w, 0, n, 2, axis), new
    if kind == "index":
        i = draw(st.integers(0, n - 1))
        return f"index[{axis}]={i}", lambda w: lax.index_in_dim(w, i, axis, keepdims=False), without
    if kind == "dynamic_index":
        i = draw(st.integers(0, n - 1))
        return (
            f"dynamic[{axis}]={i}",
            lambda w: lax.dynamic_index_in_dim(w, jnp.asarray(i), axis, keepdims=False),
            without,
        )
    if kind == "take":
        ids = draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=3))
        return (
            f"take[{axis}]={ids}",
            lambda w: jnp.take(w, jnp.asarray(ids), axis=axis),
            (*shape[:axis], len(ids), *shape[axis + 1 :]),
        )
    if kind == "merge":
        i = min(axis, len(shape) - 2)
        new = (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :])
        return f"merge[{i}]", lambda w: w.reshape(new), new
    if kind == "split":
        i = shape.index(4)
        new = (*shape[:i], 2, 2, *shape[i + 1 :])
        return f"split[{i}]", lambda w: w.reshape(new), new
    if kind == "unit":
        return f"unit[{axis}]", lambda w: jnp.expand_dims(w, axis), (*shape[:axis], 1, *shape[axis:])
    if kind == "reverse":
        return f"reverse[{axis}]", lambda w: lax.rev(w, (axis,)), shape
    if kind == "cast":
        return "cast", lambda w: w.astype(jnp.float32).astype(jnp.float64) * 0 + w, shape
    if kind == "channels":
        lengths = [n if i == axis else 1 for i in range(len(shape))]
        return f"channels[{axis}]", lambda w: w * jnp.arange(1.0, n + 1).reshape(lengths), shape
    if kind == "pad":
        low, high, interior = draw(st.tuples(st.integers(0, 1), st.integers(-1, 1), st.integers(0, 1)))
        room = [(low, high, interior) if i == axis else (0, 0, 0) for i in range(len(shape))]
        new = (*shape[:axis], low + high + n + (n - 1) * interior, *shape[axis + 1 :])
        return f"pad[{axis}]={room[axis]}", lambda w: lax.pad(w, 2.0, room), new
    if kind == "negate":
        return "negate", lambda w: -w, shape
    factor = draw(st.sampled_from([0.5, -2.0, 3.0]))
    return f"scale {factor}", lambda w: w * factor, shape
