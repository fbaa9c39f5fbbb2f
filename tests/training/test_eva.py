"""EVA against NumPy: its directions and ranks, and the net unchanged by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lojax
from tests.helpers import trained
from tests.rewrite.foreign_formats import FORMATS, IN
from tests.training.starts import (
    BATCHES,
    MLP,
    array,
    assert_same_space,
    directions,
    mlp,
    scanned,
    spread,
)


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


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, []), "no batches"),
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, BATCHES, rho=0.5), "rho=0.5"),
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, BATCHES, steps=0), "steps=0"),
        (lambda f, lo, m: lojax.eva(lambda f, o, x: jnp.zeros(3), f, lo, BATCHES), "saw no finite input"),
        (lambda f, lo, m: lojax.eva(m.apply, f, lo, [BATCHES[0] * jnp.nan]), "saw no finite input"),
    ],
)
def test_bad_input_is_named(call, message):
    model = lojax.wrap(mlp, "*", rank=2)
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    with pytest.raises(ValueError, match=message):
        call(frozen, lora, model)


@pytest.mark.parametrize("init", ["eva", "EVA"])
def test_as_init_it_says_what_to_call(init):
    with pytest.raises(ValueError, match="needs batches") as error:
        lojax.wrap(mlp, "*", init=init)
    assert "lojax.eva(" in str(error.value)


def test_an_adapter_that_moved_its_weight_cannot_be_started_again():
    model = lojax.wrap(mlp, "*", rank=2, init="pissa")
    frozen, lora = model.init(jax.random.key(0), MLP, BATCHES[0])
    with pytest.raises(ValueError, match="down: init='pissa' took the start of this adapter out of the frozen weight"):
        lojax.eva(model.apply, frozen, lora, BATCHES)


def test_eva_on_a_quantized_base_is_eva_on_its_dequantized_weights():
    params = {"up": array(12, 16), "down": array(16, 5)}
    base = lojax.quantize(params, "nf4")
    model = lojax.wrap(mlp, "*", rank=2)
    frozen, lora = model.init(jax.random.key(0), base, BATCHES[0])
    found = lojax.eva(model.apply, frozen, lora, BATCHES, steps=20)
    plain = {name: weight.dense() for name, weight in base.items()}
    expected = lojax.eva(model.apply, *model.init(jax.random.key(0), plain, BATCHES[0]), BATCHES, steps=20)
    for name in params:
        assert_same_space(found[name].a, expected[name].a, rtol=1e-4)
    np.testing.assert_array_equal(model.apply(frozen, found, BATCHES[0]), model.apply(frozen, lora, BATCHES[0]))


@pytest.mark.parametrize("name", ["keras int4", "keras int4 by channel", "qwix tiles"])
def test_eva_on_codes_that_the_net_dequantizes(name):
    foreign, batches = FORMATS[name], [spread(20, IN) for _ in range(3)]
    model = lojax.wrap(foreign.f, "codes", rank=2)
    frozen, lora = model.init(jax.random.key(0), foreign.params, batches[0])
    found = lojax.eva(model.apply, frozen, lora, batches, steps=20)
    assert found["codes"].weight_shape == foreign.weight.shape
    assert_same_space(found["codes"].a, directions(np.concatenate(batches), 2)[0], rtol=1e-4)
