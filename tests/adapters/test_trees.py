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


# --- arguments in the wrong place ---


def net(params, x):
    return x @ params["layers"][0]["kernel"]


def calls():
    """Every function that takes the pair, called with two arguments and an input."""
    model = lojax.wrap(net, "**/kernel", rank=2)
    x = jnp.ones((2, 6))
    return {
        "apply": lambda frozen, lora: model.apply(frozen, lora, x),
        "merge": lojax.merge,
        "summary": lojax.summary,
        "report": lambda frozen, lora: model.report(frozen, lora, x),
        "transform": lambda frozen, lora: lojax.transform(net)(frozen, lora, x),
    }


@pytest.mark.parametrize("name", calls())
def test_arguments_in_the_wrong_place_are_told_apart(name):
    (frozen, lora), call = make(), calls()[name]
    assert message(ValueError, call, lora, frozen) == (
        "frozen holds an adapter at layers/0/kernel, and lora holds none: they are swapped. The order is frozen, lora."
    )
    assert message(ValueError, call, (frozen, lora), jnp.ones((2, 6))) == (
        "frozen is the pair (frozen, lora) as one argument. Unpack it: f(*pair, ...)."
    )
    assert message(ValueError, call, frozen, (frozen, lora)) == (
        "lora is the pair (frozen, lora) as one argument. Unpack it: f(*pair, ...)."
    )
    assert message(ValueError, call, frozen, jnp.ones((2, 6))) == (
        "lora is an array float32[2,6], not a tree like frozen. The order is frozen, lora, inputs: is an argument "
        "missing?"
    )
    assert message(ValueError, call, lora, lora).startswith(
        "frozen holds an adapter at layers/0/kernel, and only lora may hold adapters."
    )


@pytest.mark.parametrize("name", calls())
def test_a_leaf_that_is_not_an_array_is_named(name):
    frozen, lora = make()
    frozen["stats"]["count"] = "three"
    text = message(TypeError, calls()[name], frozen, lora)
    assert text.endswith("holds 'three' (str), which is neither an array nor a number. Take it out of the tree.")


def test_init_names_a_leaf_that_is_not_an_array():
    params = PARAMS | {"stats": {"count": "three"}}
    for run in (
        lambda: lojax.init(jax.random.key(0), params, "**/kernel"),
        lambda: lojax.wrap(net, "**/kernel").init(jax.random.key(0), params, jnp.ones((2, 6))),
    ):
        assert message(TypeError, run).endswith(
            "holds 'three' (str), which is neither an array nor a number. Take it out of the tree."
        )


def test_a_pair_of_trees_that_are_tuples_is_a_pair():
    params = (jnp.ones((6, 4)), jnp.ones((4, 5)))
    frozen, lora = lojax.init(jax.random.key(0), params, "*", rank=2)
    check_pair(frozen, lora)
