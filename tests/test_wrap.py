"""The public face, as an outside program calls it: Linen modules and plain functions."""

from __future__ import annotations

import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lojax
from lojax import Rule
from lojax.adapters.adapter import is_adapter
from lojax.rewrite.recorder import MaterializedError
from tests.helpers import assert_same_bits, message, trained


class Encoder(nn.Module):
    """A little of everything that Linen's apply takes: rngs, mutable collections, methods, flags."""

    @nn.compact
    def __call__(self, tokens, train=False, *, activation="tanh"):
        x = nn.Embed(11, 6, name="embed")(tokens)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dense(8, name="up")(x)
        x = {"tanh": jnp.tanh, "relu": nn.relu}[activation](x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3, name="head")(x)

    def pooled(self, tokens, train=False):
        return self(tokens, train).mean(-2)


TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


@pytest.fixture(scope="module")
def linen():
    """The model, its base variables, and a trained pair."""
    net = Encoder()
    variables = net.init(jax.random.key(0), TOKENS)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    model = lojax.wrap(net, "params/**/kernel", rank=2, alpha=8, train="params/head/bias", strict=True)
    frozen, lora = model.init(jax.random.key(1), variables, TOKENS)
    return model, variables, frozen, trained(lora)


def assert_close(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), left, right)


# --- Linen ---


def test_linen_the_card(linen):
    model, variables, frozen, lora = linen
    logits = model.apply(frozen, lora, TOKENS)
    merged = model.merge(frozen, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(variables)
    assert_close(logits, Encoder().apply(merged, TOKENS))
    assert not np.allclose(logits, Encoder().apply(variables, TOKENS), atol=1e-2)
    assert "2 of 2 adapted weights fully factored" in str(model.report(frozen, lora, TOKENS))
    assert model.bind(merged) is merged


def test_linen_fresh_adapters_change_nothing(linen):
    model, variables, _, _ = linen
    frozen, lora = model.init(jax.random.key(2), variables, TOKENS)
    assert_same_bits(model.apply(frozen, lora, TOKENS), Encoder().apply(variables, TOKENS))


def test_linen_rngs_and_mutable_pass_on(linen):
    model, _, frozen, lora = linen
    merged = model.merge(frozen, lora)
    options = {"rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats", "intermediates"]}
    logits, state = model.apply(frozen, lora, TOKENS, True, **options)
    expected, expected_state = Encoder().apply(merged, TOKENS, True, **options)
    assert set(state) == {"batch_stats", "intermediates"}
    assert_close((logits, state), (expected, expected_state))
    other = model.apply(frozen, lora, TOKENS, True, **options | {"rngs": {"dropout": jax.random.key(4)}})[0]
    assert not np.allclose(logits, other, atol=1e-2)


@pytest.mark.parametrize("method", ["pooled", Encoder.pooled])
def test_linen_method_passes_on(linen, method):
    model, _, frozen, lora = linen
    got = model.apply(frozen, lora, TOKENS, method=method)
    assert got.shape == (2, 3)
    assert_close(got, model.apply(frozen, lora, TOKENS).mean(-2))


@pytest.mark.parametrize("where", ["positional", "keyword", "closure"])
def test_flags_and_strings_pass_in_any_place(linen, where):
    model, _, frozen, lora = linen
    merged = model.merge(frozen, lora)
    expected = Encoder().apply(merged, TOKENS, False, activation="relu")

    def run(frozen, lora, tokens):
        if where == "positional":
            return model.apply(frozen, lora, tokens, False, activation="relu")
        if where == "keyword":
            return model.apply(frozen, lora, tokens=tokens, train=False, activation="relu")
        return lojax.transform(lambda v: Encoder().apply(v, tokens, activation="relu"))(frozen, lora)

    assert_close(run(frozen, lora, TOKENS), expected)
    assert_close(jax.jit(run)(frozen, lora, TOKENS), expected)
    assert "2 of 2" in str(model.report(frozen, lora, TOKENS, False, activation="relu"))


