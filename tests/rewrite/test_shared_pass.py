"""Weights that meet one activation share the pass over it: fewer products, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from tests.helpers import PRODUCTS, equations
from tests.rewrite.programs import normal

X = normal(5, 8)
W = {name: normal(8, 6, seed=i) / 3 for i, name in enumerate("qkv")}
LEFT = {"a": W["q"].T, "b": W["k"].T}
HEADS = {"q": normal(8, 4, 3), "k": normal(8, 2, 3)}
HALF = {name: w.astype(jnp.bfloat16) for name, w in W.items()}


def scanned(p: Any, x: Any) -> Any:
    def body(x: Any, w: Any) -> Any:
        y = jnp.tanh(x @ w["gate"]) * (x @ w["up"])
        return x + y @ w["down"], None

    return jax.lax.scan(jax.checkpoint(body), x, p)[0]


LAYERS = {"gate": normal(3, 8, 12) / 3, "up": normal(3, 8, 12, seed=1) / 3, "down": normal(3, 12, 8) / 3}
SHARED: dict[str, tuple[Callable[..., Any], Any, int]] = {
    "q, k, v": (lambda p, x: [x @ p[name] for name in "qkv"], W, 3),
    "in the middle": (lambda p, x: [(y := jnp.sin(x)) @ p["q"], jnp.cos(y @ p["k"])], W, 2),
    "weights on the left": (lambda p, x: [w @ x.T for w in p.values()], LEFT, 0),
    "one x on the left": (lambda p, x: (lambda y: [w @ y for w in p.values()])(x.T), LEFT, 2),
    "heads": (lambda p, x: [jnp.einsum("td,dhk->thk", x, w) for w in p.values()], HEADS, 2),
    "turned and cast": (lambda p, x: [x @ (w.T.astype(x.dtype)).T for w in p.values()], HALF, 3),
    "a result in between": (lambda p, x: [y := x @ p["q"], x @ p["k"] + y, x @ (p["v"] * jnp.sum(y))], W, 2),
    "in a scan": (scanned, LAYERS, 2),
    "another activation": (lambda p, x: [(x + i) @ w for i, w in enumerate(p.values())], W, 0),
}
"""A program, its weights, and how many of them share a pass."""


def adapted(f: Callable[..., Any], params: Any, **settings: Any) -> tuple[Any, Any, Any]:
    ranks = [lojax.Rule("q", rank=3, alpha=2)] * ("q" in params) + ["**"]
    model = lojax.wrap(f, ranks, rank=2, alpha=3, strict=True, **{"execution": "factored", **settings})
    frozen, fresh = model.init(jax.random.key(0), params, X)
    return model, frozen, jax.tree.map(lambda v: v + 0.3 * normal(*v.shape), fresh)


def products(f: Callable[..., Any], *args: Any) -> int:
    """How many products there are, those inside of steps included."""
    return sum(eqn.primitive.name in PRODUCTS for eqn in equations(jax.make_jaxpr(f)(*args).jaxpr))


def scalar(outputs: Any) -> Any:
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32)) ** 2) for y in jax.tree.leaves(outputs))


@pytest.mark.parametrize("name", SHARED)
def test_one_product_with_the_first_factors_of_all(name: str) -> None:
    f, params, together = SHARED[name]
    model, frozen, lora = adapted(f, params)
    count = len(jax.tree.leaves(params)) if name not in ("in the middle",) else 2
    expected = 3 * count - max(0, together - 1)
    assert products(lambda lora: model.apply(frozen, lora, X), lora) == expected


@pytest.mark.parametrize("variant", ["lora", "dora", "lora-fa"])
@pytest.mark.parametrize("name", SHARED)
def test_values_and_gradients_are_those_of_merged_weights(name: str, variant: str) -> None:
    f, params, _ = SHARED[name]
    model, frozen, lora = adapted(f, params, variant=variant)
    merged = lambda lora: f(lojax.merge(frozen, lora), X)
    ours = lambda lora: model.apply(frozen, lora, X)
    tolerance = 2e-2 if params is HALF else 1e-5
    for found, right in zip(*map(jax.tree.leaves, (ours(lora), merged(lora))), strict=True):
        np.testing.assert_allclose(found, right, rtol=tolerance, atol=tolerance)
    if variant != "lora":  # the norm is detached and A is frozen, as `merge` knows nothing of
        alone = lojax.transform(lambda p, x: [f(p, x)], strict=True, execution="fused")
        merged = lambda lora: alone(frozen, lora, X)
    grads, true = (jax.jit(jax.grad(lambda v, g=g: scalar(g(v))))(lora) for g in (ours, merged))
    for found, right in zip(*map(jax.tree.leaves, (grads, true)), strict=True):
        assert np.linalg.norm(found - right) <= 10 * tolerance * max(np.linalg.norm(right), 1e-3)


def test_starts_at_the_base_output_bit_for_bit() -> None:
    f, params, _ = SHARED["q, k, v"]
    model = lojax.wrap(f, "*", rank=2, execution="factored")
    for found, right in zip(model.apply(*model.init(jax.random.key(0), params, X), X), f(params, X), strict=True):
        np.testing.assert_array_equal(found, right)


def test_dropout_and_the_fused_way_are_each_for_itself() -> None:
    f, params, _ = SHARED["q, k, v"]
    model, frozen, lora = adapted(f, params, dropout=0.5)
    key = jax.random.key(1)
    assert products(lambda lora: model.apply(frozen, lora, X, dropout_key=key), lora) == 9
    model, frozen, lora = adapted(f, params, execution="fused")
    assert products(lambda lora: model.apply(frozen, lora, X), lora) == 6  # a b, and x (w + a b)


def test_each_use_is_reported_for_itself() -> None:
    f, params, _ = SHARED["q, k, v"]
    model, frozen, lora = adapted(f, params)
    report = {weight.path: weight.uses[0].extra_flops for weight in model.report(frozen, lora, X).weights}
    assert report == {"q": 2 * 5 * 3 * 14, "k": 2 * 5 * 2 * 14, "v": 2 * 5 * 2 * 14}


@pytest.mark.parametrize("variant", ["lora", "lora-fa"])
def test_the_input_is_kept_only_where_a_first_factor_trains(variant: str) -> None:
    f, params, _ = SHARED["q, k, v"]
    model, frozen, lora = adapted(f, params, variant=variant)
    x = normal(50, 8)
    kept = jax.tree.leaves(jax.eval_shape(lambda lora: jax.vjp(lambda v: model.apply(frozen, v, x), lora)[1], lora))
    assert any(leaf.shape == x.shape for leaf in kept) == (variant == "lora")
