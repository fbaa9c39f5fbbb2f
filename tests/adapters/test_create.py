"""New adapters: who holds which leaf, what each adapter holds, and what its rule cannot ask for."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import lojax
from lojax import Rule
from lojax.adapters.adapter import is_adapter
from tests.helpers import assert_same_bits, message

PARAMS = {
    "layers": [{"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}],
    "stats": {"count": jnp.zeros((), jnp.int32)},
}


def make(**settings):
    return lojax.init(jax.random.key(0), PARAMS, "**/kernel", **({"rank": 2, "train": "layers/0/bias"} | settings))


def test_every_leaf_has_one_holder():
    frozen, lora = make()
    assert jax.tree.structure(frozen, is_leaf=lambda x: x is None) == jax.tree.structure(PARAMS)
    assert_same_bits(frozen["layers"][0]["kernel"], PARAMS["layers"][0]["kernel"])
    assert is_adapter(lora["layers"][0]["kernel"])
    assert is_adapter(lora["layers"][1]["kernel"])
    assert frozen["layers"][0]["bias"] is None
    assert_same_bits(lora["layers"][0]["bias"], PARAMS["layers"][0]["bias"])
    assert_same_bits(frozen["layers"][1]["bias"], PARAMS["layers"][1]["bias"])
    assert lora["layers"][1]["bias"] is None
    assert lora["stats"]["count"] is None
    assert_same_bits(frozen["stats"], PARAMS["stats"])


def test_what_the_tree_does_not_hold_stays_so():
    frozen, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((3, 3)), "gone": None}, "w", rank=1)
    assert frozen["gone"] is None
    assert lora["gone"] is None


def test_the_container_types_of_params_are_kept():
    frozen, lora = lojax.init(jax.random.key(0), freeze(PARAMS), "**/kernel", rank=2)
    assert type(frozen) is type(lora) is type(freeze({}))


def test_the_adapter_holds_what_its_rule_says():
    _, lora = make(alpha=6, dropout=0.25, scaling="rslora", dtype=jnp.bfloat16, rank=4)
    adapter = lora["layers"][0]["kernel"]
    assert (adapter.scale, adapter.dropout, adapter.rank, adapter.axes) == (3.0, 0.25, 4, ("in", "out"))
    assert adapter.a.dtype == adapter.b.dtype == jnp.bfloat16


def test_axes_said_outright_win_over_the_convention():
    _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((6, 4))}, Rule("w", rank=2, axes=("out", "in")))
    assert (lora["w"].axes, lora["w"].a.shape, lora["w"].b.shape) == (("out", "in"), (4, 2), (2, 6))


def test_axes_of_the_wrong_length_name_the_path():
    text = message(ValueError, make, axes=("in", "in", "out"))
    assert text.startswith("layers/0/kernel: axes ('in', 'in', 'out') describe 3 axes")


# --- a rank above min(m, n) ---


def test_a_rank_above_min_m_n_is_lowered_visibly():
    frozen, lora = make(rank=5, alpha=10)
    small, large = lora["layers"][0]["kernel"], lora["layers"][1]["kernel"]
    assert (small.rank, small.requested_rank, small.a.shape, small.b.shape) == (4, 5, (6, 4), (4, 4))
    assert (large.rank, large.requested_rank) == (4, 5)
    assert small.scale == large.scale == 2.0, "the scale that was asked for, alpha / 5, as for every other weight"
    assert "layers/0/kernel  (6, 4)  5 → 4" in str(lojax.summary(frozen, lora))
    assert [row.rank for row in lojax.summary(frozen, lora).rows if row.rank] == [4, 4]
    fits = make(rank=4)[1]["layers"][0]["kernel"]
    assert (fits.rank, fits.requested_rank) == (4, None)


@pytest.mark.parametrize("target", ["layers/0/kernel", "**/0/kernel", re.compile("layers/0/kernel")])
def test_a_rank_asked_for_that_very_weight_is_an_error(target):
    rules = [Rule(target, rank=5), "**/1/kernel"]
    assert message(ValueError, lojax.init, jax.random.key(0), PARAMS, rules, rank=2) == (
        "layers/0/kernel: rank=5 is above min(m, n) = 4 (shape (6, 4), axes ('in', 'out'): m=6 in, n=4 out). "
        "Choose a rank of at most 4, or train the weight in full."
    )


def test_a_rule_for_many_weights_or_without_a_rank_of_its_own_is_lowered():
    for targets in (Rule("**/kernel", rank=5), [Rule("layers/0/kernel", dropout=0.1), "**/1/kernel"]):
        lora = lojax.init(jax.random.key(0), PARAMS, targets, rank=5)[1]
        assert {layer["kernel"].rank for layer in lora["layers"]} == {4}


def test_the_bound_on_the_rank_is_that_of_one_weight_of_a_stack():
    params = {"w": jnp.ones((2, 6, 4))}
    lora = lojax.init(jax.random.key(0), params, "w", rank=5, axes=("stack", "in", "out"))[1]
    assert (lora["w"].rank, lora["w"].requested_rank) == (4, 5)
    rule = Rule("w", rank=(5, 1), axes=("stack", "in", "out"))
    assert "m=6 in, n=4 out" in message(ValueError, lojax.init, jax.random.key(0), params, rule)


def test_a_lowered_rank_is_gone_once_the_rank_is_chosen_anew():
    lora = make(rank=5, train=())[1]
    assert lojax.resize(lora, 3)["layers"][0]["kernel"].requested_rank is None
    assert lojax.combine([lora, lora], [1.0, 1.0])["layers"][0]["kernel"].requested_rank is None


# --- starts that move the weight ---


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "milora", "olora"])
def test_an_adapter_says_that_its_start_moved_the_weight(init):
    weight = jax.random.normal(jax.random.key(1), (6, 4))
    params, other = {"w": weight}, {"w": 2 * weight}
    _, lora = lojax.init(jax.random.key(0), params, "w", rank=2, init=init)
    _, again = lojax.init(jax.random.key(0), other, "w", rank=2, init=init)
    assert lora["w"].moved_base == init
    assert lojax.rescale(lora, 0.5)["w"].moved_base == lojax.resize(lora, 1)["w"].moved_base == init
    assert lojax.combine([lora, again], [0.5, 0.5])["w"].moved_base == init
    assert lojax.subtract(again, lora)["w"].moved_base is None, "which goes with the weight as it was"


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_an_adapter_whose_start_adds_nothing_goes_with_the_weight_as_it_is(init):
    assert lojax.init(jax.random.key(0), {"w": jnp.ones((6, 4))}, "w", rank=2, init=init)[1]["w"].moved_base is None


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "milora", "olora"])
def test_a_weight_that_is_not_finite_cannot_be_factorized(init, bad):
    params = {"w": jnp.ones((6, 4)).at[1, 2].set(bad)}
    assert message(ValueError, lojax.init, jax.random.key(0), params, "w", rank=2, init=init) == (
        f"w: 1 of the 24 entries of the weight are not finite, and init={init!r} factorizes it. Repair the weight, or "
        'use init="kaiming".'
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
def test_dora_needs_columns_of_a_finite_length_above_zero(bad):
    params = {"w": jnp.ones((4, 3)).at[:, 1].set(bad)}
    text = message(ValueError, lojax.init, jax.random.key(0), params, "w", rank=2, variant="dora")
    assert text.startswith("w: 1 of the 3 columns of the weight are zero or not finite")


# --- the key ---


@pytest.mark.parametrize("key", [PARAMS, 0, None, jnp.ones((2, 3)), np.int32(1)])
def test_a_forgotten_key_is_named(key):
    model = lojax.wrap(lambda params, x: x @ params["layers"][0]["kernel"], "**/0/kernel", rank=2)
    for init in (model.init, lambda *args: lojax.init(*args, "**/0/kernel")):
        text = message(TypeError, init, key, jnp.ones((2, 6)))
        assert text.startswith("init takes a PRNG key first: init(jax.random.key(0), params, ...). Got ")


def test_every_kind_of_key_is_one():
    for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(0, impl="rbg"), np.zeros(2, np.uint32)):
        lojax.init(key, PARAMS, "**/0/kernel", rank=2)
    jax.jit(lambda key: lojax.init(key, PARAMS, "**/0/kernel", rank=2))(jax.random.key(0))


# --- Linen ---


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))


def test_statistics_of_a_linen_net_do_not_train_with_its_scales():
    x = jnp.ones((2, 3))
    variables = jax.eval_shape(Normed().init, jax.random.key(0), x)
    model = lojax.wrap(Normed(), "**/kernel", rank=2, train="**/BatchNorm_0/*")
    frozen, lora = jax.eval_shape(model.init, jax.random.key(0), variables, x)
    assert lora["batch_stats"]["BatchNorm_0"] == {"mean": None, "var": None}
    assert frozen["params"]["BatchNorm_0"] == {"bias": None, "scale": None}
    assert frozen["batch_stats"]["BatchNorm_0"]["mean"].shape == lora["params"]["BatchNorm_0"]["scale"].shape == (4,)
