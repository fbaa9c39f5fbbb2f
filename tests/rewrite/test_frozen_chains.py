"""Frozen chains: the same values and derivatives as the plain program, and nothing of the size of a weight saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lojax

LAYERS, WIDTH, TOKENS = 3, 64, 4
F64 = np.float64
Layer = Callable[[Any, Any], Any]
Net = Callable[[Any, Any], Any]

RNG = np.random.default_rng(0)
CODES = RNG.integers(-127, 128, (LAYERS, WIDTH, WIDTH)).astype("i1")
PARAMS = {
    "w": np.asarray(RNG.normal(size=(LAYERS, WIDTH, WIDTH)) / 8, F64),
    "v": np.asarray(RNG.normal(size=(LAYERS, WIDTH, WIDTH)) / 8, F64),
    "codes": CODES,
    "zeros": np.asarray(RNG.integers(-3, 4, (LAYERS, 1, WIDTH)), np.int8),
    "scales": np.asarray(RNG.uniform(0.5, 1, (LAYERS, 1, WIDTH)) / 500, F64),
}
X = np.asarray(RNG.normal(size=(TOKENS, WIDTH)), F64)


def layer(p, x):
    """Two casts, one of an adapted weight, and a dequantization."""
    x = x + jnp.tanh((x.astype(jnp.float32) @ p["w"].astype(jnp.float32)).astype(x.dtype))
    x = x + jnp.tanh((x.astype(jnp.float32) @ p["v"].T.astype(jnp.float32)).astype(x.dtype))
    dequantized = (p["codes"].astype(x.dtype) - p["zeros"].astype(x.dtype)) * p["scales"]
    return x + jnp.sin(x @ dequantized)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def entry(p, i):
    return jax.tree.map(lambda w: w[i], p)


def unrolled(layer: Layer) -> Net:
    def net(p, x):
        for i in range(LAYERS):
            x = layer(entry(p, i), x)
        return x

    return net


def scanned(layer: Layer) -> Net:
    return lambda p, x: lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]


def cast_before_the_scan(layer: Layer) -> Net:
    """All chains over whole stacks, in front of the loop that uses them."""

    def net(p, x):
        dequantized = (p["codes"].astype(x.dtype) - p["zeros"].astype(x.dtype)) * p["scales"]
        stacks = p["w"].astype(jnp.float32), p["v"].astype(jnp.float32).transpose(0, 2, 1), dequantized

        def body(x, stacks):
            w, v, d = stacks
            for kernel in (w, v):
                x = x + jnp.tanh((x.astype(jnp.float32) @ kernel).astype(x.dtype))
            return x + jnp.sin(x @ d), None

        return lax.scan(body, x, stacks)[0]

    return net


def in_a_loop(layer: Layer) -> Net:
    def net(p, x):
        first = entry(p, 0)
        return lax.scan(lambda x, _: (layer(first, x), None), x, None, length=LAYERS)[0]

    return net


def in_a_branch(layer: Layer) -> Net:
    return unrolled(lambda p, x: lax.cond(x.sum() > 0, lambda p, x: layer(p, x), lambda p, x: layer(p, -x), p, x))


NETS: dict[str, Net] = {
    "unrolled": unrolled(layer),
    "scan": scanned(layer),
    "chain before the scan": cast_before_the_scan(layer),
    "constants of a loop": in_a_loop(layer),
    "cond": in_a_branch(layer),
    "jit": unrolled(jax.jit(layer)),
    "remat": scanned(jax.checkpoint(layer)),
    "remat that saves products": unrolled(jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)),
    "vmap": lambda p, x: jax.vmap(lambda x: scanned(layer)(p, x[None])[0])(x),
}


def prepared(net: Net, **settings: Any) -> Any:
    model = lojax.wrap(net, "w", rank=2, **settings)
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    moved = jax.tree.map(lambda v: v + 0.05 * np.cos(np.arange(v.size)).reshape(v.shape).astype(v.dtype), lora)
    return model, frozen, moved


def loss(y):
    return jnp.sum(jnp.sin(y) ** 2)


def saved(f: Callable[..., Any], *args: Any) -> list[Any]:
    """The arrays that the backward pass of ``f`` keeps, as shapes."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))