def test_linen_gradients_reach_lora_and_are_those_of_the_merged_net(linen):
    model, _, frozen, lora = linen
    got = jax.grad(lambda lora: jnp.sum(jnp.sin(model.apply(frozen, lora, TOKENS))))(lora)
    expected = jax.grad(lambda lora: jnp.sum(jnp.sin(Encoder().apply(model.merge(frozen, lora), TOKENS))))(lora)
    assert jax.tree.structure(got) == jax.tree.structure(lora)
    assert_close(got, expected)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(got))


def test_linen_vmap_over_adapters(linen):
    model, _, frozen, lora = linen
    two = jax.tree.map(lambda x: jnp.stack([x, -x]), lora)
    both = jax.vmap(lambda lora: model.apply(frozen, lora, TOKENS))(two)
    assert_close(both[0], model.apply(frozen, lora, TOKENS))
    assert_close(both[1], model.apply(frozen, jax.tree.map(jnp.negative, lora), TOKENS))


# --- init ---


@pytest.mark.parametrize("inputs", [TOKENS, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)])
def test_shapes_are_enough_as_example_inputs(linen, inputs):
    model, variables, frozen, lora = linen
    got = model.init(jax.random.key(1), variables, inputs)
    assert jax.tree.structure(got) == jax.tree.structure((frozen, lora))
    assert_same_bits(got[1]["params"]["up"]["kernel"].a, lora["params"]["up"]["kernel"].a)


def test_init_is_pure_and_works_on_shapes_alone(linen):
    model, variables, frozen, lora = linen
    shapes = jax.eval_shape(model.init, jax.random.key(1), variables, TOKENS)
    assert jax.tree.structure(shapes) == jax.tree.structure((frozen, lora))
    got = jax.jit(model.init)(jax.random.key(1), variables, TOKENS)
    assert jax.tree.structure(got) == jax.tree.structure((frozen, lora))


def test_init_sees_how_a_weight_is_used():
    def net(params, x, flip):
        w = params["w"].T if flip else params["w"]
        return x @ w

    model, params = lojax.wrap(net, "w", rank=2), {"w": np.ones((6, 4), np.float32)}
    shapes = [jax.ShapeDtypeStruct((3, width), jnp.float32) for width in (6, 4)]
    assert model.init(jax.random.key(0), params, shapes[0], False)[1]["w"].axes == ("in", "out")
    assert model.init(jax.random.key(0), params, shapes[1], flip=True)[1]["w"].axes == ("out", "in")
    assert model.init(jax.random.key(0), params)[1]["w"].axes == ("in", "out")


def test_the_free_init_is_that_of_a_model():
    def net(params, x):
        return jnp.einsum("td,hkd->thk", x, params["w"])

    params, x = {"w": np.ones((2, 3, 5), np.float32)}, np.ones((4, 5), np.float32)
    by_model = lojax.wrap(net, "w", rank=2, alpha=1).init(jax.random.key(0), params, x)
    by_function = lojax.init(jax.random.key(0), params, "w", apply_fn=net, example_args=(x,), rank=2, alpha=1)
    assert jax.tree.structure(by_model) == jax.tree.structure(by_function)
    assert by_function[1]["w"].axes == ("out", "out", "in")
    assert_same_bits(by_model, by_function)


# --- plain functions ---

PARAMS = {
    "first": {"kernel": np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5), "bias": np.ones(5, np.float32)},
    "second": {"kernel": np.linspace(1, -1, 15, dtype=np.float32).reshape(5, 3), "bias": np.zeros(3, np.float32)},
}
X = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)
ADAPTED = {"first/kernel", "second/kernel"}


def mlp(params, x, *, shift=0.0):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return {"logits": hidden @ params["second"]["kernel"] + params["second"]["bias"] + np.float32(shift)}


def adapted_paths(lora):
    flat = jax.tree_util.tree_leaves_with_path(lora, is_leaf=is_adapter)
    return {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, leaf in flat if is_adapter(leaf)}


@pytest.mark.parametrize(
    "targets",
    [
        "**/kernel",
        re.compile(r"\w+/kernel"),
        lambda path, leaf: leaf.ndim == 2,
        Rule("*/kernel"),
        Rule(["first/kernel", "second/kernel"], rank=1),
        ["first/kernel", "second/kernel"],
        ("first/kernel", Rule(re.compile("second.*kernel"), rank=2)),
    ],
    ids=["glob", "regex", "predicate", "rule", "rule of several", "sequence", "mixed"],
)
def test_every_kind_of_target(targets):
    model = lojax.wrap(mlp, targets, rank=3, strict=True)
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    assert adapted_paths(lora) == ADAPTED
    lora = trained(lora)
    assert_close(model.apply(frozen, lora, X, shift=2.0), mlp(model.merge(frozen, lora), X, shift=2.0))


