"""Flax models of Hugging Face transformers as nets."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import lojax
from tests.helpers import assert_same_bits, message, trained
from tests.nets.zoo.transformers import GPT2, IDS
from tests.nets.zoo.transformers import model as tiny

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("standard_promotion")


def setting() -> tuple[Any, Any, Any, Any]:
    net, params = tiny("FlaxGPT2LMHeadModel", "GPT2Config", GPT2)
    net._is_initialized, net.params = True, params  # as from_pretrained does
    model = lojax.wrap(net, ["**/kernel", "**/wte/embedding"], rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(1), model.params, IDS)
    return net, model, frozen, trained(lora)


def test_bind_makes_a_model_and_leaves_the_first_alone() -> None:
    net, model, frozen, lora = setting()
    before = net.params
    bound = model.bind(model.merge(frozen, lora))
    assert type(bound) is type(net) and bound.config is net.config and net.params is before
    outputs = jax.jit(lambda: bound(IDS).logits)()
    np.testing.assert_allclose(outputs, jax.jit(model.apply)(frozen, lora, IDS).logits, rtol=1e-4, atol=1e-4)
    assert not np.allclose(outputs, jax.jit(lambda: net(IDS).logits)())


@pytest.mark.slow
def test_generates_adapted() -> None:
    _, model, frozen, lora = setting()
    settings: dict[str, Any] = {"max_length": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = model.apply(frozen, lora, IDS, method="generate", **settings)
    theirs = model.bind(model.merge(frozen, lora)).generate(IDS, **settings)
    assert_same_bits(ours.sequences, theirs.sequences)


def test_a_model_made_without_parameters_says_so() -> None:
    net, params = tiny("FlaxGPT2LMHeadModel", "GPT2Config", GPT2)
    model = lojax.wrap(net, "**/kernel", rank=2)
    text = message(AttributeError, getattr, model, "params")
    assert "FlaxGPT2LMHeadModel was made with _do_init=False and holds no parameters" in text
    assert model.bind(params).params is params


def test_a_missing_leaf_is_named() -> None:
    _, model, _, _ = setting()
    params = {"transformer": {**model.params["transformer"], "ln_f": {}}}
    text = message(ValueError, model.init, jax.random.key(0), params, IDS)
    assert text.startswith("params lacks transformer/ln_f/bias (shape (32,)): 2 of the ")