def weight_sized(arrays: list[Any]) -> list[Any]:
    """Those of the size of a weight, but not what is stored: float64, or one byte."""
    return [x for x in arrays if x.size >= WIDTH * WIDTH and x.dtype not in (F64, jnp.int8)]


@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients_are_those_of_the_merged_weights(name):
    model, frozen, lora = prepared(NETS[name])

    def plain(lora, x):
        return loss(NETS[name](lojax.merge(frozen, lora), x))

    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(lora, X)
    actual = jax.jit(jax.value_and_grad(lambda v, x: loss(model.apply(frozen, v, x)), (0, 1)))(lora, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


@pytest.mark.parametrize("name", NETS)
def test_the_net_is_the_same_bits_without_an_update(name):
    model, frozen, _ = prepared(NETS[name])
    _, fresh = model.init(jax.random.key(1), PARAMS, X)
    expected, actual = jax.jit(NETS[name])(PARAMS, X), jax.jit(model.apply)(frozen, fresh, X)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", NETS)
def test_nothing_of_the_size_of_a_weight_is_saved(name):
    model, frozen, lora = prepared(NETS[name])
    # In float64 the dequantized weight looks like what is stored; there is none of the two adapted ones.
    kept = saved(lambda v, x: model.apply(frozen, v, x), lora, X)
    plain = saved(lambda x: NETS[name](PARAMS, x), X)
    if name == "cond":  # what a branch saves is copied, so the smaller of leaf and cast is saved
        assert len(weight_sized(kept)) <= len(weight_sized(plain))
    else:
        assert not weight_sized(kept)
        assert weight_sized(plain) or "remat" in name, "plain differentiation must show, or this test sees nothing"
    # Codes are saved, dequantized weights are not: of float64 arrays of that size there are w, v and no third.
    count = sum(x.size for x in kept if x.dtype == F64 and x.size % (WIDTH * WIDTH) == 0)
    assert count <= 2 * LAYERS * WIDTH * WIDTH


def test_derivatives_forward_and_of_second_order():
    model, frozen, lora = prepared(NETS["scan"], dtype=F64)
    tangent = jax.tree.map(jnp.cos, lora)

    def adapted(v):
        return loss(model.apply(frozen, v, X))

    along = jax.jvp(adapted, (lora,), (tangent,))[1]
    products = jax.tree.map(jnp.vdot, jax.grad(adapted)(lora), tangent)
    np.testing.assert_allclose(along, sum(jax.tree.leaves(products)), rtol=1e-4)
    forward = jax.jvp(jax.grad(adapted), (lora,), (tangent,))[1]
    backward = jax.grad(lambda v: jax.jvp(adapted, (v,), (tangent,))[1])(lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), forward, backward)


def test_a_net_without_a_chain_is_the_same_program():
    """A weight that is moved and not changed is not deferred, and nothing is added to the program."""

    def net(p, x):
        return jnp.tanh(x @ p["w"][0]) @ p["v"][0].T

    model, frozen, lora = prepared(net, dtype=F64)
    text = str(jax.make_jaxpr(lambda v, x: jax.vjp(lambda x: model.apply(frozen, v, x), x)[1](x))(lora, X))
    assert "optimization_barrier" not in text
    assert "checkpoint" not in text


def test_the_update_is_applied_under_every_execution():
    for execution in ("factored", "fused", "materialize"):
        model, frozen, lora = prepared(NETS["unrolled"], execution=execution)
        y = model.apply(frozen, lora, X)
        np.testing.assert_allclose(y, NETS["unrolled"](lojax.merge(frozen, lora), X), rtol=1e-4, atol=1e-4)
