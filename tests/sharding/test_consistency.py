"""Adapters that differ between processes are found and named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import lojax
from lojax.sharding.consistency import check_agreement


def trained(seed=0, **settings):
    params = {"q": jnp.ones((8, 4)), "k": jnp.ones((8, 4))}
    return lojax.init(jax.random.key(seed), params, "*", **({"rank": 2} | settings))[1]


def sent(lora):
    found = []
    check_agreement(lora, gather=lambda text: found.append(text) or [text])
    return found[0]


def test_the_same_adapters_pass():
    check_agreement(trained())
    check_agreement(trained(), gather=lambda text: [text, sent(trained())])


OTHERS = {
    "another seed": (
        lambda: trained(seed=1),
        r"k differs between processes: process 0, 2: .*hash \w+; process 1: .*hash",
    ),
    "another rank": (lambda: trained(rank=3), r"k differs .* process 1: scale 1.0, axes in out, float32\[8,3\]"),
    "another scale": (lambda: trained(alpha=7), r"process 1: scale 3.5"),
    "one missing": (lambda: {**trained(), "q": None}, r"q differs .*process 1: nothing"),
    "another dtype": (lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained()), r"process 1: .*bfloat16"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_process_that_differs_is_named(name):
    make, message = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        check_agreement(trained(), gather=lambda text: [text, sent(make()), text])


def test_values_count():
    lora = trained()
    other = {**lora, "q": dataclasses.replace(lora["q"], b=lora["q"].b + 1e-7)}
    assert json.loads(sent(lora))["k"] == json.loads(sent(other))["k"]
    with pytest.raises(ValueError, match="q differs"):
        check_agreement(lora, gather=lambda text: [text, sent(other)])
