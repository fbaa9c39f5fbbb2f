"""``base=``: `init` takes float parameters and quantizes the adapted weights, after the start took its part out.

LoftQ is compared with algorithm 1 of its paper in NumPy.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_same_bits, message, trained
from jax import lax

import lojax
from lojax import Rule
from lojax.quantized.formats import KINDS
from lojax.quantized.quantized import Quantized, is_quantized

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 64)), jnp.float32)
PARAMS = {
    "k": jnp.asarray(RNG.normal(size=(64, 48)) / 8, jnp.float32),
    "bias": jnp.asarray(RNG.normal(size=48), jnp.float32),
    "other": jnp.asarray(RNG.normal(size=(48, 64)) / 8, jnp.float32),
    "stack": jnp.asarray(RNG.normal(size=(3, 64, 64)) / 8, jnp.float32),
}
KEY = jax.random.key(0)


def net(p, x):
    return lax.scan(lambda x, k: (jnp.tanh(x @ k), None), jnp.tanh(x @ p["k"] + p["bias"]) @ p["other"], p["stack"])[0]


def norm(x):
    return float(jnp.linalg.norm(x.reshape(-1)))


def loftq_in_numpy(w, rank, scale, steps, kind):
    """Algorithm 1, in float64 but for the quantizer, for ``[S, m, n]``: the quantized weight and the update."""
    update = np.zeros(w.shape)
    for _ in range(steps):
        remainder = jnp.asarray(np.asarray(w, np.float64) - update, jnp.float32)
        quantized = np.asarray(lojax.quantize({"w": remainder}, kind, "w")["w"].dense(), np.float64)
        for i, left in enumerate(np.asarray(w, np.float64) - quantized):
            u, s, vt = np.linalg.svd(left)
            update[i] = u[:, :rank] * s[:rank] @ vt[:rank]
    return quantized, update / scale


@pytest.mark.parametrize(
    "kind", [kind if kind in ("nf4", "int8") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_loftq_is_the_algorithm_of_the_paper_for_each_matrix_of_a_stack(kind):
    w, axes = PARAMS["stack"], ("stack", "in", "out")
    rule = Rule("stack", rank=4, alpha=8, base=kind, init="loftq_niter_3", axes=axes)
    frozen, lora = lojax.init(KEY, PARAMS, rule)
    adapter = lora["stack"]
    quantized, update = loftq_in_numpy(w, 4, adapter.scale, 3, kind)
    assert (adapter.scale, adapter.moved_base, frozen["stack"].kind) == (2.0, "loftq_niter_3", kind)
    # An entry on the border of two codes may fall on either side, and moves all that follows a little.
    np.testing.assert_allclose(
        np.asarray(adapter.a) @ np.asarray(adapter.b), update, rtol=0, atol=0.02 * norm(update) / 64
    )
    close = np.isclose(frozen["stack"].dense(), quantized, rtol=1e-3, atol=1e-5)
    assert close.mean() > 0.98


@pytest.mark.optimized
@pytest.mark.parametrize("width", [128, pytest.param(512, marks=pytest.mark.slow)])  # 15 decompositions of 512²: 40 s
def test_loftq_of_a_gaussian_falls_over_five_steps_below_quantization_alone(width):
    w = jax.random.normal(jax.random.key(3), (width, width))
    errors = [norm(lojax.quantize({"w": w})["w"].dense() - w) / norm(w)]
    for init in ("loftq_niter_1", "loftq_niter_2", "loftq_niter_3", "loftq_niter_4", "loftq"):  # five by default
        frozen, lora = lojax.init(KEY, {"w": w}, "w", rank=16, base="nf4", init=init)
        assert is_quantized(frozen["w"])
        errors.append(norm(lojax.merge(frozen, lora)["w"] - w) / norm(w))
    assert (np.diff(errors) < 0).all(), errors
    if width == 512:
        assert (errors[0], errors[1], errors[5]) == pytest.approx((0.0921, 0.0868, 0.0788), abs=3e-4)


def test_one_step_of_loftq_quantizes_the_weight_itself():
    frozen, _ = lojax.init(KEY, PARAMS, "k", rank=4, base="nf4", init="loftq_niter_1")
    assert_same_bits(frozen["k"], lojax.quantize(PARAMS, "nf4", "k")["k"])


@pytest.mark.parametrize(
    ("init", "kind"), [*(("kaiming", kind) for kind in KINDS), ("gaussian", "nf4"), ("orthogonal", "nf4")]
)
def test_other_starts_quantize_the_weight_itself_and_only_adapted_ones(init, kind):
    frozen, lora = lojax.init(KEY, PARAMS, ["k", "stack"], rank=4, base=kind, init=init)
    assert_same_bits(frozen, lojax.quantize(PARAMS, kind, ["k", "stack"]))
    assert lora["k"].moved_base is lora["stack"].moved_base is None


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "milora", "olora"])
def test_a_start_out_of_the_weight_quantizes_what_is_left(init):
    frozen, lora = lojax.init(KEY, PARAMS, "k", rank=8, base="nf4", init=init)
    residual, same = lojax.init(KEY, PARAMS, "k", rank=8, init=init)
    assert_same_bits(lora, same)
    assert lora["k"].moved_base == init
    assert_same_bits(frozen, lojax.quantize(residual, "nf4", "k"))
    if init == "pissa":  # QPiSSA: the largest directions are not quantized
        plain = norm(lojax.quantize(PARAMS)["k"].dense() - PARAMS["k"])
        assert norm(lojax.merge(frozen, lora)["k"] - PARAMS["k"]) < plain


@pytest.mark.parametrize(
    ("variant", "init"),
    [
        *(("lora", init) for init in ("kaiming", "orthogonal", "pissa", "loftq")),
        *(("dora", init) for init in ("kaiming", "orthogonal", "loftq")),
        ("lora-fa", "loftq"),
    ],
)
def test_the_net_starts_at_the_quantized_weight_plus_the_update(init, variant):
    model = lojax.wrap(net, ["k", "stack"], rank=4, alpha=8, variant=variant, init=init, base="nf4")
    frozen, lora = model.init(KEY, PARAMS, X)

    @jax.jit
    def by_hand(frozen, lora):
        sums = {p: frozen[p].dense() + lora[p].scale * jnp.asarray(lora[p].a) @ jnp.asarray(lora[p].b) for p in frozen}
        return net({**PARAMS, **sums}, X)

    expected = by_hand({path: frozen[path] for path in ("k", "stack")}, lora)
    np.testing.assert_allclose(jax.jit(model.apply)(frozen, lora, X), expected, rtol=1e-4, atol=1e-5)
    assert {path for path, leaf in frozen.items() if isinstance(leaf, Quantized)} == {"k", "stack"}


@pytest.mark.parametrize("init", ["kaiming", "pissa", "loftq"])
def test_under_jit_and_on_shapes(init):
    model = lojax.wrap(net, ["k", "stack"], rank=4, init=init, base="nf4")
    eager = model.init(KEY, PARAMS, X)
    jitted = jax.jit(model.init)(KEY, PARAMS, X)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for path in ("k", "stack"):
        one, two = (lojax.merge(*pair)[path] for pair in (eager, jitted))
        error = norm(one - PARAMS[path])
        # Another order of rounding moves entries on the border of two codes, and so a little of the error.
        assert norm(two - PARAMS[path]) == pytest.approx(error, rel=0.01)
        assert norm(one - two) < 0.2 * error
    shapes = jax.eval_shape(model.init, KEY, PARAMS, X)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)
    specs = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert specs(shapes) == specs(eager)
    assert "nf4" in str(eager[0]["k"]) and "k " in str(model.preview(PARAMS, X))


def test_loftq_in_bfloat16_makes_up_for_the_values_that_the_net_computes_with():
    params = {"k": PARAMS["k"].astype(jnp.bfloat16)}
    frozen, lora = lojax.init(KEY, params, "k", rank=4, base="nf4", init="loftq", dtype=jnp.bfloat16)
    adapter = lora["k"]
    assert (frozen["k"].dtype, adapter.a.dtype, adapter.b.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
    wide = [np.asarray(x, np.float64) for x in (params["k"], frozen["k"].dense(), adapter.a, adapter.b)]
    error = np.linalg.norm(wide[0] - wide[1] - wide[2] @ wide[3])
    assert error < norm(lojax.quantize(params)["k"].dense().astype(jnp.float32) - params["k"].astype(jnp.float32))


def test_a_rule_may_have_a_base_of_its_own():
    frozen, _ = lojax.init(KEY, PARAMS, [Rule("k", base="int8", init="loftq"), "other"], rank=4, base="nf4")
    assert (frozen["k"].kind, frozen["other"].kind, type(frozen["stack"])) == ("int8", "nf4", type(PARAMS["stack"]))
    frozen, lora = lojax.init(KEY, PARAMS, ["k", Rule("stack", train="full")], rank=4, base="nf4")
    assert frozen["stack"] is None and not is_quantized(lora["stack"]), "what trains is not quantized"
    frozen, lora = lojax.init(KEY, PARAMS, Rule("k", train="tokens", tokens=[3, 5]), base="nf4")
    assert is_quantized(frozen["k"]) and lora["k"].variant == "tokens"


def test_boxes_of_flax_stay():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(64, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "model")))(x)

    variables = Net().init(KEY, X)
    model = lojax.wrap(Net(), "**/kernel", rank=2, base="nf4", init="loftq")
    frozen, lora = model.init(KEY, variables, X)
    kernel = frozen["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and is_quantized(kernel.value)
    assert lora["params"]["Dense_0"]["kernel"].b.names == (None, "model")
    np.testing.assert_allclose(
        model.apply(frozen, lora, X), Net().apply(model.merge(frozen, lora), X), rtol=1e-4, atol=1e-5
    )


def test_training_starts_where_it_should_and_gradients_flow():
    model = lojax.wrap(net, ["k", "stack"], rank=4, base="nf4", init="loftq")
    frozen, lora = model.init(KEY, PARAMS, X)
    loss = lambda lora: jnp.mean(model.apply(frozen, lora, X) ** 2)
    oracle = lambda lora: jnp.mean(net(lojax.merge(frozen, lora), X) ** 2)
    (value, grads), (expected, by_hand) = (jax.jit(jax.value_and_grad(f))(lora) for f in (loss, oracle))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), grads, by_hand)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_saved_and_restored_as_other_moved_bases(tmp_path, init):
    settings = {"rank": 2, "init": init, "base": "nf4"}
    frozen, start = lojax.init(KEY, PARAMS, "k", **settings)
    lora = {**start, "k": dataclasses.replace(start["k"], a=start["k"].a + 0.1, b=start["k"].b - 0.2)}
    lojax.save(tmp_path / "whole", lora, frozen=frozen)
    again, _ = lojax.init(KEY, PARAMS, "k", **settings)  # the same start gives the same frozen tree
    assert_same_bits(lojax.restore(tmp_path / "whole", frozen=again), lora)
    for other in (PARAMS, lojax.quantize(PARAMS, "nf4", "k")):
        assert message(ValueError, lojax.restore, tmp_path / "whole", frozen=other).startswith("k: ")
    text = message(ValueError, lojax.restore, tmp_path / "whole", frozen=lojax.quantize(PARAMS, "nf4", "k"))
    assert f"({init}) was taken out of its weight" in text

    lojax.save(tmp_path / "difference", lora, frozen=frozen, start=start)
    restored = lojax.restore(tmp_path / "difference", frozen=PARAMS, check_base=False)
    assert restored["k"].rank == 4 and restored["k"].moved_base is None
    moved = lora["k"].a @ lora["k"].b - start["k"].a @ start["k"].b
    np.testing.assert_allclose(restored["k"].scale * restored["k"].a @ restored["k"].b, moved, rtol=0, atol=1e-5)
    names = lojax.peft.NameMap.parse("k <-> k.weight")
    text = message(ValueError, lojax.peft.save, tmp_path / "peft", lora, frozen, names)
    assert f"the start of this adapter ({init}) was taken out of its weight" in text


NAN = {"k": PARAMS["k"].at[1, 2].set(jnp.nan)}


@pytest.mark.parametrize(
    ("params", "settings", "pieces"),
    [
        (PARAMS, {"base": "nf5"}, ("base='nf5'", "expected one of nf4, int4, int8", "Did you mean 'nf4'?")),
        (PARAMS, {"base": True}, ("base=True", "expected one of nf4")),
        (PARAMS, {"init": "loftq"}, ("init='loftq'", 'Give base="nf4"')),
        (PARAMS, {"init": "loftq_niter_3"}, ("init='loftq_niter_3'", 'Give base="nf4"')),
        (PARAMS, {"init": "loftq_niter_0", "base": "nf4"}, ("init='loftq_niter_0' is unknown", "'loftq_niter_1'")),
        (
            lojax.quantize(PARAMS, "int8"),
            {"base": "nf4", "init": "loftq"},
            ("k: is quantized already (Quantized((64, 48), int8", "base='nf4' would quantize it again", "Leave base="),
        ),
        (NAN, {"base": "nf4"}, ("k: 1 of the 3072 entries of the weight are not finite", "base='nf4' quantizes it")),
        (NAN, {"base": "int8", "init": "loftq"}, ("k: 1 of the 3072 entries", "Load it again")),
        ({"k": jnp.ones((4, 4), jnp.int8)}, {"base": "nf4"}, ("k", "int8", "floating-point")),
    ],
)
def test_bad_input(params, settings, pieces):
    text = message(ValueError, lojax.init, KEY, params, "k", rank=2, **settings)
    for piece in pieces:
        assert piece in text


def test_codes_of_the_net_have_no_base():
    params = {"k": jnp.ones((64, 4), jnp.int8)}
    model = lojax.wrap(lambda p, x: x @ (p["k"].astype(jnp.float32) * 0.1), "k", rank=2, base="nf4")
    assert "k: holds codes (int8[64,4]), and base='nf4' quantizes" in message(ValueError, model.init, KEY, params, X)


def test_loftq_gives_every_entry_of_a_stack_the_same_rank():
    rule = Rule("stack", rank=(1, 2, 3), axes=("stack", "in", "out"), init="loftq", base="nf4")
    text = message(ValueError, lojax.init, KEY, PARAMS, rule)
    assert text == "stack: init='loftq' gives every entry of a stack the same rank, got (1, 2, 3)."
    frozen, lora = lojax.init(KEY, PARAMS, dataclasses.replace(rule, init="kaiming"))
    assert is_quantized(frozen["stack"]) and lora["stack"].ranks == (1, 2, 3)


def test_words_of_peft_lead_to_loftq():
    assert "Did you mean 'init=\"loftq\"'?" in message(TypeError, lojax.wrap, net, "k", loftq_config={})
    # Trained a little, the adapter still goes with its base.
    lora = lojax.init(KEY, PARAMS, "k", rank=2, base="nf4", init="loftq")[1]
    assert trained(lora)["k"].moved_base == "loftq"
