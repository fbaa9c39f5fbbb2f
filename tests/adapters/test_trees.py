"""The two trees: which pairs do not fit together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax.core import freeze

import lojax
from lojax.adapters.trees import check_pair
from tests.helpers import message

PARAMS = {
    "layers": [{"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}],
    "stats": {"count": jnp.zeros((), jnp.int32)},
}


def make(**settings):
    return lojax.init(jax.random.key(0), PARAMS, "**/kernel", **({"rank": 2, "train": "layers/0/bias"} | settings))


def test_a_pair_of_one_init_fits():
    frozen, lora = make()
    left, right = check_pair(frozen, lora)
    assert (
        list(left)
        == list(right)
        == [
            "layers/0/bias",
            "layers/0/kernel",
            "layers/1/bias",
            "layers/1/kernel",
            "stats/count",
        ]
    )


@pytest.mark.parametrize("drop", ["frozen", "lora"])
def test_a_missing_path_is_named(drop):
    pair = dict(zip(("frozen", "lora"), make(), strict=True))
    holder = "lora" if drop == "frozen" else "frozen"
    pair[drop] = {k: v for k, v in pair[drop].items() if k != "stats"}
    assert message(ValueError, check_pair, pair["frozen"], pair["lora"]) == (
        f"frozen and lora have different structure: stats/count is in {holder} but not in {drop}. "
        "Use the pair that one init (or restore onto the same frozen) returned."
    )


@pytest.mark.parametrize("change", [freeze, lambda tree: tree | {"layers": tuple(tree["layers"])}])
def test_other_containers_with_the_same_paths_are_refused(change):
    frozen, lora = make()
    assert message(ValueError, check_pair, frozen, change(lora)) == (
        "frozen and lora have the same paths in different containers (such as a dict against a FrozenDict, or a list "
        "against a tuple). Convert one, or use the pair that one init returned."
    )


def test_an_array_in_both_is_refused():
    frozen, lora = make()
    lora["layers"][1]["bias"] = jnp.ones(5)
    assert message(ValueError, check_pair, frozen, lora) == (
        "layers/1/bias is an array in both frozen and lora; one of them must hold None there."
    )


def test_an_adapter_without_a_weight_is_refused():
    frozen, lora = make()
    frozen["layers"][1]["kernel"] = None
    assert message(ValueError, check_pair, frozen, lora) == (
        "layers/1/kernel: lora holds an adapter, but frozen holds no weight there (None)."
    )


def test_a_weight_of_another_shape_than_at_init_is_refused():
    frozen, lora = make()
    frozen["layers"][1]["kernel"] = jnp.ones((4, 7))
    assert message(ValueError, check_pair, frozen, lora) == (
        "layers/1/kernel: a weight of shape (4, 7) with axes ('in', 'out') needs an adapter of shapes (4, 2) and "
        "(2, 7), got (4, 2) and (2, 5). Were these params, or this adapter, made for another model?"
    )
    frozen["layers"][1]["kernel"] = jnp.ones((2, 4, 5))
    assert message(ValueError, check_pair, frozen, lora) == (
        "layers/1/kernel: the weight has shape (2, 4, 5), but its adapter has axes ('in', 'out')."
    )


def test_factors_of_two_ranks_are_refused():
    frozen, lora = make()
    lora["layers"][1]["kernel"] = dataclasses.replace(lora["layers"][1]["kernel"], b=jnp.zeros((3, 5)))
    assert "needs an adapter of shapes (4, 2) and (2, 5), got (4, 2) and (3, 5)" in message(
        ValueError, check_pair, frozen, lora
    )
