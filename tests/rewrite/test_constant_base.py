"""A base that a jit captures is warned about; nothing else is."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from lojax.rewrite import constant_base
from lojax.rewrite.constant_base import warn_if_frozen_is_constant


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    monkeypatch.setattr(constant_base, "LIMIT", 1000)


def trees(size=32):
    params = {"w": jnp.ones((size, size)), "unused": None}
    return lojax.init(jax.random.key(0), params, "w", rank=2)


def loss(lora, frozen):
    warn_if_frozen_is_constant(frozen, lora)
    return jnp.sum(lora["w"].a) + jnp.sum(frozen["w"])


FROZEN, LORA = trees()
STACK = jax.tree.map(lambda x: jnp.stack([x, x]), LORA)
CAPTURED = {
    "jit": lambda: jax.jit(lambda lora: loss(lora, FROZEN)).trace(LORA),
    "jit of grad": lambda: jax.jit(jax.grad(lambda lora: loss(lora, FROZEN))).trace(LORA),
    "grad of jit": lambda: jax.grad(jax.jit(lambda lora: loss(lora, FROZEN)))(LORA),
    "jit of vmap of grad": lambda: jax.jit(jax.vmap(jax.grad(lambda lora: loss(lora, FROZEN)))).trace(STACK),
    "scan inside jit": lambda: jax.jit(
        lambda lora: jax.lax.scan(lambda c, _: (c, loss(c, FROZEN)), lora, None, length=2)
    ).trace(LORA),
    "NumPy arrays": lambda: jax.jit(lambda lora: loss(lora, jax.tree.map(np.asarray, FROZEN))).trace(LORA),
}
FINE = {
    "eager": lambda: loss(LORA, FROZEN),
    "grad": lambda: jax.grad(loss)(LORA, FROZEN),
    "vmap": lambda: jax.vmap(lambda lora: loss(lora, FROZEN))(STACK),
    "vmap of grad": lambda: jax.vmap(jax.grad(lambda lora: loss(lora, FROZEN)))(STACK),
    "jvp, vjp, linearize": lambda: (
        jax.jvp(lambda lora: loss(lora, FROZEN), (LORA,), (LORA,)),
        jax.vjp(lambda lora: loss(lora, FROZEN), LORA),
        jax.linearize(lambda lora: loss(lora, FROZEN), LORA),
    ),
    "an argument of jit": lambda: jax.jit(jax.grad(loss)).trace(LORA, FROZEN),
    "both captured on purpose": lambda: jax.jit(lambda x: x * loss(LORA, FROZEN)).trace(1.0),
    "lora captured": lambda: jax.jit(lambda frozen: loss(LORA, frozen)).trace(FROZEN),
    "a small base": lambda: jax.jit(lambda lora: loss(lora, trees(4)[0])).trace(trees(4)[1]),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_base_is_warned_about(name):
    with pytest.warns(UserWarning, match=r"frozen \(0 MiB\) is captured .* Pass it as an argument"):
        CAPTURED[name]()


@pytest.mark.parametrize("name", FINE)
def test_nothing_else_is(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FINE[name]()


def test_the_default_filter_prints_it_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        CAPTURED["jit"]()
        CAPTURED["jit of grad"]()
    assert len(caught) == 1


def test_no_warning_where_jax_passes_captured_arrays_as_arguments():
    flag = "jax_use_simplified_jaxpr_constants"
    if not hasattr(jax.config, flag):
        pytest.skip("this JAX has no such flag")
    jax.config.update(flag, True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            CAPTURED["jit"]()
    finally:
        jax.config.update(flag, False)


def test_an_adapted_net_warns_of_a_captured_base_and_not_of_an_argument():
    net = lojax.transform(lambda params, x: x @ params["w"])
    x = jnp.ones((2, 32))
    with pytest.warns(UserWarning, match="captured by the function that is traced here"):
        jax.jit(lambda lora, x: net(FROZEN, lora, x)).lower(LORA, x)
    jax.jit(net).lower(FROZEN, LORA, x)
    jax.grad(lambda lora: net(FROZEN, lora, x).sum())(LORA)
