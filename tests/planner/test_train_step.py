"""The step that a plan compiles."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from lojax.planner.train_step import value_then_grad


def grouped_loss(w):
    """A loss that is computed again for its gradient, as the decoder's is."""

    @jax.checkpoint
    def group(total, x):
        return total + jnp.sin(x @ w).sum(), None

    return jax.lax.scan(group, jnp.zeros(()), jnp.arange(24.0).reshape(4, 2, 3))[0]


def test_value_and_gradient_are_those_of_jax():
    w = jax.random.normal(jax.random.key(0), (3, 5))
    got, want = jax.jit(value_then_grad, static_argnums=0)(grouped_loss, w), jax.value_and_grad(grouped_loss)(w)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_the_backward_pass_waits_for_the_value():
    eqns = jax.make_jaxpr(lambda w: value_then_grad(grouped_loss, w))(jnp.ones((3, 5))).jaxpr.eqns
    forward, backward = (i for i, eqn in enumerate(eqns) if eqn.primitive.name == "scan")
    (barrier,) = (eqn for eqn in eqns if eqn.primitive.name == "optimization_barrier")
    assert barrier.invars[0] in eqns[forward].outvars, "it takes the value"
    waiting = {barrier.outvars[1]}
    for eqn in eqns[eqns.index(barrier) + 1 : backward + 1]:
        if waiting & {v for v in eqn.invars if not isinstance(v, Literal)}:
            waiting |= set(eqn.outvars)
    assert waiting & set(eqns[backward].outvars), "the backward loop starts from what it gives"