def test_rules_set_what_wrap_leaves_open():
    targets = [
        Rule("first/kernel", rank=1, alpha=4, scaling="rslora", dropout=0.0, dtype=jnp.bfloat16),
        "second/kernel",
    ]
    model = lojax.wrap(mlp, targets, rank=2, alpha=1, dropout=0.5, init="gaussian", exclude="**/bias")
    _, lora = model.init(jax.random.key(0), PARAMS, X)
    first, second = lora["first"]["kernel"], lora["second"]["kernel"]
    assert (first.rank, first.scale, first.dropout, first.a.dtype) == (1, 4.0, 0.0, jnp.bfloat16)
    assert (second.rank, second.scale, second.dropout, second.a.dtype) == (2, 0.5, 0.5, jnp.float32)


def test_alpha_none_means_rank():
    _, lora = lojax.wrap(mlp, "first/kernel", rank=3).init(jax.random.key(0), PARAMS)
    assert lora["first"]["kernel"].scale == 1.0


def test_train_and_exclude():
    model = lojax.wrap(mlp, "**/kernel", rank=2, train="second/bias", exclude=["second/kernel"])
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    assert adapted_paths(lora) == {"first/kernel"}
    assert_same_bits(lora["second"], {"kernel": None, "bias": PARAMS["second"]["bias"]})
    grads = jax.grad(lambda lora: model.apply(frozen, lora, X)["logits"].sum())(lora)
    assert (grads["second"]["bias"] == 2).all()


def test_dropout_needs_a_key_and_uses_it():
    model = lojax.wrap(mlp, "first/kernel", rank=2, dropout=0.5)
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    lora = trained(lora)
    without = [model.apply(frozen, lora, X)["logits"] for _ in range(2)]
    assert_same_bits(*without)
    assert_close(without[0], mlp(model.merge(frozen, lora), X)["logits"])
    keyed = [model.apply(frozen, lora, X, dropout_key=jax.random.key(k))["logits"] for k in (1, 1, 2)]
    assert_same_bits(keyed[0], keyed[1])
    assert not np.allclose(keyed[0], keyed[2], atol=1e-3)
    assert not np.allclose(keyed[0], without[0], atol=1e-3)


def test_a_function_holds_no_parameters(linen):
    for model in (linen[0], lojax.wrap(mlp, "**/kernel")):
        assert "holds no parameters" in message(AttributeError, lambda model=model: model.params)


