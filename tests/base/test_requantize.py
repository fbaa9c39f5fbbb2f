"""`merge` with ``requantize=True``, and the share of the update that it loses, by NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_same_bits, message

import lojax
from lojax import Adapter
from lojax.quantized.formats import KINDS
from lojax.quantized.quantized import is_quantized

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 64)), jnp.float32)


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


PARAMS = {"k": normal(64, 48), "bias": normal(48), "plain": normal(48, 64), "stack": normal(3, 64, 64)}
A, B = normal(64, 4), normal(4, 48)


def pair(kind, scale, **fields):
    frozen = lojax.quantize(PARAMS, kind, ["k", "stack"])
    adapter = Adapter(A, B, scale, ("in", "out"), **fields)
    return frozen, {"k": adapter, "bias": None, "plain": None, "stack": None}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_quantized_are_so_again_in_their_own_format(kind):
    frozen, lora = pair(kind, 0.1)
    merged = lojax.merge(frozen, lora, requantize=True)
    assert merged["k"].format == frozen["k"].format and jax.tree.structure(merged) == jax.tree.structure(frozen)
    float_sum = lojax.merge(frozen, lora)["k"]
    assert_same_bits(merged["k"], lojax.quantize({"k": float_sum}, kind)["k"])
    assert merged["stack"] is frozen["stack"], "no update, no other codes"
    np.testing.assert_array_equal(merged["plain"], PARAMS["plain"])
    jitted = jax.jit(lambda *pair: lojax.merge(*pair, requantize=True))(frozen, lora)
    assert jax.tree.structure(jitted) == jax.tree.structure(merged)
    donated = lojax.merge(*pair(kind, 0.1), requantize=True, check_finite=True)
    assert_same_bits(donated, merged)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1e-2, 1.0])
def test_the_share_that_is_lost(kind, variant, scale):
    frozen, lora = pair(kind, scale, magnitude=2 * jnp.ones(48) if variant == "dora" else None)
    shares = lojax.requantization_loss(frozen, lora)
    before, after = (np.asarray(x, np.float64) for x in (frozen["k"].dense(), lojax.merge(frozen, lora)["k"]))
    again = np.asarray(lojax.merge(frozen, lora, requantize=True)["k"].dense(), np.float64)
    expected = np.linalg.norm(after - again) / np.linalg.norm(after - before)
    assert shares.keys() == {"k"}
    assert shares["k"] == pytest.approx(expected, rel=2e-3) and isinstance(shares["k"], float)


def test_a_small_update_is_lost_and_a_large_one_gets_through():
    small, middle, large = (lojax.requantization_loss(*pair("nf4", scale))["k"] for scale in (1e-3, 0.1, 10))
    assert small > 0.9 > middle > 0.1 > large
    assert lojax.requantization_loss(*pair("int8", 0.1))["k"] < middle / 3


def test_a_fresh_adapter_has_nothing_to_lose():
    frozen = lojax.quantize(PARAMS, "nf4")
    frozen, lora = lojax.init(jax.random.key(0), frozen, ["k", "stack"], rank=2)
    assert lojax.requantization_loss(frozen, lora) == {"k": 0.0, "stack": 0.0}
    assert lojax.requantization_loss(*lojax.init(jax.random.key(0), PARAMS, "k", rank=2)) == {}


def test_the_merged_tree_goes_where_parameters_go():
    net = nn.Dense(48)
    variables = net.init(jax.random.key(0), X)
    model = lojax.wrap(net, "**/kernel", rank=4, init="loftq", base="nf4")
    frozen, lora = model.init(jax.random.key(0), variables, X)
    merged = model.merge(frozen, lora, requantize=True)
    assert is_quantized(merged["params"]["kernel"])
    again = lojax.wrap(net, "**/kernel", rank=2)
    np.testing.assert_allclose(
        again.apply(*again.init(jax.random.key(0), merged, X), X),
        X @ merged["params"]["kernel"].dense() + merged["params"]["bias"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_bad_input():
    frozen, lora = pair("nf4", 1.0)
    floats = lojax.init(jax.random.key(0), PARAMS, "k", rank=2)
    text = message(ValueError, lojax.merge, *floats, requantize=True)
    assert "frozen holds no quantized weight" in text and "lojax.quantize" in text
    assert "requantize='nf4'; expected True or False" in message(TypeError, lojax.merge, frozen, lora, requantize="nf4")
    assert "outside of jit" in message(ValueError, jax.jit(lojax.requantization_loss), frozen, lora)
    text = message(ValueError, lojax.merge, *pair("nf4", float("nan")), requantize=True, check_finite=True)
    assert "NaN or infinity at k" in text
