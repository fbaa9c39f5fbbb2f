"""NNX modules as nets: pure, and the module they came from never touched."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lojax
from lojax.adapters.paths import flatten
from tests.helpers import assert_same_bits, message, trained


class Net(nnx.Module):
    """Everything at once: a tied embedding, a list, batch statistics, dropout with its own rngs, a sharded weight."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.head = self.embed
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"), eager_sharding=False)
        self.layers = nnx.List([nnx.Linear(8, 8, kernel_init=init, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def features(self, ids: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x

    def __call__(self, ids: Any, *, rngs: nnx.Rngs | None = None) -> Any:
        self.calls[...] += 1
        return self.head.attend(self.dropout(self.norm(self.features(ids)), rngs=rngs))


IDS = jnp.arange(6).reshape(2, 3)
TARGETS = ["**/kernel", "**/embedding"]


@pytest.fixture
def net() -> Net:
    return Net(nnx.Rngs(0))


def adapted(net: Net, **settings: Any) -> tuple[Any, Any, Any]:
    model = lojax.wrap(net, TARGETS, rank=2, strict=True, **settings)
    frozen, lora = model.init(jax.random.key(0), model.params, IDS)
    return model, frozen, trained(lora)


def with_fixed_statistics(net: Net) -> Net:
    net.norm.use_running_average = True
    return net


def test_params_are_a_plain_dict_of_arrays(net: Net) -> None:
    params = lojax.wrap(net, TARGETS).params
    assert list(flatten(params)) == [
        "calls",
        "embed/embedding",
        "layers/0/bias",
        "layers/0/kernel",
        "layers/1/bias",
        "layers/1/kernel",
        "norm/bias",
        "norm/mean",
        "norm/scale",
        "norm/var",
    ]
    assert type(params) is dict and type(params["layers"]) is dict
    assert params["embed"]["embedding"] is net.embed.embedding.get_value()


def test_works_under_jit_grad_and_vmap(net: Net) -> None:
    model, frozen, lora = adapted(net)
    expected = model.apply(frozen, lora, IDS, method="features")

    def f(lora: Any, ids: Any) -> Any:
        return model.apply(frozen, lora, ids, method="features")

    np.testing.assert_allclose(jax.jit(f)(lora, IDS), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(f, (None, 0))(lora, IDS), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda lora: f(lora, IDS).sum())(lora)
    assert all(np.linalg.norm(g) > 0 for g in jax.tree.leaves(gradient))


def test_the_module_is_read_once_and_left_alone(net: Net) -> None:
    model, frozen, lora = adapted(net)
    before = nnx.to_pure_dict(nnx.state(net))
    outputs, _ = model.apply(frozen, lora, IDS, mutable=True)
    assert_same_bits(outputs, model.apply(frozen, lora, IDS, mutable=True)[0])  # the dropout count has not moved either
    after = nnx.to_pure_dict(nnx.state(net))
    for (path, x), y in zip(flatten(before).items(), flatten(after).values(), strict=True):
        assert x is y, path
    net.embed.embedding[...] = jnp.zeros((10, 8))
    assert_same_bits(outputs, model.apply(frozen, lora, IDS, mutable=True)[0])


def test_mutable_returns_the_state_and_state_takes_it(net: Net) -> None:
    model, frozen, lora = adapted(net)
    _, first = model.apply(frozen, lora, IDS, mutable=True)
    assert sorted(flatten(first)) == ["calls", "dropout/rngs/count", "dropout/rngs/key", "norm/mean", "norm/var"]
    step = jax.jit(lambda state: model.apply(frozen, lora, IDS, mutable=True, state=state))
    _, second = step(first)
    assert (int(first["calls"]), int(second["calls"])) == (1, 2)
    assert int(second["dropout"]["rngs"]["count"]) == 2
    assert not np.array_equal(first["norm"]["mean"], second["norm"]["mean"])

    merged = model.bind(model.merge(frozen, lora))
    merged(IDS), merged(IDS)  # the module itself, twice
    np.testing.assert_allclose(second["norm"]["mean"], merged.norm.mean[...], rtol=1e-5)


def test_mutable_takes_a_filter_and_state_a_part(net: Net) -> None:
    model, frozen, lora = adapted(net)
    _, state = model.apply(frozen, lora, IDS, mutable=nnx.BatchStat, rngs=nnx.Rngs(1))
    assert sorted(flatten(state)) == ["norm/mean", "norm/var"]
    _, whole = model.apply(frozen, lora, IDS, mutable=True, state=state)
    assert int(whole["calls"]) == 1
    assert not np.array_equal(whole["norm"]["mean"], state["norm"]["mean"])


def test_unknown_state_is_refused(net: Net) -> None:
    model, frozen, lora = adapted(net)
    text = message(ValueError, model.apply, frozen, lora, IDS, state={"norm": {"median": jnp.zeros(8)}})
    assert text.startswith("state holds norm/median, which the nnx.Module Net does not hold before the call.")
    assert "norm/mean" in text


def test_rngs_among_the_arguments_are_copied(net: Net) -> None:
    model, frozen, lora = adapted(with_fixed_statistics(net))
    rngs = nnx.Rngs(dropout=3)
    first = model.apply(frozen, lora, IDS, rngs=rngs)
    assert_same_bits(first, model.apply(frozen, lora, IDS, rngs=rngs))
    assert int(rngs.dropout.count[...]) == 0
    assert not np.array_equal(first, model.apply(frozen, lora, IDS, rngs=nnx.Rngs(dropout=4)))


def test_method_is_a_name_or_a_function(net: Net) -> None:
    model, frozen, lora = adapted(net)
    expected = model.bind(model.merge(frozen, lora)).features(IDS)
    for method in ("features", Net.features, net.features):
        np.testing.assert_allclose(model.apply(frozen, lora, IDS, method=method), expected, rtol=1e-5, atol=1e-6)


def test_bind_makes_a_module_of_its_own(net: Net) -> None:
    model, frozen, lora = adapted(net)
    merged = model.merge(frozen, lora)
    bound = model.bind(merged)
    assert type(bound) is Net and bound.head is bound.embed
    assert bound.layers[0].kernel.get_metadata()["out_sharding"] == (None, "model")
    assert_same_bits(nnx.to_pure_dict(nnx.state(bound, nnx.Not(nnx.RngState))), merged)
    bound.calls[...] += 5
    bound.layers[0].bias[...] += 1.0
    assert int(net.calls[...]) == 0 and int(model.bind(merged).calls[...]) == 0
    assert not np.array_equal(bound.layers[0].bias[...], net.layers[0].bias[...])


def test_string_keys_serve_as_well(net: Net) -> None:
    """Checkpoints turn the numbers of a list's layers into strings."""
    model, _, _ = adapted(net)
    params = model.params | {"layers": {str(i): layer for i, layer in model.params["layers"].items()}}
    assert_same_bits(nnx.to_pure_dict(nnx.state(model.bind(params), nnx.Not(nnx.RngState))), model.params)


def test_a_missing_leaf_is_named(net: Net) -> None:
    model, _, _ = adapted(net)
    params = model.params | {"embed": {}}
    text = message(ValueError, model.init, jax.random.key(0), params, IDS)
    assert text == (
        "params lacks embed/embedding (shape (10, 8)): 1 of the 7 parameters of the nnx.Module Net are missing. "
        "Pass model.params, or a tree of the same structure."
    )


def test_an_unknown_leaf_and_a_wrong_shape_are_named(net: Net) -> None:
    model, _, _ = adapted(net)
    assert "params holds extra, which the nnx.Module Net does not" in message(
        ValueError, model.bind, model.params | {"extra": jnp.zeros(2)}
    )
    text = message(ValueError, model.bind, model.params | {"embed": {"embedding": jnp.zeros((3, 8))}})
    assert text.startswith("embed/embedding: expected shape (10, 8), as in the nnx.Module Net, got (3, 8).")


def test_the_module_or_its_state_are_no_params(net: Net) -> None:
    model, _, _ = adapted(net)
    for params, name in ((net, "Net"), (nnx.state(net, nnx.Param), "State")):
        text = message(TypeError, model.init, jax.random.key(0), params, IDS)
        assert text.startswith(f"params is a {name};") and "Pass model.params" in text


def test_a_model_shows_no_arrays(net: Net) -> None:
    text = repr(lojax.wrap(net, TARGETS))
    assert text.startswith("Model(net=NNXNet(name='Net'), rules=(Rule('**/kernel', rank=8")
    assert "Array" not in text


# --- state ---


def trained_module(net: Net, **settings: Any) -> tuple[Any, Any]:
    """The model, and its module after calls that move the batch statistics and the counter."""
    model, frozen, lora = adapted(net, **settings)
    module = model.as_nnx(frozen, lora)
    for _ in range(3):
        module(IDS)
    module.eval()
    return model, module


def test_what_a_module_has_gathered_travels_with_the_pair(net: Net) -> None:
    model, module = trained_module(net)
    frozen, lora = module.pair()
    bound = model.bind(model.merge(frozen, lora))
    bound.eval()
    assert not np.allclose(bound.norm.mean[...], net.norm.mean[...], atol=1e-3)
    np.testing.assert_allclose(bound(IDS), module(IDS), rtol=1e-5, atol=1e-6)
    assert int(bound.calls[...]) == int(module.net.calls[...]) == 4
    again = model.as_nnx(frozen, lora)
    again.eval()
    np.testing.assert_allclose(again(IDS), module(IDS), rtol=1e-5, atol=1e-6)

    def evaluate(net: Net, ids: Any) -> Any:
        net.eval()
        return net(ids)

    np.testing.assert_allclose(model.apply(frozen, lora, IDS, method=evaluate), module(IDS), rtol=1e-5, atol=1e-6)


def test_state_never_trains(net: Net) -> None:
    model = lojax.wrap(net, TARGETS, rank=2, train=["norm/*"])
    frozen, lora = model.init(jax.random.key(0), model.params, IDS)
    assert sorted(path for path, leaf in flatten(lora["norm"]).items() if leaf is not None) == ["bias", "scale"]
    assert frozen["norm"]["mean"] is not None and lora["calls"] is None
    text = message(ValueError, lojax.wrap(net, "norm/mean").init, jax.random.key(0), model.params, IDS)
    assert text.startswith("Target 'norm/mean' matches none of the 7 parameters.")


def test_parameters_alone_serve_as_well(net: Net) -> None:
    model, frozen, lora = adapted(net)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    alone, alone_lora = model.init(jax.random.key(0), params, IDS)
    assert jax.tree.structure(model.merge(alone, alone_lora)) == jax.tree.structure(params)
    for ours, theirs in ((alone, frozen), (trained(alone_lora), lora)):
        leaves = {path: leaf for path, leaf in flatten(theirs).items() if path in flatten(params)}
        assert_same_bits(flatten(ours), leaves)
    expected = model.apply(frozen, lora, IDS, mutable=True)[1]["norm"]
    assert_same_bits(model.apply(alone, trained(alone_lora), IDS, mutable=True)[1]["norm"], expected)
    assert_same_bits(model.bind(params).norm.mean[...], net.norm.mean[...])


def test_a_part_of_the_state_among_the_params_is_refused(net: Net) -> None:
    model, _, _ = adapted(net)
    norm = {name: leaf for name, leaf in model.params["norm"].items() if name != "var"}
    text = message(ValueError, model.bind, model.params | {"norm": norm})
    assert text.startswith("params lacks norm/var but holds other state of the nnx.Module Net. Pass all of it")


def test_bind_takes_the_state_of_calls(net: Net) -> None:
    model, frozen, lora = adapted(net)
    state = None
    for _ in range(2):
        _, state = model.apply(frozen, lora, IDS, mutable=True, state=state)
    params = model.merge(frozen, lora)
    bound = model.bind(params, state=state)
    assert_same_bits(nnx.to_pure_dict(nnx.state(bound, nnx.BatchStat))["norm"]["mean"], state["norm"]["mean"])
    assert (int(bound.calls[...]), int(bound.dropout.rngs.count[...])) == (2, 2)
    part = model.bind(params, state={"norm": {"mean": state["norm"]["mean"]}})
    assert int(part.calls[...]) == 0 and not np.array_equal(part.norm.mean[...], net.norm.mean[...])


def test_state_is_for_nnx() -> None:
    model = lojax.wrap(lambda params, x: x @ params["w"], "w", rank=1)
    text = message(TypeError, model.bind, {"w": jnp.ones((3, 2))}, state={})
    assert text == "bind(state=...) is for NNX modules, and this net is a plain function. Leave state out."


def test_save_and_restore_with_state_in_the_base(net: Net, tmp_path: Path) -> None:
    _, module = trained_module(net)
    frozen, lora = module.pair()
    lojax.save(tmp_path, lora, frozen=frozen)
    assert_same_bits(lojax.restore(tmp_path, frozen=frozen), lora)


def test_restore_refuses_a_base_with_other_batch_statistics(net: Net, tmp_path: Path) -> None:
    model, module = trained_module(net)
    frozen, lora = module.pair()
    lojax.save(tmp_path, lora, frozen=frozen)
    base, _ = model.init(jax.random.key(0), model.params, IDS)
    assert "norm/mean: frozen holds other values" in message(ValueError, lojax.restore, tmp_path, frozen=base)


REPEATS = "its own rng stream dropout/rngs, and this call keeps no account of them: the next one draws the same numbers"


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_repeating_a_dropout_mask_is_said(net: Net, transform: Any) -> None:
    model, frozen, lora = adapted(with_fixed_statistics(net))
    for mutable in (False, nnx.BatchStat):
        with pytest.warns(UserWarning, match=REPEATS) as caught:
            transform(lambda lora, mutable=mutable: model.apply(frozen, lora, IDS, mutable=mutable))(lora)
        assert all(way in str(caught[0].message) for way in ("mutable=nnx.RngCount", "rngs=nnx.Rngs(", "eval()"))


def test_a_mask_that_does_not_repeat_needs_no_warning(net: Net) -> None:
    model, frozen, lora = adapted(with_fixed_statistics(net))
    first, state = model.apply(frozen, lora, IDS, mutable=nnx.RngCount)
    second, _ = model.apply(frozen, lora, IDS, mutable=nnx.RngCount, state=state)
    assert not np.array_equal(first, second)
    assert_same_bits(second, model.apply(frozen, lora, IDS, state={"dropout": {"rngs": {"count": jnp.uint32(1)}}}))
    assert not np.array_equal(first, model.apply(frozen, lora, IDS, rngs=nnx.Rngs(3)))
    model.init(jax.random.key(0), model.params, IDS), model.report(frozen, lora, IDS)  # which compute nothing


DROPS = "the nnx.Module Net computed new batch statistics, such as norm/mean, and this call drops them"


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_dropping_batch_statistics_is_said(net: Net, transform: Any) -> None:
    model, frozen, lora = adapted(net)
    for mutable in (False, nnx.RngCount):
        with pytest.warns(UserWarning, match=DROPS) as caught:
            transform(lambda lora, m=mutable: model.apply(frozen, lora, IDS, mutable=m, rngs=nnx.Rngs(0)))(lora)
        assert all(way in str(caught[0].message) for way in ("mutable=nnx.BatchStat", "state=", "module.eval()"))
    for mutable in (True, nnx.BatchStat):
        model.apply(frozen, lora, IDS, mutable=mutable, rngs=nnx.Rngs(0))
    model.apply(frozen, lora, IDS, method="features")
    model.init(jax.random.key(0), model.params, IDS), model.report(frozen, lora, IDS)  # which compute nothing


class Stacked(nnx.Module):
    """Batch statistics that pass through NNX transforms, which replace them, changed or not."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.vmap(lambda _: nnx.BatchNorm(4, rngs=nnx.Rngs(0)))(jnp.arange(3))
        self.net = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.jit(lambda self, x: self.norm(self.net(x)))(self, x)
        x = nnx.remat(lambda self, x: self.norm(x))(self, x)
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_only_statistics_that_change_count_as_dropped() -> None:
    x = jnp.ones((2, 4))
    for training in (False, True):
        net = Stacked(nnx.Rngs(0))
        net.train() if training else net.eval()
        model = lojax.wrap(net, "net/kernel", rank=2)
        pair = model.init(jax.random.key(0), model.params, x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.apply(*pair, x)
        assert len(caught) == training


class Transformed(nnx.Module):
    """NNX transforms, which replace the rng counts of the modules that pass through them, changed or not."""

    def __init__(self, rngs: nnx.Rngs):
        self.net = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.jit(lambda self, x: self.dropout(self.net(x)))(self, x)
        return nnx.remat(lambda self, x: self.dropout(x))(self, x)


def test_only_numbers_that_reach_the_outputs_count_as_drawn() -> None:
    x = jnp.ones((2, 4))
    for deterministic in (True, False):
        net = Transformed(nnx.Rngs(0))
        net.dropout.deterministic = deterministic
        model = lojax.wrap(net, "net/kernel", rank=2)
        pair = model.init(jax.random.key(0), model.params, x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.apply(*pair, x)
        assert len(caught) == (not deterministic)


@pytest.mark.parametrize(
    ("mutable", "start", "hint"),
    [
        (
            ["batch_stats"],
            "mutable='batch_stats' is the tag of no variable of the nnx.Module Net.",
            "pass nnx.BatchStat.",
        ),
        ("droput", "mutable='droput' is the tag of no variable of the nnx.Module Net.", "norm/mean (BatchStat)"),
        (nnx.Param, "mutable=nnx.Param picks no variable apart from the parameters", "Pass True"),
        ((nnx.BatchStat, nnx.Rngs), "mutable=nnx.Rngs picks no variable", "dropout/rngs/count (RngCount)"),
    ],
    ids=["Linen's name", "tag", "parameters", "no variable"],
)
def test_a_filter_that_can_pick_nothing_is_refused(net: Net, mutable: Any, start: str, hint: str) -> None:
    model, frozen, lora = adapted(net)
    text = message(ValueError, model.apply, frozen, lora, IDS, mutable=mutable)
    assert text.startswith(start) and hint in text


def test_a_type_of_variable_that_a_module_lacks_picks_nothing(net: Net) -> None:
    model, frozen, lora = adapted(with_fixed_statistics(net))
    assert model.apply(frozen, lora, IDS, mutable=nnx.Cache, rngs=nnx.Rngs(0))[1] == {}
