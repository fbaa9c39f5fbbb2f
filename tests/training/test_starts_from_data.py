"""Starts from data against NumPy: EVA's directions and ranks, LoRA-GA's gradient, and the net unchanged by either."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lojax
from tests.helpers import PRODUCTS, equations, trained

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


MLP = {"up": array(12, 16), "down": array(16, 5)}
BATCHES = [spread(20, 12) for _ in range(3)]


def test_eva_takes_the_leading_directions_of_each_input():
    model = lojax.wrap(mlp, "*", rank=3)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    found = lojax.eva(model.apply, frozen, lora, BATCHES, steps=8)
    x = np.concatenate(BATCHES)
    assert_same_space(found["up"].a, directions(x, 3)[0], rtol=1e-4)
    assert_same_space(found["down"].a, directions(np.tanh(x @ np.asarray(MLP["up"])), 3)[0], rtol=1e-3)
    np.testing.assert_allclose(found["up"].a.T @ found["up"].a, np.eye(3), atol=1e-5)
    np.testing.assert_array_equal(model.apply(frozen, found, x), mlp(MLP, x))
    assert found["up"].scale == lora["up"].scale


def scanned(params, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])[0]


def test_eva_tells_the_layers_of_a_scan_apart():
    params, x = {"w": array(3, 8, 8)}, spread(40, 8)
    model = lojax.wrap(scanned, "w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    found = lojax.eva(model.apply, frozen, lora, [x[:20], x[20:]], steps=30)
    for layer in range(3):
        assert_same_space(found["w"].a[layer], directions(x, 2)[0], rtol=1e-3)
        x = np.tanh(x @ np.asarray(params["w"][layer]))


def test_eva_of_a_convolution_takes_patches():
    params, x = {"k": array(3, 4, 5)}, spread(6, 10, 4)

    def conv(params, x):
        return lax.conv_general_dilated(x, params["k"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    model = lojax.wrap(conv, "k", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    found = lojax.eva(model.apply, frozen, lora, [x], steps=20)
    patches = np.stack([np.asarray(x)[:, i : i + 3].reshape(6, 12) for i in range(8)]).reshape(-1, 12)
    assert_same_space(found["k"].a.reshape(12, 2), directions(patches, 2)[0], rtol=1e-3)


def test_eva_sees_experts_heads_and_boxes():
    sizes = jnp.array([12, 0, 8])
    params = {"experts": array(3, 6, 7), "heads": array(7, 2, 3)}

    def net(params, x):
        y = lax.ragged_dot(x, params["experts"], sizes)
        return jnp.einsum("td,dhk->thk", y, params["heads"])

    x = spread(20, 6)
    model = lojax.wrap(net, "heads", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    found = lojax.eva(model.apply, frozen, lora, [x], steps=20)
    y = np.asarray(lax.ragged_dot(x, params["experts"], sizes))
    assert found["heads"].a.shape == (7, 2)
    assert_same_space(found["heads"].a, directions(y, 2)[0], rtol=1e-3)
    model = lojax.wrap(net, "experts", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    with pytest.raises(ValueError, match="experts: eva saw no finite input"):  # expert 1 met no token
        lojax.eva(model.apply, frozen, lora, [x])


def test_eva_deals_ranks_to_the_inputs_that_few_directions_explain():
    """Shares of all the variance, that outside of the columns included; the budget goes to the largest ones."""
    params = {"flat": array(40, 4), "steep": array(40, 4)}
    x = {"flat": array(2000, 40), "steep": spread(2000, 40)}
    model = lojax.wrap(lambda p, x: x["flat"] @ p["flat"] + x["steep"] @ p["steep"], "*", rank=2)
    frozen, lora = model.init(jax.random.key(0), params, x)
    found = lojax.eva(model.apply, frozen, lora, [x], rho=1.5, steps=20)
    shares = {name: directions(v, 1)[1] / directions(v, 1)[1].sum() for name, v in x.items()}
    best = sorted(((s, name) for name, values in shares.items() for s in values[:3]), reverse=True)[:4]
    expected = {name: sum(n == name for _, n in best) for name in x}
    assert {name: found[name].rank for name in x} == expected == {"flat": 1, "steep": 3}
    assert found["flat"].scale == lora["flat"].scale


def test_eva_redistributes_within_a_stack_and_freezes_what_gets_nothing():
    params, steep, flat = {"w": array(3, 8, 8), "v": array(8, 8)}, spread(400, 8), array(400, 8)

    def net(params, x):
        inputs = jnp.stack([x["steep"], x["flat"], x["steep"]])
        return jnp.einsum("sti,sio->sto", inputs, params["w"]).sum(0) + x["flat"] @ params["v"]

    x = {"steep": steep, "flat": flat}
    model = lojax.wrap(net, "*", rank=1)
    frozen, lora = model.init(jax.random.key(0), params, x)
    found = lojax.eva(model.apply, frozen, lora, [x], rho=2, steps=20)
    assert found["v"] is None
    assert found["w"].ranks == (2, 0, 2) and found["w"].a.shape == (3, 8, 2)
    assert not found["w"].a[1].any()
    np.testing.assert_array_equal(model.apply(frozen, found, x), net(params, x))
    moved = trained(found)
    np.testing.assert_allclose(model.apply(frozen, moved, x), net(model.merge(frozen, moved), x), rtol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "dora", "lora-fa"])
def test_eva_keeps_the_variant(variant):
    model = lojax.wrap(mlp, "*", rank=2, variant=variant)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    found = lojax.eva(model.apply, frozen, lora, BATCHES)
    assert found["up"].variant == variant
    np.testing.assert_allclose(model.apply(frozen, found, BATCHES[0]), mlp(MLP, BATCHES[0]), rtol=1e-5, atol=1e-5)


def batch_loss(model):
    return lambda frozen, lora, x: jnp.mean((model.apply(frozen, lora, x) - 1.0) ** 2)


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
        assert found[name].variant == variant
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
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, []), "no batches"),
        (lambda f, lo, m: lojax.lora_ga(batch_loss(m), f, lo, iter(())), "no batches"),
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, BATCHES, rho=0.5), "rho=0.5"),
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, BATCHES, steps=0), "steps=0"),
        (lambda f, lo, m: lojax.lora_ga(batch_loss(m), f, lo, BATCHES, gamma=0), "gamma=0"),
        (lambda f, lo, m: lojax.eva(lambda f, o, x: jnp.zeros(3), f, lo, BATCHES), "saw no finite input"),
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, [BATCHES[0] * jnp.nan]), "saw no finite input"),
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


@pytest.mark.parametrize("init, call", [("eva", "lojax.eva("), ("EVA", "lojax.eva("), ("lora_ga", "lojax.lora_ga(")])
def test_a_start_from_data_by_name_says_what_to_call(init, call):
    with pytest.raises(ValueError, match="needs batches") as error:
        lojax.wrap(mlp, "*", init=init)
    assert call in str(error.value)
