"""Steps and their operands: what the engine may treat as equal, and what it may take apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lojax
from lojax.lowrank.frozen import DenseWeight
from lojax.rewrite.frozen_chains import evaluate_chained


def chained(f, w):
    """The first equation of ``f`` as a chain on ``w``."""
    (eqn, *_) = jax.make_jaxpr(f)(w).eqns
    return evaluate_chained(eqn, [DenseWeight(w) if v is eqn.invars[0] else v.val for v in eqn.invars])


def test_steps_with_other_numbers_are_other_steps():
    """To Python 0.0 equals -0.0 and 1 equals True, and a step is a key under which a rewritten body is kept."""
    w = jnp.ones((4, 4))
    plus, minus = (chained(lambda w, x=x: lax.mul(w, np.float32(x)), w) for x in (0.0, -0.0))
    assert plus.compute != minus.compute
    assert chained(lambda w: lax.mul(w, np.float32(0.0)), w).compute == plus.compute
    signs = [str(np.asarray(weight.dense())[0, 0]) for weight in (plus, minus)]
    assert signs == ["0.0", "-0.0"]


@pytest.mark.parametrize("wide", [False, True])
def test_a_number_keeps_the_dtype_that_the_program_gave_it(wide):
    with jax.enable_x64(wide):
        params = {"w": jnp.ones((2, 64, 64), jnp.float32), "v": jnp.ones((64, 64), jnp.float32)}
        f = lambda p, x: x @ (p["v"].astype(jnp.float16) * 2.0).astype(jnp.float32) @ (p["w"][0] / 3 + 0.5)
        x = jnp.ones((3, 64), jnp.float32)
        model = lojax.wrap(f, "w", rank=2)
        frozen, lora = model.init(jax.random.key(0), params, x)
        y = model.apply(frozen, lora, x)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, f(params, x), rtol=1e-6)


@pytest.mark.parametrize("scale", [jnp.asarray(0.01), jnp.full((1, 1, 64), 0.01)], ids=["scalar", "row"])
def test_one_scale_for_a_whole_stack(scale):
    """It has no entries of its own along the stack that it scales."""
    codes = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (3, 64, 64)), jnp.int8)
    params = {"codes": codes, "scale": scale, "out": jnp.ones((64, 64))}

    def net(p, x):
        stack = p["codes"].astype(jnp.float32) * p["scale"]
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0] @ p["out"]

    x = jnp.ones((2, 64))
    for target in ("out", "codes"):
        model = lojax.wrap(net, target, rank=2)
        frozen, lora = model.init(jax.random.key(0), params, x)
        np.testing.assert_allclose(jax.jit(model.apply)(frozen, lora, x), net(params, x), rtol=1e-6)
        kept = jax.tree.leaves(jax.eval_shape(lambda v: jax.vjp(lambda v: model.apply(frozen, v, x), v)[1], lora))
        assert not [k for k in kept if k.size == codes.size and k.dtype != jnp.int8]
