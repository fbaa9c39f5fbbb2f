"""LoRA-GA against NumPy: the singular vectors of the gradient, and the net unchanged by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from tests.helpers import PRODUCTS, equations, message, trained
from tests.training.starts import (
    BATCHES,
    MLP,
    RNG,
    array,
    assert_same_space,
    batch_loss,
    mlp,
    scanned,
)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lora_ga_starts_at_the_singular_vectors_of_the_gradient(variant):
    model = lojax.wrap(mlp, "*", rank=2, alpha=3, variant=variant)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    changed, found = lojax.lora_ga(batch_loss(model), frozen, lora, BATCHES, steps=20)
    gradient = jax.grad(lambda p: sum(jnp.mean((mlp(p, x) - 1.0) ** 2) for x in BATCHES))(MLP)
    for name, g in gradient.items():
        u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
        assert_same_space(found[name].a, u[:, :2], rtol=1e-4)
        assert_same_space(found[name].b.T, vt[2:4].T, rtol=1e-3)
        c = MLP[name].shape[1] ** 0.25 / 4
        np.testing.assert_allclose(np.linalg.norm(found[name].a, axis=0), c, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found[name].b, axis=1), c, rtol=1e-4)
        update = 1.5 * np.asarray(found[name].a) @ np.asarray(found[name].b)
        np.testing.assert_allclose(changed[name], MLP[name] - update, rtol=1e-5, atol=1e-6)
        assert (found[name].variant, found[name].moved_base) == (variant, "lora_ga")
    np.testing.assert_allclose(model.apply(changed, found, BATCHES[0]), mlp(MLP, BATCHES[0]), rtol=1e-4, atol=1e-5)


def test_lora_ga_takes_the_step_of_full_fine_tuning_in_its_directions():
    """What the start is for: after one small step ``W`` moved along the gradient, where ``B = 0`` moves at random."""
    model = lojax.wrap(mlp, "*", rank=2)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    loss, x = batch_loss(model), BATCHES[0]
    gradient = jax.grad(lambda p: jnp.mean((mlp(p, x) - 1.0) ** 2))(MLP)["up"]

    def moved(frozen, lora):
        grads = jax.grad(lambda lora: loss(frozen, lora, x))(lora)
        stepped = jax.tree.map(lambda p, g: p - 1e-2 * g, lora, grads)
        step = model.merge(frozen, stepped)["up"] - MLP["up"]
        return -jnp.vdot(step, gradient) / jnp.linalg.norm(step) / jnp.linalg.norm(gradient)

    changed, found = lojax.lora_ga(loss, frozen, lora, [x])
    assert moved(changed, found) > 0.9 > moved(frozen, lora)


def test_lora_ga_reaches_stacks_embeddings_and_tied_heads():
    params = {"table": array(20, 8), "w": array(2, 8, 8)}
    ids = jnp.asarray(RNG.integers(0, 20, 30))

    def net(params, ids):
        return scanned(params, params["table"][ids]) @ params["table"].T

    model = lojax.wrap(net, "*", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, ids)

    def loss(frozen, lora, ids):
        return jnp.mean(model.apply(frozen, lora, ids)[:, 0] ** 2)

    changed, found = lojax.lora_ga(loss, frozen, lora, [ids], steps=20)
    gradient = jax.grad(lambda p: jnp.mean(net(p, ids)[:, 0] ** 2))(params)
    for i in range(2):
        u = np.linalg.svd(np.asarray(gradient["w"][i], np.float64))[0]
        assert_same_space(found["w"].a[i], u[:, :2], rtol=1e-3)
    u = np.linalg.svd(np.asarray(gradient["table"], np.float64), full_matrices=False)[0]
    assert_same_space(found["table"].a, u[:, :2], rtol=1e-3)
    np.testing.assert_allclose(model.apply(changed, found, ids), net(params, ids), rtol=1e-3, atol=1e-3)


def test_what_was_trained_from_lora_ga_goes_back_to_the_original_weights():
    model = lojax.wrap(mlp, "*", rank=2)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    changed, start = lojax.lora_ga(batch_loss(model), frozen, lora, BATCHES)
    after = trained(start)
    plain = lojax.subtract(after, start)
    np.testing.assert_allclose(
        model.apply(frozen, plain, BATCHES[0]), model.apply(changed, after, BATCHES[0]), rtol=1e-3, atol=1e-4
    )


def test_no_gradient_of_the_weights_size_in_lora_ga():
    """No product in the program of a step is as large as the weight."""
    params, x = {"w": array(96, 64)}, array(4, 96)
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    made = []

    def loss(frozen, lora, x):
        made.append(jax.make_jaxpr(jax.grad(lambda lora: jnp.sum(model.apply(frozen, lora, x))))(lora))
        return jnp.sum(model.apply(frozen, lora, x))

    lojax.lora_ga(loss, frozen, lora, [x])
    sizes = [
        v.aval.size for jaxpr in made for eqn in equations(jaxpr) if eqn.primitive.name in PRODUCTS for v in eqn.outvars
    ]
    assert made and max(sizes) < 96 * 64


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, lo, m: lojax.lora_ga(batch_loss(m), f, lo, iter(())), "no batches"),
        (lambda f, lo, m: lojax.lora_ga(batch_loss(m), f, lo, BATCHES, gamma=0), "gamma=0"),
        (lambda f, lo, m: lojax.lora_ga(lambda f, o, x: 0.0 * jnp.sum(x), f, lo, BATCHES), "gradient that is zero"),
    ],
)
def test_bad_input_is_named(call, message):
    model = lojax.wrap(mlp, "*", rank=2)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    with pytest.raises(ValueError, match=message):
        call(frozen, lora, model)


def test_lora_ga_refuses_ranks_that_two_r_vectors_do_not_fit():
    model = lojax.wrap(mlp, "*", rank=3)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    with pytest.raises(ValueError, match=r"down: lora_ga gives an adapter of one rank up to min\(m, n\) / 2 = 2"):
        lojax.lora_ga(batch_loss(model), frozen, lora, BATCHES)


@pytest.mark.parametrize("init", ["lora_ga"])
def test_as_init_it_says_what_to_call(init):
    with pytest.raises(ValueError, match="needs batches") as error:
        lojax.wrap(mlp, "*", init=init)
    assert "lojax.lora_ga(" in str(error.value)


def test_an_adapter_that_moved_its_weight_cannot_be_started_again():
    model = lojax.wrap(mlp, "*", rank=2, init="pissa")
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    with pytest.raises(ValueError, match="down: init='pissa' took the start of this adapter out of the frozen weight"):
        lojax.lora_ga(batch_loss(model), frozen, lora, BATCHES)


def test_lora_ga_comes_before_quantizing():
    params = {"up": array(64, 64), "down": array(64, 64)}
    xs = [array(20, 64)]
    model = lojax.wrap(mlp, "*", rank=2)
    frozen, lora = model.init(jax.random.key(0), lojax.quantize(params, "nf4"), xs[0])
    text = message(ValueError, lojax.lora_ga, batch_loss(model), frozen, lora, xs)
    assert "down: is quantized (Quantized((64, 64), nf4" in text
    assert "lojax.quantize(frozen, 'nf4', targets)" in text

    def error(frozen, lora):
        merged = lojax.merge(frozen, lora)
        return max(float(jnp.linalg.norm(merged[n] - params[n]) / jnp.linalg.norm(params[n])) for n in params)

    # What the error says to do: the start and the rounding, once.
    frozen, start = lojax.lora_ga(batch_loss(model), *model.init(jax.random.key(0), params, xs[0]), xs)
    assert error(frozen, start) < 1e-5
    assert 0 < error(lojax.quantize(frozen, "nf4"), start) < 0.11


def test_lora_ga_and_codes():
    net = lambda p, x: x @ (p["codes"].astype(jnp.float32) * p["scale"])
    params = {"codes": jnp.ones((8, 8), jnp.int8), "scale": jnp.ones(8)}
    model = lojax.wrap(net, "codes", rank=2)
    frozen, lora = model.init(jax.random.key(0), params, array(3, 8))
    loss = lambda frozen, lora, x: jnp.mean(model.apply(frozen, lora, x))
    text = message(ValueError, lojax.lora_ga, loss, frozen, lora, [array(3, 8)])
    assert "codes: holds codes (int8[8,8]), and lora_ga takes the start" in text
