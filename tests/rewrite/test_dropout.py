"""Dropout on the adapter's input: explicit key, deterministic without one, distinct everywhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import lojax
from tests.rewrite.programs import normal

WIDE = jnp.ones((64, 32))


def dropped(f, shapes, x, rate=0.5):
    """An adapted net whose frozen part is zero: what it returns is the update alone."""
    model = lojax.wrap(f, "**", rank=2, dropout=rate)
    frozen, lora = model.init(jax.random.key(0), {k: jnp.zeros(s) for k, s in shapes.items()}, x)
    return model, frozen, jax.tree.map(jnp.ones_like, lora)


def test_without_a_key_nothing_is_dropped() -> None:
    model, frozen, lora = dropped(lambda p, x: x @ p["w"], {"w": (32, 4)}, WIDE)
    np.testing.assert_array_equal(model.apply(frozen, lora, WIDE), 64.0)


def test_the_rate_and_the_inverted_scale() -> None:
    model, frozen, lora = dropped(lambda p, x: x @ p["w"], {"w": (32, 4)}, jnp.ones((4096, 32)), rate=0.25)
    y = model.apply(frozen, lora, jnp.ones((4096, 32)), dropout_key=jax.random.key(1))
    kept = np.asarray(y)[:, 0] * 0.75 / 2  # how many of 32 inputs were kept in each row
    assert abs(kept.mean() - 24) < 0.2 and abs(kept.var() - 32 * 0.25 * 0.75) < 0.6


def test_the_same_key_drops_the_same_and_another_does_not() -> None:
    model, frozen, lora = dropped(lambda p, x: x @ p["w"], {"w": (32, 4)}, WIDE)
    one, again, other = (model.apply(frozen, lora, WIDE, dropout_key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


PLACES = {
    "weights": (lambda p, x: (x @ p["v"], x @ p["w"]), {"v": (32, 4), "w": (32, 4)}),
    "uses": (lambda p, x: (x @ p["w"], x @ p["w"]), {"w": (32, 4)}),
    "calls": (lambda p, x: tuple(jax.jit(lambda w, x: x @ w)(p["w"], x) for _ in range(2)), {"w": (32, 4)}),
    "layers": (lambda p, x: tuple(lax.map(lambda w: x @ w, p["w"])), {"w": (2, 32, 4)}),
    "trips": (lambda p, x: tuple(lax.map(lambda t: (x + 0 * t) @ p["w"], jnp.arange(2.0))), {"w": (32, 4)}),
    "slices": (lambda p, x: tuple(x @ w for w in jnp.split(p["w"], 2, 1)), {"w": (32, 8)}),
    "while": (
        lambda p, x: tuple(lax.fori_loop(0, 2, lambda i, y: y.at[i].set(x @ p["w"]), jnp.zeros((2, 64, 4)))),
        {"w": (32, 4)},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_masks_are_distinct_for_different(place: str) -> None:
    model, frozen, lora = dropped(*PLACES[place], WIDE)
    first, second = jax.jit(model.apply)(frozen, lora, WIDE, dropout_key=jax.random.key(1))
    assert (np.asarray(first) != np.asarray(second)).mean() > 0.5


def test_masks_are_distinct_for_different_shards() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")

    def f(p, x):
        return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, p["w"])

    model, frozen, lora = dropped(f, {"w": (32, 4)}, WIDE)
    y = jax.jit(model.apply)(frozen, lora, WIDE, dropout_key=jax.random.key(1))
    assert (np.asarray(y[:32]) != np.asarray(y[32:])).mean() > 0.5


def test_gradients_see_the_same_mask() -> None:
    model, frozen, lora = dropped(lambda p, x: x @ p["w"], {"w": (8, 4)}, normal(5, 8))
    x, key = normal(5, 8), jax.random.key(3)
    loss = lambda v: model.apply(frozen, v, x, dropout_key=key).sum()
    grads = jax.grad(loss)(lora)
    bumped = jax.tree.map(lambda v, g: v + 1e-2 * g, lora, grads)
    rise = float(loss(bumped) - loss(lora))
    norm = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads))
    cross = float(model.apply(frozen, jax.tree.map(lambda g: 1e-2 * g, grads), x, dropout_key=key).sum())
    np.testing.assert_allclose(rise, 1e-2 * norm + cross, rtol=1e-3)
