"""Bases in the formats of other libraries: adapted without an edit to the net, against the dequantized weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lojax
from tests.helpers import message, trained
from tests.rewrite.foreign_formats import BOOK, CHANNELS, FORMATS, GAIN, IN, INT8, OUT, PACKED, unpack

X = jnp.asarray(np.random.default_rng(1).normal(size=(5, IN)), jnp.float32)


def prepared(name: str, **settings: Any) -> Any:
    foreign = FORMATS[name]
    model = lojax.wrap(foreign.f, "codes", rank=2, alpha=4, **settings)
    return model, *model.init(jax.random.key(0), foreign.params, X)


def loss(y: Any) -> Any:
    return jnp.sum(jnp.sin(y))


def expected(name: str, adapter: Any, x: Any) -> Any:
    """The loss of a plain net on the weight plus the update, in the format's own terms."""
    weight = FORMATS[name].weight
    update = adapter.scale * jnp.matmul(adapter.a, adapter.b)
    for w in jnp.asarray(weight + update).reshape(-1, IN, OUT):
        if name == "keras int8":  # rounded activations, and a derivative that passes the rounding
            step = 127 / (jnp.max(jnp.abs(x), -1, keepdims=True) + 1e-7)
            x = x + lax.stop_gradient(jnp.clip(jnp.round(x * step), -127, 127) / step - x)
        x = jnp.tanh(x @ w * (GAIN.astype(w.dtype) if name == "scaled output" else 1))
    return loss(x)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("traced", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["jit", "eager"])