def test_strict_refuses_to_form_a_weight_and_says_what_to_do():
    def net(params, x):
        return x @ jnp.sin(params["w"])

    params = {"w": np.ones((4, 3), np.float32)}
    model = lojax.wrap(net, "w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, X)
    text = message(MaterializedError, model.apply, frozen, lora, X)
    assert text.startswith("w (shape (4, 3)) is used by 'sin' at ")
    assert "test_wrap.py:" in text
    assert text.endswith(
        "which has no factored form: sin is not linear in the weight. Take the weight out of targets, train it in "
        "full, or allow this use to materialize W0 + scale*A*B with strict=False."
    )
    lenient = lojax.wrap(net, "w", rank=2)
    lora = trained(lora)
    assert_close(lenient.apply(frozen, lora, X), net(lenient.merge(frozen, lora), X))


# --- the name ---


class Branching(nn.Module):
    """Reads a weight as a Python number, which no traced program can."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) if self.param("w", nn.initializers.ones, (4, 3)).sum() > 0 else x


def branching(params, x):
    return x @ params["w"] if params["w"].sum() > 0 else x


@pytest.mark.parametrize("net", [branching, Branching()], ids=["function", "Linen"])
def test_errors_while_tracing_name_the_net(net):
    weight = {"w": np.ones((4, 3), np.float32)}
    model = lojax.wrap(net, "**/w", rank=2)
    pair = model.init(jax.random.key(0), {"params": weight} if net is not branching else weight)
    text = message(jax.errors.TracerBoolConversionError, model.apply, *pair, X)
    name = "branching" if net is branching else "Branching"
    assert f"tracing the function {name} " in text


# --- errors ---


@pytest.mark.parametrize("net", [3, "net", None, {"apply": mlp}])
def test_a_net_of_no_known_kind_is_refused(net):
    text = message(TypeError, lojax.wrap, net, "**")
    assert "lojax.wrap takes" in text
    assert f"{type(net).__name__}: {net!r}" in text


def test_a_class_in_place_of_an_instance_says_so():
    assert "That is a class: pass an instance." in message(TypeError, lojax.wrap, Encoder, "**")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank=0; expected an integer of at least 1."),
        ({"alpha": -1}, "alpha=-1; expected a finite number above 0"),
        ({"dropout": 1.5}, "dropout=1.5; expected a rate in [0, 1)."),
        ({"scaling": "rs"}, "scaling='rs'; expected one of ['rslora', 'standard']."),
        ({"variant": "dorra"}, "variant='dorra'; expected"),
        ({"init": "kaimin"}, "Did you mean 'kaiming'?"),
        ({"train": Rule("b")}, "Rule('b') trains an adapter: its place is in targets="),
        ({"exclude": Rule("b")}, "Rule('b') trains an adapter: its place is in targets="),
    ],
)
def test_settings_are_checked_when_the_net_is_wrapped(settings, text):
    assert text in message(ValueError, lojax.wrap, mlp, "**/kernel", **settings)


@pytest.mark.parametrize(
    ("targets", "settings", "text"),
    [
        (
            "**/kernels",
            {},
            "Target '**/kernels' matches none of the 4 parameters. The nearest paths:\n  first/kernel\n",
        ),
        ("first/bias", {}, "first/bias is a vector of shape (5,): a low-rank update needs at least two axes."),
        (Rule("second/kernel", rank=4), {}, "second/kernel: rank=4 is above min(m, n) = 3"),
        (["**/kernel", "first/kernel"], {}, "first/kernel is matched by contradictory rules: "),
        ("second/kernel", {"train": "second/*"}, "second/kernel is matched by contradictory rules: targets= adapts it"),
        ("**/kernel", {"exclude": "**/kernel"}, "Nothing trains: "),
    ],
)
def test_a_plan_that_does_not_fit_the_params_is_refused_by_init(targets, settings, text):
    model = lojax.wrap(mlp, targets, **({"rank": 2} | settings))
    assert message(ValueError, model.init, jax.random.key(0), PARAMS, X).startswith(text)
    assert message(ValueError, lojax.init, jax.random.key(0), PARAMS, targets, **({"rank": 2} | settings)).startswith(
        text
    )


def everything(model):
    """Every method that takes the pair."""
    return {
        "apply": lambda frozen, lora: model.apply(frozen, lora, X),
        "merge": model.merge,
        "report": lambda frozen, lora: model.report(frozen, lora, X),
        "summary": lojax.summary,
    }


@pytest.mark.parametrize("method", ["apply", "merge", "report", "summary"])
def test_params_of_other_shapes_than_at_init(method):
    model = lojax.wrap(mlp, "first/kernel", rank=2)
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    wider = frozen | {"first": frozen["first"] | {"kernel": np.ones((4, 9), np.float32)}}
    text = message(ValueError, everything(model)[method], wider, lora)
    assert text.startswith("first/kernel: a weight of shape (4, 9) with axes ('in', 'out') needs an adapter of shapes")


@pytest.mark.parametrize("method", ["apply", "merge", "report", "summary"])
def test_frozen_and_lora_of_different_structure(method):
    model = lojax.wrap(mlp, "first/kernel", rank=2)
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    text = message(ValueError, everything(model)[method], frozen, {"first": lora["first"]})
    assert text.startswith(
        "frozen and lora have different structure: second/bias is in frozen but not in lora. "
        "Use the pair that one init (or restore onto the same frozen) returned."
    )


def test_an_output_that_is_no_tree_of_arrays():
    model = lojax.wrap(lambda params, x: {"y": x @ params["w"], "name": "linear"}, "w", rank=2)
    frozen, lora = model.init(jax.random.key(0), {"w": np.ones((4, 3), np.float32)})
    assert message(TypeError, model.apply, frozen, lora, X) == (
        "The net returned a str at output name: 'linear'. An adapted net must return a tree of arrays; "
        "wrap a function that returns only those."
    )
    model = lojax.wrap(lambda params, x: print, "w", rank=2)
    assert message(TypeError, model.apply, frozen, lora, X).startswith(
        "The net returned a builtin_function_or_method at output (the whole output): "
    )


class UserError(Exception):
    pass


def test_the_users_own_error_keeps_its_type_and_its_line():
    def check(hidden):
        raise UserError(f"bad width {hidden.shape[-1]}")

    def net(params, x):
        return check(x @ params["w"])

    model = lojax.wrap(net, "w", rank=2)
    params = {"w": np.ones((4, 3), np.float32)}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2)
    for run in (lambda: model.apply(frozen, lora, X), lambda: model.init(jax.random.key(0), params, X)):
        with pytest.raises(UserError) as caught:
            run()
        assert str(caught.value) == "bad width 3"
        innermost = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert (innermost.name, innermost.filename) == ("check", __file__)


def test_a_shape_error_in_the_users_net_points_at_the_users_line():
    model = lojax.wrap(mlp, "**/kernel", rank=2)
    frozen, lora = model.init(jax.random.key(0), PARAMS)
    with pytest.raises(TypeError, match="dot_general") as caught:
        model.apply(frozen, lora, np.ones((2, 7), np.float32))
    assert any((f.name, f.filename) == ("mlp", __file__) for f in traceback.extract_tb(caught.value.__traceback__))


def test_biases_train_beside_the_adapters_from_the_pretrained_ones():
    """PEFT's ``bias=``: the chosen biases are in ``lora``, get a gradient, and are merged."""
    params = {"one": {"kernel": jnp.ones((4, 3)), "bias": jnp.arange(3.0)}, "norm": {"bias": jnp.ones(3)}}
    net = lambda p, x: x @ p["one"]["kernel"] + p["one"]["bias"] + p["norm"]["bias"]
    model = lojax.wrap(net, "one/kernel", rank=2, bias="lora_only")
    frozen, lora = model.init(jax.random.key(0), params, jnp.ones((2, 4)))
    assert frozen["one"]["bias"] is None and lora["norm"]["bias"] is None
    np.testing.assert_array_equal(lora["one"]["bias"], params["one"]["bias"])
    grads = jax.grad(lambda lora: model.apply(frozen, lora, jnp.ones((2, 4))).sum())(lora)
    np.testing.assert_array_equal(grads["one"]["bias"], [2, 2, 2])
    assert jax.tree.structure(model.merge(frozen, lora)) == jax.tree.structure(params)
    _, everywhere = lojax.init(jax.random.key(0), params, "one/kernel", rank=2, bias="all")
    assert everywhere["norm"]["bias"] is not None


def test_an_unknown_bias_is_refused_at_once():
    with pytest.raises(ValueError, match="bias='lora'; expected one of 'none', 'all', 'lora_only'"):
        lojax.wrap(lambda p, x: x, "w", bias="lora")


# --- a dry run ---


def test_a_preview_says_what_would_be_adapted_without_making_anything():
    made = []

    def draw(key, shape, dtype, *, fan_in, rank):
        made.append(isinstance(key, jax.core.Tracer))
        return jnp.zeros(shape, dtype)

    model = lojax.wrap(mlp, "**/kernel", rank=8, train="second/bias", init=draw)
    preview = model.preview(PARAMS, X)
    assert str(preview) == str(lojax.summary(*model.init(jax.random.key(0), PARAMS, X)))
    assert made[:2] == [True, True] and made[2:] == [False, False]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert preview == model.preview(shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)) == model.preview(PARAMS)
    rows = {row.path: (row.shape, row.rank, row.requested_rank) for row in preview.rows if row.rank}
    assert rows == {"first/kernel": ((4, 5), 4, 8), "second/kernel": ((5, 3), 3, 8)}
    assert "matches none of the 4" in message(ValueError, lojax.wrap(mlp, "**/kernels").preview, PARAMS)
