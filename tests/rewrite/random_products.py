"""Products of an activation with a weight, drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

Product = Callable[[Any, Any], Any]
Drawing = tuple[str, Product, np.ndarray]


@st.composite
def products(draw: Any, shape: tuple[int, ...]) -> Drawing:
    """A function ``f(x, w)`` of a weight of ``shape``: its name, itself, and an x for it."""
    kinds = [_einsum, _einsum, _look_up]
    if len(shape) in (3, 4):
        kinds.append(_convolution)
    if len(shape) == 3:
        kinds.append(_ragged)
    name, product, x_shape = draw(st.sampled_from(kinds))(draw, shape)
    return name, product, np.random.default_rng(draw(st.integers(0, 2**16))).normal(size=x_shape)


def _einsum(draw: Any, shape: tuple[int, ...]) -> tuple[str, Product, tuple[int, ...]]:
    """Every axis of the weight is summed, free, or shared and kept."""
    roles = draw(st.lists(st.sampled_from("sfb"), min_size=len(shape), max_size=len(shape)))
    letters = "abcdefg"[: len(shape)]
    shared = [c for c, role in zip(letters, roles, strict=True) if role in "sb"]
    x_letters = "".join(draw(st.permutations(["x", *shared])))
    out = "".join(draw(st.permutations(["x", *[c for c, role in zip(letters, roles, strict=True) if role in "fb"]])))
    x_shape = tuple(3 if c == "x" else shape[letters.index(c)] for c in x_letters)
    if draw(st.booleans()):
        spec = f"{letters},{x_letters}->{out}"
        return spec, lambda x, w: jnp.einsum(spec, w, x), x_shape
    spec = f"{x_letters},{letters}->{out}"
    return spec, lambda x, w: jnp.einsum(spec, x, w), x_shape


def _look_up(draw: Any, shape: tuple[int, ...]) -> tuple[str, Product, tuple[int, ...]]:
    """Rows chosen by the activation itself, some out of bounds."""
    axis = draw(st.integers(0, len(shape) - 1))
    mode = draw(st.sampled_from(["clip", "wrap", "fill"]))

    def product(x: Any, w: Any) -> Any:
        found = jnp.take(w, jnp.int32(3 * jnp.abs(x)), axis=axis, mode=mode, fill_value=2.0)
        return jnp.sum(x) * (found @ jnp.arange(1.0, found.shape[-1] + 1))

    return f"look_up[{axis}, {mode}]", product, (draw(st.integers(1, 3)),)


def _convolution(draw: Any, shape: tuple[int, ...]) -> tuple[str, Product, tuple[int, ...]]:
    """With strides, dilations, padding, groups, and axes in any order."""
    kernel, image, result = (tuple(draw(st.permutations(range(len(shape))))) for _ in range(3))
    space = len(shape) - 2
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[kernel[0]] % g == 0]))
    several = st.lists(st.integers(1, 2), min_size=space, max_size=space)
    settings = {
        "window_strides": draw(several),
        "padding": draw(st.sampled_from(["SAME", "VALID", [(1, 0)] * space])),
        "lhs_dilation": draw(several),
        "rhs_dilation": draw(several),
        "dimension_numbers": lax.ConvDimensionNumbers(image, kernel, result),
        "feature_group_count": groups,
    }
    if isinstance(settings["padding"], str):
        settings["lhs_dilation"] = None
    x_shape = [0] * len(shape)
    for axis, n in zip(image, (2, groups * shape[kernel[1]], *[8] * space), strict=True):
        x_shape[axis] = n
    words = ", ".join(f"{k}={v}" for k, v in settings.items())
    return f"convolution[{words}]", lambda x, w: lax.conv_general_dilated(x, w, **settings), tuple(x_shape)


def _ragged(draw: Any, shape: tuple[int, ...]) -> tuple[str, Product, tuple[int, ...]]:
    """Rows of x for one expert after another, some experts without any."""
    counts = draw(st.lists(st.integers(0, 2), min_size=shape[0], max_size=shape[0]))
    rows = max(sum(counts), 1) + draw(st.integers(0, 1))  # rows of no expert give zero
    return (
        f"ragged{counts} of {rows}",
        lambda x, w: lax.ragged_dot(x, w, jnp.array(counts)),
        (rows, shape[1]),
    )
