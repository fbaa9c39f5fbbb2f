"""Transformed Haiku functions as nets: the rng, or the state and the rng, come first in the arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message, trained

import lojax

hk = pytest.importorskip("haiku")
X = jnp.linspace(-1, 1, 12).reshape(3, 4)


def test_transform_takes_the_rng_first() -> None:
    net = hk.transform(lambda x: hk.Linear(5)(x) + jax.random.normal(hk.next_rng_key(), (3, 5)))
    params = net.init(jax.random.key(0), X)
    model = lojax.wrap(net, "linear/w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(1), params, jax.random.key(2), X)
    lora = trained(lora)
    for key in (jax.random.key(3), jax.random.key(4)):
        expected = net.apply(model.merge(frozen, lora), key, X)
        np.testing.assert_allclose(model.apply(frozen, lora, key, X), expected, rtol=1e-5)


def test_transform_with_state_takes_the_state_and_the_rng_first() -> None:
    def f(x: Any) -> Any:
        calls = hk.get_state("calls", (), jnp.int32, jnp.zeros)
        hk.set_state("calls", calls + 1)
        return hk.Linear(5)(x)

    net = hk.transform_with_state(f)
    params, state = net.init(jax.random.key(0), X)
    model = lojax.wrap(net, "linear/w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(1), params, state, None, X)
    y, state = jax.jit(model.apply)(frozen, lora, state, None, X)
    np.testing.assert_allclose(y, X @ params["linear"]["w"], rtol=1e-5)
    assert int(next(iter(jax.tree.leaves(state)))) == 1


def test_it_holds_no_parameters() -> None:
    model = lojax.wrap(hk.transform(lambda x: hk.Linear(5)(x)), "linear/w")
    assert "A Haiku function holds no parameters" in message(AttributeError, getattr, model, "params")
    assert model.bind({"a": 1}) == {"a": 1}
