"""Equinox modules as nets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from tests.helpers import assert_same_bits, message, trained

eqx = pytest.importorskip("equinox")
X = jnp.linspace(-1, 1, 4)


def setting() -> tuple[Any, Any, Any, Any]:
    net = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))
    model = lojax.wrap(net, "**/weight", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(1), model.params, X)
    return net, model, frozen, trained(lora)


def test_params_are_the_module_with_its_arrays_alone() -> None:
    net, model, _, _ = setting()
    assert_same_bits(model.params, eqx.filter(net, eqx.is_inexact_array))


def test_bind_makes_a_module_that_computes_as_apply_does() -> None:
    net, model, frozen, lora = setting()
    bound = model.bind(model.merge(frozen, lora))
    assert type(bound) is type(net) and bound.activation is not None
    np.testing.assert_allclose(bound(X), model.apply(frozen, lora, X), rtol=1e-5)
    assert not np.allclose(bound(X), net(X))


def test_works_under_filter_jit_grad_and_vmap() -> None:
    _, model, frozen, lora = setting()
    xs = jnp.stack([X, 2 * X])

    def f(lora: Any, x: Any) -> Any:
        return model.apply(frozen, lora, x).sum()

    gradient = eqx.filter_jit(jax.vmap(jax.grad(f), (None, 0)))(lora, xs)
    expected = jax.grad(f)(lora, xs[1]).layers[1].weight.b
    np.testing.assert_allclose(gradient.layers[1].weight.b[1], expected, rtol=1e-4, atol=1e-6)


def test_method_and_state() -> None:
    class Counter(eqx.Module):
        linear: Any
        index: Any
        steps: Any

        def __init__(self) -> None:
            self.linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
            self.index = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))
            self.steps = jnp.arange(3)  # an integer array: no parameter

        def count(self, x: Any, state: Any) -> Any:
            return self.linear(x), state.set(self.index, state.get(self.index) + 1)

    net, state = eqx.nn.make_with_state(Counter)()
    model = lojax.wrap(net, "linear/weight", rank=2)
    assert model.params.steps is None
    frozen, lora = model.init(jax.random.key(0), model.params, X, state, method="count")
    y, state = model.apply(frozen, lora, X, state, method="count")
    np.testing.assert_array_equal(y, net.linear(X))
    assert int(state.get(net.index)) == 1


def test_the_module_itself_is_no_params() -> None:
    net, model, _, _ = setting()
    text = message(ValueError, model.init, jax.random.key(0), net, X)
    assert (
        text == "params holds activation, which the Equinox module MLP does not. Pass model.params, or a tree like it."
    )


def test_a_missing_leaf_is_named() -> None:
    _, model, _, _ = setting()
    params = eqx.tree_at(lambda m: m.layers[0].bias, model.params, None)
    assert "params lacks layers/0/bias (shape (8,))" in message(ValueError, model.bind, params)
