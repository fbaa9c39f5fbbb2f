"""New adapters: who holds which leaf, what each adapter holds, and what its rule cannot ask for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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


def test_a_rank_above_both_sides_names_them():
    assert message(ValueError, make, rank=5) == (
        "layers/0/kernel: rank=5 is above min(m, n) = 4 (shape (6, 4), axes ('in', 'out'): m=6 in, n=4 out). "
        "Choose a rank of at most 4, or train the weight in full."
    )
    make(rank=4)


def test_the_bound_on_the_rank_is_that_of_one_weight_of_a_stack():
    params = {"w": jnp.ones((2, 6, 4))}
    lojax.init(jax.random.key(0), params, "w", rank=4, axes=("stack", "in", "out"))
    text = message(ValueError, lojax.init, jax.random.key(0), params, "w", rank=5, axes=("stack", "in", "out"))
    assert "m=6 in, n=4 out" in text


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
