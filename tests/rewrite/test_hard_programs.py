"""Programs that real nets hold and that an engine easily gets wrong. Each of these once failed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lojax
from tests.helpers import trained

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)
V = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)
CONSTANT = np.ones((3, 3), "f4") + np.eye(3, dtype="f4")


def masked(x, w):
    return x @ (w * CONSTANT)


with_own_rule = jax.custom_vjp(masked)
with_own_rule.defvjp(lambda x, w: (masked(x, w), (x, w)), lambda saved, g: jax.vjp(masked, *saved)[1](g))


def norm_of_both(params, x, join):
    """Two weights in opposite roles, and a use of both together."""
    return x @ params["w"] + (params["v"] @ x.T).T + jnp.linalg.norm(join([params["w"], params["v"]]))


PROGRAMS: dict[str, Callable[..., Any]] = {
    "a custom_vjp that closes over an array": lambda p, x: with_own_rule(x, p["w"]) + x @ p["v"],
    "an entry of the weight times an array": lambda p, x: p["w"][0, 0] * x + x @ p["v"],
    "an entry of the weight plus an array": lambda p, x: x - p["w"][1, 0] + x @ p["v"],
    "a row of the weight over an array": lambda p, x: p["w"][0] / (1 + x * x) + x @ p["v"],
    "a reduction over the weight under vmap": lambda p, x: jnp.sum(x) * jax.vmap(jnp.sum)(p["w"]) + x @ p["v"],
    "complex activations": lambda p, x: jax.lax.dot(jnp.fft.fft(x), p["w"].T) + jax.lax.complex(x @ p["v"], 0 * x),
    "weights of opposite roles, stacked": lambda p, x: norm_of_both(p, x, jnp.stack),
    "weights of opposite roles, concatenated": lambda p, x: norm_of_both(p, x, jnp.concatenate),
    "a choice between weights of opposite roles": lambda p, x: (
        (p["v"] @ x.T).T + x @ jnp.where(x[0, 0] > 0, *p.values())
    ),
    "a sum of two weights": lambda p, x: x @ (p["w"] + p["v"]),
    "a difference of two weights": lambda p, x: x @ (p["w"] - p["v"].T),
    "indices that the weight says": lambda p, x: x[jnp.argmax(p["w"], 0)] + x[:3] @ p["v"],
    "a slice that starts where the weight says": lambda p, x: (
        jax.lax.dynamic_slice(x, (jnp.argmax(p["w"][0]), 0), (1, 3)) + x @ p["v"]
    ),
}


def prepared(f: Callable[..., Any]) -> tuple[Any, Any, Any]:
    model = lojax.wrap(f, "**", rank=2)
    frozen, lora = model.init(jax.random.key(0), {"w": W, "v": V}, X)
    return model, frozen, trained(lora)


def loss(y: Any) -> Any:
    return jnp.sum(jnp.abs(y) ** 2)


@pytest.mark.parametrize("name", PROGRAMS)
def test_outputs_and_gradients_are_those_of_the_merged_weights(name):
    f = PROGRAMS[name]
    model, frozen, lora = prepared(f)
    value, grads = jax.value_and_grad(lambda t: loss(model.apply(frozen, t, X)))(lora)
    expected, expected_grads = jax.value_and_grad(lambda t: loss(f(lojax.merge(frozen, t), X)))(lora)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), grads, expected_grads)


def test_gradients_of_a_vmapped_reduction_under_vmap():
    f = PROGRAMS["a reduction over the weight under vmap"]
    model, frozen, lora = prepared(f)
    xs = jnp.stack([X, 2 * X])
    grads = jax.vmap(jax.grad(lambda t, x: loss(model.apply(frozen, t, x))), (None, 0))(lora, xs)
    expected = jax.vmap(jax.grad(lambda t, x: loss(f(lojax.merge(frozen, t), x))), (None, 0))(lora, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), grads, expected)


def test_a_sum_of_two_weights_stays_factored():
    model, frozen, lora = prepared(PROGRAMS["a sum of two weights"])
    assert {use.how for weight in model.report(frozen, lora, X).weights for use in weight.uses} == {"factored"}


def double_where_positive(params, x):
    """Layers under vmap, each of which chooses its product by the row, also under vmap: the predicate, which has one
    axis, is broadcast twice, and cast between."""

    def row(x, w):
        return lax.cond(x.sum() > 0, lambda: x @ w, lambda: 2 * x @ w) + x @ (w * jnp.sign(x.sum()).astype(w.dtype))

    return jax.vmap(jax.vmap(row, (0, None)), (None, 0))(x, jnp.stack([params["w"], params["w"]]))


def test_a_choice_by_the_row_stays_factored():
    model, frozen, lora = prepared(double_where_positive)
    uses = [use.how for weight in model.report(frozen, lora, X).weights for use in weight.uses]
    assert uses and set(uses) <= {"factored", "fused"}


def grow(params, x):
    """A loop whose condition uses one weight and whose body uses another."""

    def small(x):
        return jnp.sum(jnp.abs(x @ params["w"])) < 1e4

    return jax.lax.while_loop(small, lambda x: 2 * x + jnp.abs(x @ params["v"]), x)


def test_the_report_shows_uses_in_the_condition_of_a_while():
    model, frozen, lora = prepared(grow)
    uses = {weight.path: len(weight.uses) for weight in model.report(frozen, lora, X).weights}
    assert uses == {"w": 1, "v": 1}


def layers(params, x):
    """A scan, a function with its own derivative, weights that share a pass. In `lax`: here a trace costs a second."""

    def layer(x, w):
        return jax.nn.relu(lax.tanh(lax.dot(x, w)) + lax.dot(x, params["v"])), None

    return lax.scan(layer, x, lax.broadcast(params["w"], (2,)))[0]


@pytest.fixture
def small_heap():
    """JAX looks for leaks by collecting garbage after every trace: slow where earlier tests left a lot alive."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("net", "transform"),
    [(layers, jax.jit), (PROGRAMS["a custom_vjp that closes over an array"], jax.grad), (grow, None)],
)
def test_no_tracer_outlives_its_trace(net, transform, small_heap):
    model, frozen, lora = prepared(net)
    run = lambda lora: loss(model.apply(frozen, lora, X))
    step = run if transform is None else transform(run) if transform is jax.grad else transform(jax.grad(run))
    with jax.checking_leaks():
        model.init(jax.random.key(0), {"w": W, "v": V}, X)
        step(lora)
        model.report(frozen, lora, X)


def test_the_transpose_of_a_linear_net_is_its_vjp():
    """`jax.linear_transpose` is not defined for named values and functions with a rule of their own; `jax.vjp` is."""
    model, frozen, lora = prepared(lambda p, x: x @ p["w"] @ p["v"])
    ones = jnp.ones_like(X)
    (transposed,) = jax.vjp(lambda x: model.apply(frozen, lora, x), X)[1](ones)
    merged = model.merge(frozen, lora)
    np.testing.assert_allclose(transposed, ones @ (merged["w"] @ merged["v"]).T, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError):
        jax.linear_transpose(lambda x: model.apply(frozen, lora, x), X)(ones)
