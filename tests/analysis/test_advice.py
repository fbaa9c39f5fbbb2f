"""`advise`: each hint against a count by hand, or against what is really there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import message, trained

import lojax
from lojax.adapters.paths import flatten, unflatten
from lojax.analysis.advice import Hint, advise
from lojax.analysis.memory import full_memory, lora_memory
from lojax.planner.decoder import parameter_specs
from lojax.planner.decoder_config import PRESETS

AXES = ("stack", "in", "out")


def llama(targets: str, **settings):
    """Llama 3.1 8B, as shapes."""
    specs = parameter_specs(PRESETS["8B"])
    params = unflatten({path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, (shape, _) in specs.items()})
    rule = lojax.Rule(targets, axes=AXES)
    return jax.eval_shape(lambda p: lojax.init(jax.random.key(0), p, rule, **settings), params)


def hint(advice, topic: str) -> Hint:
    (found,) = (hint for hint in advice.hints if hint.topic == topic)
    return found


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("targets", "count"), [("layers/mlp/**/kernel", 1_769_472), ("layers/self_attn/**/kernel", 851_968)]
)
def test_the_counts_are_those_of_tinker(targets, count):
    advice = advise(*llama(targets, rank=1), tokens=10 * count)
    capacity = hint(advice, "capacity")
    assert capacity.warning and capacity.text.startswith(f"{count:,} numbers train")
    assert "rank 10 instead of 1 would have as many" in capacity.text and "Tinker" in capacity.source
    assert not hint(advise(*llama(targets, rank=1), tokens=count), "capacity").warning
    assert "Pass tokens=" in hint(advise(*llama(targets, rank=1)), "capacity").text


def test_attention_alone_is_warned_against():
    attention = hint(advise(*llama("layers/self_attn/**/kernel", rank=1)), "targets")
    assert attention.warning and "other linear maps (3, such as layers/mlp/down_proj/kernel)" in attention.text
    some = hint(advise(*llama("layers/**/{up_proj,q_proj}/kernel", rank=1)), "targets")
    assert not some.warning and "2 of 7 linear maps are adapted, with 35% of their numbers" in some.text
    every = hint(advise(*llama("layers/**/kernel", rank=1)), "targets")
    assert not every.warning and every.text == "every linear map is adapted (7), which does best."


def test_names_that_mean_attention_and_names_that_are_outside():
    params = {
        "bert": {"embeddings": {"word": jnp.ones((9, 4))}, "layer_0": {"attention": {"out": jnp.ones((4, 4))}}},
        "layer_0": {"LayerNorm": {"scale": jnp.ones((2, 4))}, "wq": jnp.ones((4, 4)), "fc": jnp.ones((4, 4))},
        "lm_head": jnp.ones((4, 9)),
    }
    pair = lojax.init(jax.random.key(0), params, "**/{out,wq}", rank=1)
    assert "other linear maps (1, such as layer_0/fc)" in hint(advise(*pair), "targets").text


def test_learning_rates():
    pair = llama("layers/**/kernel", rank=8)
    assert hint(advise(*pair), "learning rate").text.startswith("about ten times")
    assert hint(advise(*pair, learning_rate=2e-5), "learning rate").text.startswith("0.0002, ten times")
    short = hint(advise(*pair, learning_rate=2e-5, steps=60), "learning rate")
    assert short.text.startswith("0.0003, fifteen times that of full fine-tuning, for a run as short as 60 steps")
    assert "b_ratio=16" in hint(advise(*pair), "learning rate of b").text


def test_scales():
    usual = hint(advise(*llama("layers/**/kernel", rank=8, alpha=32)), "scale")
    assert usual.text.startswith("alpha 32 at rank 8, a scale of 4.") and not usual.warning
    weak = hint(advise(*llama("layers/**/kernel", rank=256, alpha=16)), "scale")
    assert weak.warning and "alpha / r = 0.0625" in weak.text and "alpha / sqrt(r) = 1 here" in weak.text
    assert not hint(advise(*llama("layers/**/kernel", rank=256, alpha=16, scaling="rslora")), "scale").warning


def test_memory_is_what_is_there():
    params = {
        "w": jnp.ones((64, 128), jnp.bfloat16),
        "v": jnp.ones((3, 64, 64), jnp.bfloat16),
        "head": jnp.ones((4, 3)),
    }
    rules = ["w", lojax.Rule("v", axes=AXES, variant="lora-fa")]
    make = lambda **base: jax.eval_shape(
        lambda p: lojax.init(jax.random.key(0), p, rules, rank=4, train="head", **base), params
    )
    frozen, lora = make()
    got = lora_memory(flatten(frozen), flatten(lora))
    state = jax.eval_shape(lojax.optimizer(optax.adam(1e-3)).init, lora)
    counts = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim == 0)
    assert (got.weights, got.trained, got.moments) == (nbytes(frozen), nbytes(lora), nbytes(state) - counts)
    assert got.gradients == nbytes(lora) - nbytes(lora["v"].a)
    small, _ = make(base="nf4")
    assert lora_memory(flatten(frozen), flatten(lora), quantized=True).weights == nbytes(small)
    assert lora_memory(flatten(small), flatten(lora)).weights == nbytes(small)
    full = jax.eval_shape(optax.adam(1e-3).init, params)
    for tree in (frozen, small):
        memory = full_memory(flatten(tree), flatten(lora))
        assert memory == (0, nbytes(params), nbytes(params), nbytes(full) - 4)
    text = hint(advise(frozen, lora), "memory").text
    assert f"{got.total / 1e3:.1f} kB for these adapters" in text and 'with base="nf4"' in text
    assert f"{4 * nbytes(params) / 1e3:.1f} kB for full fine-tuning" in text
    assert "nf4" not in hint(advise(small, lora), "memory").text


def test_the_ranks_of_a_trained_adapter():
    frozen, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((3, 16, 12))}, "w", rank=4, axes=AXES)
    assert not [hint for hint in advise(frozen, lora).hints if hint.topic == "ranks"]  # nothing learned yet
    one = trained(lora)["w"]
    strength = jnp.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], jnp.float32)
    lora = {"w": dataclasses.replace(one, b=one.b * strength[:, :, None])}
    found = hint(advise(frozen, lora, energy=1.0), "ranks")
    assert found.text == (
        "of 4.0 ranks, 2.0 carry 100% of the updates, in the mean over 3 matrices; lojax.trim(lora, 1) leaves 1 to 3."
    )
    assert np.mean(lojax.trim(lora, 1.0)["w"].ranks) == 2.0


def test_the_text_names_its_sources_and_marks_warnings():
    advice = advise(*llama("layers/self_attn/**/kernel", rank=1), tokens=10**9)
    paragraphs = advice.text.replace("\n    ", " ").splitlines()
    assert len(paragraphs) == len(advice.hints) and all(paragraph.endswith("]") for paragraph in paragraphs)
    assert [line.startswith("! ") for line in paragraphs] == [hint.warning for hint in advice.hints]
    assert max(map(len, advice.text.splitlines())) <= 100 and str(advice) == repr(advice) == advice.text
    assert len(advice.warnings) == 2


def test_what_advise_refuses():
    frozen, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=1)
    for name, value in (("tokens", 0), ("steps", 1.5), ("learning_rate", -1), ("energy", 0)):
        assert f"{name}={value}" in message(ValueError, advise, frozen, lora, **{name: value})
    assert "no low-rank adapter" in message(ValueError, advise, {"w": jnp.ones((4, 3))}, {"w": None})
