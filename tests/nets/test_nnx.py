"""NNX modules as nets: pure, and the module they came from never touched."""

from __future__ import annotations

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


def test_params_are_a_plain_dict_of_arrays(net: Net) -> None:
    params = lojax.wrap(net, TARGETS).params
    assert list(flatten(params)) == [
        "embed/embedding",
        "layers/0/bias",
        "layers/0/kernel",
        "layers/1/bias",
        "layers/1/kernel",
        "norm/bias",
        "norm/scale",
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
    outputs = model.apply(frozen, lora, IDS)
    assert_same_bits(outputs, model.apply(frozen, lora, IDS))  # the dropout count has not moved either
    after = nnx.to_pure_dict(nnx.state(net))
    for (path, x), y in zip(flatten(before).items(), flatten(after).values(), strict=True):
        assert x is y, path
    net.embed.embedding[...] = jnp.zeros((10, 8))
    assert_same_bits(outputs, model.apply(frozen, lora, IDS))


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
    _, state = model.apply(frozen, lora, IDS, mutable=nnx.BatchStat)
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
    model, frozen, lora = adapted(net)
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
    assert_same_bits(nnx.to_pure_dict(nnx.state(bound, nnx.Param)), merged)
    bound.calls[...] += 5
    bound.layers[0].bias[...] += 1.0
    assert int(net.calls[...]) == 0 and int(model.bind(merged).calls[...]) == 0
    assert not np.array_equal(bound.layers[0].bias[...], net.layers[0].bias[...])


def test_string_keys_serve_as_well(net: Net) -> None:
    """Checkpoints turn the numbers of a list's layers into strings."""
    model, _, _ = adapted(net)
    params = model.params | {"layers": {str(i): layer for i, layer in model.params["layers"].items()}}
    assert_same_bits(nnx.to_pure_dict(nnx.state(model.bind(params), nnx.Param)), model.params)


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