def test_values_and_gradients_are_those_of_the_dequantized_weight(name, traced):
    model, frozen, lora = prepared(name, strict=True)
    assert lora["codes"].weight_shape == FORMATS[name].weight.shape
    run = jax.jit if traced else lambda f: f
    plain = run(FORMATS[name].f)(FORMATS[name].params, X)
    tolerance = 0 if traced else 1e-6  # in eager mode, what JAX compiles together may differ
    np.testing.assert_allclose(run(model.apply)(frozen, lora, X), plain, rtol=tolerance, atol=tolerance)
    lora = jax.tree.map(lambda v: v / 4, trained(lora))
    # As an argument: XLA:CPU miscomputes the bitcast of a constant to int4, without lojax as well.
    step = jax.value_and_grad(lambda v, x, frozen: loss(model.apply(frozen, v, x)), (0, 1))
    actual = run(step)(lora, X, frozen)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), (lora["codes"], X))
        value, (adapter, x) = jax.value_and_grad(lambda v, x: expected(name, v, x), (0, 1))(*wide)
    np.testing.assert_allclose(actual[0], value, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(actual[1][0]["codes"].a, adapter.a, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(actual[1][0]["codes"].b, adapter.b, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(actual[1][1], x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_no_float_of_the_size_of_the_weight_is_kept(name):
    model, frozen, lora = prepared(name)

    def backward(frozen: Any, lora: Any) -> Any:
        return jax.vjp(lambda v: model.apply(frozen, v, X), lora)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, frozen, lora))
    floats = [x for x in kept if x.size >= IN * OUT and jnp.issubdtype(x.dtype, jnp.floating)]
    if name == "before a scan":  # the codes of a stack that is unpacked as a whole have no entries of their own
        assert len(floats) <= 1
    else:
        assert not floats


@pytest.mark.parametrize("execution", ["factored", "fused", "materialize"])
@pytest.mark.parametrize("name", ["qwix tiles", "keras int4", "scaled output", "mixed product"])
def test_every_execution_gives_the_same(name, execution):
    model, frozen, lora = prepared(name, execution=execution)
    lora = jax.tree.map(lambda v: v / 4, trained(lora))
    with jax.enable_x64(True):
        value = expected(name, *jax.tree.map(lambda v: np.asarray(v, np.float64), (lora["codes"], X)))
    np.testing.assert_allclose(loss(model.apply(frozen, lora, X)), value, rtol=1e-4, atol=1e-4)


def test_dropout_before_a_scaled_output():
    model, frozen, lora = prepared("scaled output", dropout=0.5)
    lora = jax.tree.map(lambda v: v / 4, trained(lora))
    apply = lambda key: model.apply(frozen, lora, X, dropout_key=key)
    assert not np.allclose(apply(jax.random.key(0)), apply(jax.random.key(1)))
    np.testing.assert_array_equal(apply(jax.random.key(0)), apply(jax.random.key(0)))


def test_weights_beside_the_adapted_one_keep_their_codes_as_well():
    """A code book is a chain for a weight without an adapter too."""

    def net(p, x):
        values = jnp.asarray(BOOK)[p["codes"]] * CHANNELS
        return jnp.tanh(x @ p["w"]) @ values

    params = {"codes": jnp.asarray(np.arange(IN * OUT).reshape(IN, OUT) % 16, jnp.uint8), "w": jnp.eye(IN)}
    model = lojax.wrap(net, "w", rank=2)
    frozen, lora = model.init(jax.random.key(0), params, X)
    np.testing.assert_array_equal(jax.jit(model.apply)(frozen, lora, X), jax.jit(net)(params, X))
    backward = lambda frozen, lora: jax.vjp(lambda v: model.apply(frozen, v, X), lora)[1]
    kept = jax.tree.leaves(jax.eval_shape(backward, frozen, lora))
    assert sum(x.size == IN * OUT and x.dtype == jnp.float32 for x in kept) <= 1  # w itself


def test_saved_and_restored(tmp_path):
    model, frozen, lora = prepared("keras int4")
    lora = trained(lora)
    lojax.save(tmp_path / "adapter", lora, frozen=frozen)
    again = lojax.restore(tmp_path / "adapter", frozen=frozen)
    np.testing.assert_array_equal(model.apply(frozen, again, X), model.apply(frozen, lora, X))


# --- what is refused ---


def test_an_activation_that_is_quantized_without_a_derivative():
    def net(p, x):
        y = lax.dot(jnp.round(x * 9).astype(jnp.int8), p["codes"], preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) * p["channels"]

    model = lojax.wrap(net, "codes", rank=2)
    text = message(ValueError, model.init, jax.random.key(0), {"codes": INT8, "channels": CHANNELS}, X)
    assert "codes: the net multiplies the codes (int8) with an activation that it quantized to int8" in text
    assert "Quantize the weights alone" in text


def test_axes_that_are_mixed():
    def net(p, x):
        return jnp.tile(x[0], OUT) @ p["codes"].astype(jnp.float32).reshape(-1)

    model = lojax.wrap(net, "codes", rank=2)
    text = message(ValueError, model.init, jax.random.key(0), {"codes": INT8}, X)
    assert "codes: the net uses what it makes of the codes in 'dot_general' in the shape (4096,)" in text
    assert "axes of the weight are mixed" in text


def test_an_adapter_of_another_shape():
    model, frozen, _ = prepared("keras int4 by channel")
    wider = {**FORMATS["keras int4 by channel"].params, "codes": jnp.ones((IN, 2 * OUT))}
    _, other = lojax.init(jax.random.key(0), wider, "codes", rank=2)
    assert "not as long as those of the adapter" in message(ValueError, model.apply, frozen, other, X)


def test_dropout_in_a_function_with_its_own_derivative():
    model, frozen, lora = prepared("keras int8", dropout=0.5)
    text = message(ValueError, model.apply, frozen, lora, X, dropout_key=jax.random.key(0))
    assert "codes: dropout on the input of its update" in text
    assert "Set dropout=0" in text
    model.apply(frozen, lora, X)


def test_float8_codes():
    codes = jnp.asarray(FORMATS["mixed product"].weight * 9, jnp.float8_e4m3fn)
    net = lambda p, x: x @ (p["codes"].astype(x.dtype) * p["channels"])
    params = {"codes": codes, "channels": CHANNELS}
    model = lojax.wrap(net, "codes", rank=2)
    text = message(ValueError, model.init, jax.random.key(0), params, X)
    assert "codes: holds float8_e4m3fn codes, which the net scales by itself" in text
    assert 'lojax.quantize(params, "float8_e4m3fn")' in text
    plain = lojax.wrap(lambda p, x: x @ p["codes"].astype(x.dtype), "codes", rank=2)
    plain.init(jax.random.key(0), params, X)  # a weight in float8


def test_codes_that_are_used_twice_in_different_ways():
    """The same codes as a weight and, transposed, as another one: each use has its update."""

    def net(p, x):
        w = unpack(p["codes"]).astype(x.dtype) * p["channels"]
        return jnp.tanh(jnp.tanh(x @ w) @ w.T)

    params = {key: jnp.asarray(v) for key, v in PACKED.items()}
    model = lojax.wrap(net, "codes", rank=2, alpha=4)
    frozen, lora = model.init(jax.random.key(0), params, X)
    lora = jax.tree.map(lambda v: v / 4, trained(lora))
    adapter = jax.tree.map(lambda v: np.asarray(v, np.float64), lora["codes"])
    w = FORMATS["keras int4 by channel"].weight + adapter.scale * adapter.a @ adapter.b
    y = np.tanh(np.tanh(np.asarray(X, np.float64) @ w) @ w.T)
    np.testing.assert_allclose(model.apply(frozen, lora, X), y, rtol=1e-4, atol=1e-4)
