"""Initializers: bounds and moments from the paper and from PEFT, keys by path."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from lojax.adapters.initializers import gaussian, initializer, kaiming, key_for
from tests.helpers import assert_same_bits, message

PARAMS = {
    name: np.ones(shape, np.float32) for name, shape in (("one", (64, 48)), ("two", (64, 48)), ("stack", (3, 64, 48)))
}


KNOWN = [
    *("gaussian", "kaiming", "loftq", "loftq_niter_1", "milora", "olora", "orthogonal", "pissa", "pissa_niter_4"),
]


def init(targets, **settings):
    return lojax.init(jax.random.key(3), PARAMS, targets, rank=16, **settings)[1]


@pytest.mark.parametrize("m", [16, 100, 768])
def test_kaiming_is_uniform_with_bound_one_over_sqrt_m(m):
    a = np.asarray(kaiming(jax.random.key(0), (m, 4000 // m * 16), jnp.float32, fan_in=m, rank=8), np.float64)
    bound = 1 / math.sqrt(m)
    assert a.max() <= bound
    assert a.min() >= -bound
    assert a.max() > 0.999 * bound
    assert a.min() < -0.999 * bound
    assert abs(a.var() / (bound**2 / 3) - 1) < 4 / math.sqrt(a.size)
    assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.size)


@pytest.mark.parametrize("rank", [1, 8])
def test_gaussian_has_standard_deviation_one_over_rank(rank):
    a = np.asarray(gaussian(jax.random.key(0), (8000, rank), jnp.float32, fan_in=5, rank=rank), np.float64)
    assert abs(a.std() * rank - 1) < 4 / math.sqrt(2 * a.size)
    assert abs(a.mean() * rank) < 4 / math.sqrt(a.size)
    assert a.max() * rank > 3


def test_fan_in_is_one_weight_of_a_stack_and_all_in_axes():
    params = {"w": np.ones((5, 8, 4, 6), np.float32)}
    _, lora = lojax.init(jax.random.key(0), params, "w", rank=4, axes=("stack", "in", "in", "out"))
    assert lora["w"].a.shape == (5, 8, 4, 4)
    assert 0.98 / math.sqrt(32) < np.abs(lora["w"].a).max() <= 1 / math.sqrt(32)


def test_b_starts_at_zero_in_the_dtype_asked_for():
    for dtype in (None, jnp.bfloat16):
        adapter = init("one", dtype=dtype)["one"]
        assert adapter.a.dtype == adapter.b.dtype == (dtype or jnp.float32)
        assert not np.asarray(adapter.b).any()
        assert np.asarray(adapter.a).any()


def test_a_weight_starts_alike_whatever_else_is_adapted_and_in_any_order():
    alone = init("two")["two"]
    assert_same_bits(alone, init(["one", "two", "stack"])["two"])
    assert_same_bits(alone, init(["two", "stack", "one"])["two"])
    assert_same_bits(alone, init("two", train="one")["two"])


def test_two_weights_and_two_keys_differ():
    lora = init("**")
    assert not np.array_equal(lora["one"].a, lora["two"].a)
    assert not np.array_equal(lora["stack"].a[0], lora["stack"].a[1])
    assert not np.array_equal(
        jax.random.key_data(key_for(jax.random.key(0), "a/b")), jax.random.key_data(jax.random.key(0))
    )
    other = lojax.init(jax.random.key(4), PARAMS, "one", rank=16)[1]["one"]
    assert not np.array_equal(lora["one"].a, other.a)


def test_old_and_new_style_keys_give_the_same_start():
    new, old = jax.random.key(5), jax.random.PRNGKey(5)
    assert_same_bits(lojax.init(new, PARAMS, "one")[1]["one"], lojax.init(old, PARAMS, "one")[1]["one"])


def test_init_is_pure_under_jit_and_eval_shape():
    def run(key, params):
        return lojax.init(key, params, ["one", "stack"], rank=4, alpha=8)

    eager = run(jax.random.key(1), PARAMS)
    jitted = jax.jit(run)(jax.random.key(1), PARAMS)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for x, y in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=0)
    shapes = jax.eval_shape(run, jax.random.key(1), PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)
    assert shapes[1]["stack"].a == jax.ShapeDtypeStruct((3, 64, 4), jnp.float32)


def test_an_own_function_is_called_with_all_it_may_need():
    seen = {}

    def ones(key, shape, dtype, *, fan_in, rank):
        seen.update(shape=shape, dtype=dtype, fan_in=fan_in, rank=rank)
        return jnp.ones(shape, dtype)

    assert (init("one", init=ones)["one"].a == 1).all()
    assert seen == {"shape": (64, 16), "dtype": jnp.float32, "fan_in": 64, "rank": 16}


def test_an_unknown_name_lists_those_that_exist():
    assert message(ValueError, initializer, "gausian") == (
        f"init='gausian' is unknown; expected one of {KNOWN}. Did you mean 'gaussian'?"
    )
    assert message(ValueError, initializer, "zzz") == f"init='zzz' is unknown; expected one of {KNOWN}."
