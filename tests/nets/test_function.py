"""Nets that hold no parameters.

Linen: collections, rngs and methods pass through, and Flax's own training loop runs. Haiku: the rng, or the state and
the rng, come first in the arguments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import lojax
from tests.helpers import assert_same_bits, message, trained


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3)(x)

    def double(self, x: Any) -> Any:
        return 2 * self(x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)
Y = jnp.arange(8) % 3


def setting() -> tuple[Any, Any, Any]:
    net = Net()
    model = lojax.wrap(net, "params/**/kernel", rank=2, alpha=4, strict=True)
    return model, *model.init(jax.random.key(0), jax.jit(net.init)(jax.random.key(1), X), X)


def test_collections_rngs_and_flags_pass_through() -> None:
    model, frozen, lora = setting()
    lora = trained(lora)
    settings: dict[str, Any] = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    outputs, changed = jax.jit(lambda: model.apply(frozen, lora, X, **settings))()
    expected, truth = jax.jit(lambda: Net().apply(model.merge(frozen, lora), X, **settings))()
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    mean = changed["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, truth["batch_stats"]["BatchNorm_0"]["mean"], rtol=1e-4, atol=1e-6)


def test_method_passes_through() -> None:
    model, frozen, lora = setting()
    for method in ("double", Net.double):
        np.testing.assert_allclose(
            model.apply(frozen, lora, X, method=method), 2 * model.apply(frozen, lora, X), rtol=1e-6
        )


@pytest.mark.usefixtures("standard_promotion")
def test_train_state_over_lora() -> None:
    model, frozen, lora = setting()
    state = TrainState.create(apply_fn=model.apply, params=lora, tx=optax.adam(5e-2))

    @jax.jit
    def step(state: Any) -> Any:
        def loss(lora: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn(frozen, lora, X), Y).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return value, state.apply_gradients(grads=grads)

    losses = []
    for _ in range(20):
        value, state = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.usefixtures("standard_promotion")
def test_train_state_over_everything_leaves_the_base_alone() -> None:
    model, frozen, lora = setting()
    params = {"frozen": frozen, "lora": lora}
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=lojax.optimizer(optax.adamw(5e-2, weight_decay=0.5))
    )

    @jax.jit
    def step(state: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = state.apply_fn(params["frozen"], params["lora"], X)
            return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = step(step(state))
    assert_same_bits(state.params["frozen"], frozen)
    assert all(np.abs(b).max() > 0 for b in (x.b for x in adapters(state.params["lora"])))


def adapters(lora: Any) -> list[Any]:
    is_adapter = lambda node: isinstance(node, lojax.Adapter)
    return [node for node in jax.tree.leaves(lora, is_leaf=is_adapter) if is_adapter(node)]


# --- Haiku ---


@pytest.fixture
def haiku() -> Any:
    return pytest.importorskip("haiku")


INPUT = jnp.linspace(-1, 1, 12).reshape(3, 4)


def test_transform_takes_the_rng_first(haiku: Any) -> None:
    net = haiku.transform(lambda x: haiku.Linear(5)(x) + jax.random.normal(haiku.next_rng_key(), (3, 5)))
    params = net.init(jax.random.key(0), INPUT)
    model = lojax.wrap(net, "linear/w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(1), params, jax.random.key(2), INPUT)
    lora = trained(lora)
    for key in (jax.random.key(3), jax.random.key(4)):
        expected = net.apply(model.merge(frozen, lora), key, INPUT)
        np.testing.assert_allclose(model.apply(frozen, lora, key, INPUT), expected, rtol=1e-5)


def test_transform_with_state_takes_the_state_and_the_rng_first(haiku: Any) -> None:
    def f(x: Any) -> Any:
        calls = haiku.get_state("calls", (), jnp.int32, jnp.zeros)
        haiku.set_state("calls", calls + 1)
        return haiku.Linear(5)(x)

    net = haiku.transform_with_state(f)
    params, state = net.init(jax.random.key(0), INPUT)
    model = lojax.wrap(net, "linear/w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(1), params, state, None, INPUT)
    y, state = jax.jit(model.apply)(frozen, lora, state, None, INPUT)
    np.testing.assert_allclose(y, INPUT @ params["linear"]["w"], rtol=1e-5)
    assert int(next(iter(jax.tree.leaves(state)))) == 1


def test_a_haiku_function_holds_no_parameters(haiku: Any) -> None:
    model = lojax.wrap(haiku.transform(lambda x: haiku.Linear(5)(x)), "linear/w")
    assert "A Haiku function holds no parameters" in message(AttributeError, getattr, model, "params")
    assert model.bind({"a": 1}) == {"a": 1}
