"""`lojax.quantize`: which weights, and every part of lojax on a quantized base."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import message, trained
from jax import lax

import lojax
from lojax.quantized.formats import KINDS
from lojax.quantized.quantized import Quantized

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 64)), jnp.float32)
TOKENS = jnp.asarray([3, 0, 70, 3], jnp.int32)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 8, jnp.float32)


def dense(p, x):
    return jnp.tanh(x @ p["k"] + p["bias"]) @ p["other"]


def scanned(p, x):
    return lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, p["stack"])[0] @ p["other"]


def by_index(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["stack"][i]), x)


def embedding(p, i):
    return p["table"][i] @ p["other"]


def tied(p, i):
    return jnp.tanh(jnp.take(p["table"], i, axis=0)) @ p["table"].T


def convolution(p, x):
    image = x.reshape(1, 8, 8, 6)
    return lax.conv_general_dilated(image, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def experts(p, x):
    return lax.ragged_dot(x, p["stack"], jnp.array([2, 1, 3], jnp.int32))


def heads(p, x):
    return jnp.einsum("td,dhk->thk", x, p["heads"])


PARAMS = {
    "k": normal(64, 64),
    "bias": normal(64),
    "other": normal(64, 64),
    "stack": normal(3, 64, 64),
    "table": normal(96, 64),
    "kernel": normal(3, 3, 6, 64),
    "heads": normal(64, 4, 16),
}
NOT_FINITE = "entries of the weight are not finite"
ONE_NAN = jnp.ones((2, 64)).at[1, 3].set(jnp.nan)
NETS = {
    "dense": (dense, "k", X),
    "scan": (scanned, "stack", X),
    "index": (by_index, "stack", X),
    "embedding": (embedding, "table", TOKENS),
    "tied": (tied, "table", TOKENS),
    "convolution": (convolution, "kernel", X),
    "experts": (experts, "stack", X),
    "heads": (heads, "heads", X),
    "remat": (lambda p, x: jax.checkpoint(scanned)(p, x), "stack", X),
    "vmap": (lambda p, x: jax.vmap(lambda x: dense(p, x))(x), "k", X),
    "cond": (lambda p, x: lax.cond(x.sum() > 0, dense, lambda p, x: dense(p, 2 * x), p, x), "k", X),
}


def loss(y):
    return jnp.sum(jnp.sin(y) ** 2)


@functools.cache
def quantized(kind):
    """`PARAMS` in a kind, and again as plain arrays."""
    base = lojax.quantize(PARAMS, kind)
    is_quantized = lambda w: isinstance(w, Quantized)
    dense = lambda w: w.dense() if is_quantized(w) else w
    return base, jax.jit(lambda base: jax.tree.map(dense, base, is_leaf=is_quantized))(base)


@pytest.mark.parametrize(
    ("net", "kind"),
    [
        pytest.param(
            net, kind, marks=[pytest.mark.slow] * (kind in ("int4", "float8_e4m3fn") and net not in ("scan", "tied"))
        )
        for net in NETS
        for kind in KINDS
    ],
)
def test_values_and_gradients_are_those_of_the_dequantized_net(net, kind):
    f, target, x = NETS[net]
    base, plain = quantized(kind)
    assert isinstance(base[target], Quantized)
    model = lojax.wrap(f, target, rank=2)
    frozen, lora = model.init(jax.random.key(0), base, x)
    assert isinstance(frozen[target], Quantized)
    np.testing.assert_allclose(jax.jit(model.apply)(frozen, lora, x), jax.jit(f)(plain, x), rtol=1e-5, atol=1e-5)
    lora = trained(lora)

    def oracle(lora, x):
        return loss(f(lojax.merge(plain, lora), x))

    def adapted(lora, x):
        return loss(model.apply(frozen, lora, x))

    which = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
    expected, actual = (jax.jit(jax.value_and_grad(g, which))(lora, x) for g in (oracle, adapted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), actual, expected)
    report = model.report(frozen, lora, x)
    assert {use.how for weight in report.weights for use in weight.uses} <= {"factored", "fused"}


@pytest.mark.parametrize("variant", ["lora", "dora", "lora-fa"])
def test_every_variant_on_a_quantized_base(variant):
    base = lojax.quantize(PARAMS, "nf4")
    model = lojax.wrap(dense, "k", rank=2, variant=variant)
    frozen, lora = model.init(jax.random.key(0), base, X)
    np.testing.assert_allclose(model.apply(frozen, lora, X), dense(lojax.merge(frozen, lora), X), rtol=1e-4, atol=1e-5)
    lora = trained(lora)
    np.testing.assert_allclose(model.apply(frozen, lora, X), dense(lojax.merge(frozen, lora), X), rtol=1e-4, atol=1e-4)


def test_a_start_out_of_the_weight_is_refused_with_the_way_out():
    model = lojax.wrap(dense, "k", rank=2, init="pissa")
    text = message(ValueError, model.init, jax.random.key(0), lojax.quantize(PARAMS), X)
    assert "k: init='pissa' takes its start out of the weight" in text
    assert "before lojax.quantize" in text
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)  # QPiSSA: the residual is quantized
    frozen = lojax.quantize(frozen, "nf4")
    error = jnp.linalg.norm(lojax.merge(frozen, lora)["k"] - PARAMS["k"])
    plain = jnp.linalg.norm(lojax.quantize(PARAMS)["k"].dense() - PARAMS["k"])
    assert error < plain, "PiSSA leaves a smaller residual to quantize"


def test_merge_gives_plain_arrays():
    base = lojax.quantize(PARAMS, "int8")
    frozen, lora = lojax.init(jax.random.key(0), base, "k", rank=2)
    merged = lojax.merge(frozen, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(merged["other"], base["other"].dense())
    donated = lojax.merge(frozen, lora, donate=True, check_finite=True)
    np.testing.assert_array_equal(donated["k"], merged["k"])


def test_training_saving_and_restoring(tmp_path):
    base = lojax.quantize(PARAMS, "nf4")
    model = lojax.wrap(dense, ["k", "other"], rank=4)
    frozen, lora = model.init(jax.random.key(0), base, X)
    tx = lojax.optimizer(optax.sgd(0.3))
    state = tx.init(lora)

    @jax.jit
    def step(frozen, lora, state):
        value, grads = jax.value_and_grad(lambda v: jnp.mean((model.apply(frozen, v, X) - 1) ** 2))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    losses = []
    for _ in range(60):
        lora, state, value = step(frozen, lora, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    lojax.save(tmp_path / "adapter", lora, frozen=frozen)
    restored = lojax.restore(tmp_path / "adapter", frozen=frozen)
    np.testing.assert_array_equal(model.apply(frozen, restored, X), model.apply(frozen, lora, X))
    for other in (PARAMS, lojax.quantize(PARAMS, "int8"), lojax.quantize(jax.tree.map(lambda w: 2 * w, PARAMS), "nf4")):
        text = message(ValueError, lojax.restore, tmp_path / "adapter", frozen=other)
        assert text.startswith(("k: ", "bias: ", "heads: ", "kernel: "))
    lojax.restore(tmp_path / "adapter", frozen=PARAMS, check_base=False)
    assert str(lojax.summary(frozen, lora)) == str(lojax.summary(PARAMS, lora))


def test_under_jit_and_on_shapes():
    eager, jitted = lojax.quantize(PARAMS, "nf4"), jax.jit(lambda p: lojax.quantize(p, "nf4"))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    shapes = jax.eval_shape(lambda p: lojax.quantize(p, "nf4"), PARAMS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), eager)
    model = lojax.wrap(dense, "k", rank=2)
    frozen, lora = jax.eval_shape(model.init, jax.random.key(0), shapes, X)
    assert jax.eval_shape(model.apply, frozen, lora, X).shape == (6, 64)


def test_flax_nets_take_a_quantized_base():
    net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64)])
    variables = net.init(jax.random.key(0), X)
    model = lojax.wrap(net, "**/kernel", rank=2)
    base = lojax.quantize(variables, "nf4")
    frozen, lora = model.init(jax.random.key(0), base, X)
    np.testing.assert_allclose(
        model.apply(frozen, lora, X), net.apply(lojax.merge(frozen, lora), X), rtol=1e-5, atol=1e-5
    )
    linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    model = lojax.wrap(linear, "kernel", rank=2)
    frozen, lora = model.init(jax.random.key(0), lojax.quantize(model.params, "int8"), X)
    np.testing.assert_allclose(
        model.apply(frozen, lora, X), model.bind(lojax.merge(frozen, lora))(X), rtol=1e-5, atol=1e-5
    )


def test_which_weights_are_quantized():
    everything = lojax.quantize(PARAMS)
    assert {path for path, leaf in everything.items() if not isinstance(leaf, Quantized)} == {"bias"}
    stacked = {"dense": {"kernel": normal(2, 64, 64), "bias": normal(2, 64)}, "LayerNorm_0": {"scale": normal(2, 64)}}
    quantized = lojax.quantize(stacked)
    assert isinstance(quantized["dense"]["kernel"], Quantized)
    assert quantized["dense"]["bias"] is stacked["dense"]["bias"]
    assert quantized["LayerNorm_0"]["scale"] is stacked["LayerNorm_0"]["scale"]
    some = lojax.quantize(PARAMS, "int8", ["k", "st*"])
    assert {path for path, leaf in some.items() if isinstance(leaf, Quantized)} == {"k", "stack"}
    assert some["other"] is PARAMS["other"]
    more = lojax.quantize(some, "nf4")  # what is left
    assert (more["k"].kind, more["other"].kind) == ("int8", "nf4")


@pytest.mark.parametrize(
    ("call", "kind", "pieces"),
    [
        (lambda: lojax.quantize(PARAMS, "nf5"), ValueError, ("kind='nf5' is unknown", "Did you mean 'nf4'?")),
        (lambda: lojax.quantize(PARAMS, block=7), ValueError, ("block=7", "positive even number")),
        (lambda: lojax.quantize(PARAMS, targets="nowhere"), ValueError, ("nowhere", "nearest paths")),
        (lambda: lojax.quantize(lojax.quantize(PARAMS), targets="k"), ValueError, ("k: is quantized already",)),
        (lambda: lojax.quantize({"i": jnp.ones(4, int)}, targets="i"), TypeError, ("i: holds int32[4]", "floating")),
        (
            lambda: lojax.quantize({"w": jnp.full((2, 64), jnp.nan)}),
            ValueError,
            ("w: ", NOT_FINITE),
        ),
        (
            lambda: lojax.quantize({"w": jnp.full((2, 64), jnp.inf)}, "int8"),
            ValueError,
            ("w: ", NOT_FINITE),
        ),
        *(
            (
                lambda k=k: lojax.quantize({"w": ONE_NAN}, k),
                ValueError,
                ("w: 1 of the 128 ", NOT_FINITE, "Load it again."),
            )
            for k in KINDS
        ),
    ],
)
def test_bad_input(call, kind, pieces):
    text = message(kind, call)
    for piece in pieces:
        assert piece in text
