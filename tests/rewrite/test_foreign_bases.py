"""Bases that a net dequantizes by itself: adapted without an edit to the net."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message, trained
from jax import lax

import lojax
from lojax.adapters.adapter import Adapter

RNG = np.random.default_rng(0)
LAYERS, WIDTH = 3, 64
BASE = {
    "codes": jnp.asarray(RNG.integers(-8, 8, (WIDTH, WIDTH)), jnp.int8),
    "zeros": jnp.asarray(RNG.integers(-2, 3, (1, WIDTH)), jnp.int8),
    "scales": jnp.asarray(RNG.uniform(0.01, 0.03, (1, WIDTH)), jnp.float32),
}
STACK = jax.tree.map(lambda x: jnp.stack([x] * LAYERS), BASE)
X = jnp.asarray(RNG.normal(size=(5, WIDTH)), jnp.float32)


def dequantize(p: Any) -> Any:
    return (p["codes"].astype(jnp.float32) - p["zeros"].astype(jnp.float32)) * p["scales"]


NETS = {
    "product": (lambda p, x: jnp.tanh(x @ dequantize(p)), BASE),
    "transposed": (lambda p, x: jnp.tanh(x @ dequantize(p).T), BASE),
    "bfloat16": (lambda p, x: jnp.tanh(x.astype(jnp.bfloat16) @ dequantize(p).astype(jnp.bfloat16)), BASE),
    "jit": (lambda p, x: jnp.tanh(x @ jax.jit(dequantize)(p)), BASE),
    "remat": (jax.checkpoint(lambda p, x: jnp.tanh(x @ dequantize(p))), BASE),
    "scan": (lambda p, x: lax.scan(lambda x, p: (jnp.tanh(x @ dequantize(p)), None), x, p)[0], STACK),
    "before a scan": (lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, dequantize(p))[0], STACK),
}


def weight_of(base: Any, adapter: Adapter) -> Any:
    """The dequantized weight plus the update, in NumPy."""
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    return np.asarray(dequantize(base), np.float64) + adapter.scale * (a @ b)


@pytest.mark.parametrize("name", NETS)
def test_the_update_is_added_to_the_dequantized_weight(name):
    f, base = NETS[name]
    model = lojax.wrap(f, "codes", rank=2, alpha=4, strict=True)
    frozen, lora = model.init(jax.random.key(0), base, X)
    np.testing.assert_array_equal(jax.jit(model.apply)(frozen, lora, X), jax.jit(f)(base, X))
    assert set(lora["codes"].axes) <= {"stack", "in", "out"}
    lora = trained(lora)
    adapter, plain = lora["codes"], name != "bfloat16"
    w, x = weight_of(base, adapter), np.asarray(X, np.float64)
    if name == "transposed":
        w = np.asarray(dequantize(base), np.float64) + adapter.scale * np.einsum(
            "ir,rj->ij" if adapter.axes == ("in", "out") else "jr,ri->ij", adapter.a, adapter.b
        )
        w = w.T
    for layer in w if base is STACK else [w]:
        x = np.tanh(x @ layer)
    tolerance = 1e-5 if plain else 0.05
    np.testing.assert_allclose(np.asarray(model.apply(frozen, lora, X), np.float64), x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NETS)
def test_gradients_and_what_is_kept(name):
    f, base = NETS[name]
    model = lojax.wrap(f, "codes", rank=2)
    frozen, lora = model.init(jax.random.key(0), base, X)
    lora = trained(lora)

    def loss(lora):
        return jnp.sum(jnp.sin(model.apply(frozen, lora, X).astype(jnp.float32)))

    if name != "bfloat16":  # too coarse for differences
        grads = jax.grad(loss)(lora)
        squares = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads))
        step = 1e-2 / max(1.0, squares**0.5)
        after, before = (loss(jax.tree.map(lambda v, g, h=h: v + h * g, lora, grads)) for h in (step, -step))
        np.testing.assert_allclose(float(after - before) / (2 * step), squares, rtol=0.05, atol=1e-3)
    kept = jax.tree.leaves(jax.eval_shape(lambda v: jax.vjp(lambda v: model.apply(frozen, v, X), v)[1], lora))
    assert not [x for x in kept if x.size >= WIDTH * WIDTH and x.dtype != jnp.int8]


def test_bad_input():
    product = NETS["product"][0]
    text = message(ValueError, lojax.init, jax.random.key(0), BASE, "codes", rank=2)
    assert "codes has dtype int8: only real floating-point weights take an adapter" in text
    for settings in ({"variant": "dora"}, {"init": "pissa"}):
        model = lojax.wrap(product, "codes", rank=2, **settings)
        text = message(ValueError, model.init, jax.random.key(0), BASE, X)
        assert "codes: holds codes (int8[64,64])" in text
        assert "lojax.quantize" in text
    model = lojax.wrap(lambda p, x: (x.astype(jnp.int8) @ p["codes"]).astype(jnp.float32), "codes", rank=2)
    text = message(ValueError, lambda: model.apply(*model.init(jax.random.key(0), BASE, X), X))
    assert "'dot_general' before they become floating-point" in text
    model = lojax.wrap(product, "codes", rank=2)
    frozen, lora = model.init(jax.random.key(0), BASE, X)
    assert "codes: holds codes (int8[64,64])" in message(ValueError, lojax.merge, frozen, lora)
