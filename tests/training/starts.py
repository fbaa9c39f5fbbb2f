"""Nets, data and comparisons that the tests of starts from data share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def spread(*shape):
    """Rows with a spectrum that falls, as those of real activations do."""
    return array(*shape) * jnp.asarray(2.0 ** -np.arange(shape[-1]), jnp.float32)


def directions(x, r):
    """The ``r`` leading right singular vectors of ``x`` ``[tokens, m]``, and all squared singular values."""
    _, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return vt[:r].T, s**2


def assert_same_space(a, expected, **tolerance):
    """Column by column the same direction, whatever its sign."""
    a, expected = np.asarray(a, np.float64), np.asarray(expected)
    cosines = np.abs((a * expected).sum(0)) / np.linalg.norm(a, axis=0) / np.linalg.norm(expected, axis=0)
    np.testing.assert_allclose(cosines, 1, **tolerance)


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def scanned(params, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])[0]


MLP = {"up": array(12, 16), "down": array(16, 5)}
BATCHES = [spread(20, 12) for _ in range(3)]


def batch_loss(model):
    return lambda frozen, lora, x: jnp.mean((model.apply(frozen, lora, x) - 1.0) ** 2)
