"""Floating-point operations of traced programs."""

import jax
import jax.numpy as jnp

import lojax
from lojax.planner.flops import count_flops


def test_flops_of_loops_and_recomputation():
    w = jnp.ones((4, 4))

    def f(x):
        return jax.lax.scan(lambda c, _: (jax.checkpoint(lambda y: jnp.sin(y @ w))(c), None), x, length=6)[0].sum()

    one = 2 * 2 * 4 * 4
    assert count_flops(f, jnp.ones((2, 4))) == 6 * one
    assert count_flops(jax.grad(f), jnp.ones((2, 4))) == 6 * 3 * one  # forward, again, and backward
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID")
    assert count_flops(conv, jnp.ones((1, 3, 8, 8)), jnp.ones((5, 3, 3, 3))) == 2 * 5 * 36 * 27
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2, execution="factored")
    frozen, lora = model.init(jax.random.key(0), {"w": jnp.ones((8, 6))})
    step = jax.grad(lambda lora, x: jnp.sum(jnp.sin(model.apply(frozen, lora, x))), (0, 1))
    assert count_flops(step, lora, jnp.ones((32, 8))) == 32 * (4 * 8 * 6 + 6 * 2 * (8 + 6))
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
    assert count_flops(branch, jnp.ones((2, 4))) == 2 * one
