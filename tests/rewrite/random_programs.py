"""A hypothesis strategy that draws programs using one weight: axes, carriers, a product, nested structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from tests.rewrite.random_carriers import carriers
from tests.rewrite.random_products import Product, products


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


def _scan(product: Product) -> Product:
    return lambda x, w: lax.scan(
        lambda c, t: (c + t * product(x, w), None), jnp.zeros_like(product(x, w)), jnp.arange(1.0, 3.0)
    )[0]


def _while(product: Product) -> Product:
    return lambda x, w: lax.fori_loop(
        0, 2, lambda i, c: (c[0] * 0.5 + product(x, c[1]), c[1]), (jnp.zeros_like(product(x, w)), w)
    )[0]


def _custom_jvp(product: Product) -> Product:
    f = jax.custom_jvp(product)
    f.defjvp(lambda p, t: (product(*p), 2.0 * jax.jvp(product, p, t)[1]))
    return f


def _custom_vjp(product: Product) -> Product:
    f = jax.custom_vjp(product)
    f.defvjp(lambda x, w: (product(x, w), (x, w)), lambda r, g: jax.vjp(product, *r)[1](3.0 * g))
    return f


def _after_a_step(product: Product) -> Product:
    return lambda x, w: product(x, w - 0.1 * jax.grad(lambda v: jnp.sum(jnp.sin(product(x, v))))(w))


STRUCTURES: dict[str, Callable[[Product], Product]] = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda product: lambda x, w: lax.cond(x.sum() > 0, product, lambda x, w: 2.0 * product(x, w), x, w),
    "scan": _scan,
    "scan_stack": lambda product: lambda x, w: lax.scan(lambda c, v: (c, product(x, v)), 0.0, jnp.stack([w, 2 * w]))[1],
    "while": _while,
    "vmap": lambda product: lambda x, w: jax.vmap(lambda t: product(t, w))(jnp.stack([x, -x])),
    "map": lambda product: lambda x, w: lax.map(lambda t: product(x * t, w), jnp.arange(1.0, 3.0)),
    "twice": lambda product: lambda x, w: product(x, w) + jnp.sin(product(x, 2 * w)),
    "along_x": lambda product: lambda x, w: jax.jvp(lambda t: product(jnp.sin(t), w), (x,), (x,))[1],
    "gradient_of_x": lambda product: lambda x, w: jax.grad(lambda t: jnp.sum(product(t, w) ** 2))(x),
    "custom_jvp": _custom_jvp,
    "custom_vjp": _custom_vjp,
    "after_a_step": _after_a_step,
}
"""What a product, ``f(x, w)``, may stand in. The derivatives of its own are not the true ones."""

LAYERS: dict[str, Callable[[Product], Product]] = {
    "layers by scan": lambda product: lambda x, w: lax.scan(lambda c, v: (c, product(x, v)), 0.0, w)[1],
    "layers by map": lambda product: lambda x, w: lax.map(lambda v: product(x, v), w),
    "layers by vmap": lambda product: lambda x, w: jax.vmap(product, (None, 0))(x, w),
    "layers in a loop": lambda product: lambda x, w: [x := x + jnp.mean(product(x, v)) for v in w][-1],
    "layers by index": lambda product: (
        lambda x, w: lax.fori_loop(0, w.shape[0], lambda i, x: x + jnp.mean(product(x, w[i])), x)
    ),
}
"""What takes one layer after the other out of a stack of weights."""


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
    spec, product, x = draw(products(now))

    def carried(x: Any, w: Any) -> Any:
        for step in steps:
            w = step(w)
        return product(x, w)

    whole = carried
    structure = draw(st.lists(st.sampled_from(sorted(STRUCTURES)), max_size=2))
    for name in structure:
        whole = STRUCTURES[name](whole)
    if draw(st.integers(0, 3)) == 0:
        layers = draw(st.sampled_from(sorted(LAYERS)))
        whole, structure = LAYERS[layers](whole), [*structure, layers]
        shape, axes = (draw(st.integers(1, 3)), *shape), axes and ("stack", *axes)
    rank = draw(st.integers(1, 2))
    # Not tanh: where that saturates, its second derivative is a difference of nearly equal numbers.
    return Drawn(shape, axes, rank, lambda p, x: jnp.arcsinh(whole(x, p["w"])), x, (*story, spec, *structure))
