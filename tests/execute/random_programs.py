"""A hypothesis strategy that draws programs using one weight: axes, carriers, a product, nested structure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

Step = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A drawn program.

    Attributes:
        shape: The shape of the weight.
        axes: Its axes, or None to have them inferred.
        rank: The rank of the adapter.
        f: ``f({"w": weight}, x)``.
        x: The activation.
        story: The steps in words, for the failure report.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    rank: int
    f: Callable[..., Any]
    x: np.ndarray
    story: tuple[str, ...]

    def __repr__(self) -> str:
        return f"W{self.shape} axes={self.axes} rank={self.rank}: " + " > ".join(self.story)


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


def _structure(name: str, product: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``product(x, w)`` inside one kind of structure."""
    if name == "jit":
        return jax.jit(product)
    if name == "remat":
        return jax.checkpoint(product)
    if name == "cond":
        return lambda x, w: lax.cond(x.sum() > 0, product, lambda x, w: 2.0 * product(x, w), x, w)
    if name == "scan":
        return lambda x, w: lax.scan(
            lambda c, t: (c + t * product(x, w), None), jnp.zeros_like(product(x, w)), jnp.arange(1.0, 3.0)
        )[0]
    if name == "scan_stack":
        return lambda x, w: lax.scan(lambda c, v: (c, product(x, v)), 0.0, jnp.stack([w, w * 2]))[1]
    if name == "while":
        return lambda x, w: lax.fori_loop(
            0, 2, lambda i, c: (c[0] * 0.5 + product(x, c[1]), c[1]), (jnp.zeros_like(product(x, w)), w)
        )[0]
    if name == "vmap":
        return lambda x, w: jax.vmap(lambda t: product(t, w))(jnp.stack([x, -x]))
    assert name == "map", name
    return lambda x, w: lax.map(lambda t: product(x * t, w), jnp.arange(1.0, 3.0))


@st.composite
def programs(draw: Any) -> Drawn:
    """A program with one weight of two to four axes."""
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=4)))
    axes: tuple[str, ...] | None = None
    if draw(st.booleans()):
        others = draw(
            st.lists(st.sampled_from(["in", "out", "stack"]), min_size=len(shape) - 2, max_size=len(shape) - 2)
        )
        axes = tuple(draw(st.permutations(["in", "out", *others])))
    steps, story, now = [], [], shape
    for _ in range(draw(st.integers(0, 3))):
        name, step, now = draw(carriers(now))
        steps.append(step)
        story.append(name)
    roles = draw(st.lists(st.sampled_from("sfb"), min_size=len(now), max_size=len(now)))  # summed, free, batch
    letters = "abcdefg"[: len(now)]
    shared = [c for c, role in zip(letters, roles, strict=True) if role in "sb"]
    x_letters = draw(st.permutations(["x", *shared]))
    out = draw(st.permutations(["x", *[c for c, role in zip(letters, roles, strict=True) if role in "fb"]]))
    x_shape = tuple(3 if c == "x" else now[letters.index(c)] for c in x_letters)
    left = draw(st.booleans())
    spec = (
        f"{letters},{''.join(x_letters)}->{''.join(out)}" if left else f"{''.join(x_letters)},{letters}->{''.join(out)}"
    )
    structure = draw(st.lists(st.sampled_from(["jit", "remat", "cond", "scan", "while", "vmap", "map"]), max_size=2))
    seed = draw(st.integers(0, 2**16))

    def product(x: Any, w: Any) -> Any:
        for step in steps:
            w = step(w)
        return jnp.einsum(spec, w, x) if left else jnp.einsum(spec, x, w)

    whole = product
    for name in structure:
        whole = _structure(name, whole)
    rank = draw(st.integers(1, 2))
    x = np.random.default_rng(seed).normal(size=x_shape)
    return Drawn(shape, axes, rank, lambda p, x: jnp.tanh(whole(x, p["w"])), x, (*story, spec, *structure))
