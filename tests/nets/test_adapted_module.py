"""An adapted NNX net as a module: NNX's own training loop, unchanged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lojax
from lojax.adapters.adapter import is_adapter
from lojax.adapters.paths import flatten
from tests.helpers import assert_same_bits, message, trained
from tests.nets.test_nnx import IDS, TARGETS, Net

LABELS = jax.nn.one_hot(IDS[::-1], 10)


def loss(logits: Any) -> Any:
    return optax.softmax_cross_entropy(logits, LABELS).mean()


def setting(**settings: Any) -> tuple[Any, Any, Any]:
    model = lojax.wrap(Net(nnx.Rngs(0)), TARGETS, rank=2, alpha=4, train="layers/1/bias", strict=True, **settings)
    frozen, lora = model.init(jax.random.key(0), model.params, IDS)
    return model, frozen, lora


def test_its_lora_params_are_what_lora_holds() -> None:
    model, frozen, lora = setting()
    module = model.as_nnx(frozen, lora)
    found = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(module, nnx.LoRAParam))}
    adapters = [path for path, leaf in flatten(lora).items() if is_adapter(leaf)]
    expected = {f"lora/{path}/{name}" for path in adapters for name in ("lora_a", "lora_b")}
    assert found.keys() == expected | {"net/layers/1/bias"}
    assert len(found) == len(jax.tree.leaves(lora))
    assert_same_bits(module.pair(), (frozen, lora))


@pytest.mark.usefixtures("standard_promotion")
def test_trains_as_optax_over_lora_does() -> None:
    model, frozen, lora = setting()
    tx = optax.adam(1e-2)
    module = model.as_nnx(frozen, lora)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def nnx_step(module: Any, optimizer: Any) -> Any:
        value, grads = nnx.value_and_grad(lambda module: loss(module(IDS)), argnums=nnx.DiffState(0, nnx.LoRAParam))(
            module
        )
        optimizer.update(module, grads)
        return value

    @jax.jit
    def optax_step(lora: Any, opt_state: Any, state: Any) -> Any:
        def f(lora: Any) -> Any:
            logits, new = model.apply(frozen, lora, IDS, mutable=True, state=state)
            return loss(logits), new

        (value, state), grads = jax.value_and_grad(f, has_aux=True)(lora)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return value, optax.apply_updates(lora, updates), opt_state, state

    opt_state, state = tx.init(lora), model.net.state
    for _ in range(4):
        ours = nnx_step(module, optimizer)
        theirs, lora, opt_state, state = optax_step(lora, opt_state, state)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    got_frozen, got = module.pair()
    assert_same_bits(got_frozen["layers"], frozen["layers"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), got, lora)
    assert int(module.net.calls[...]) == 4 == int(state["calls"])
    np.testing.assert_allclose(module.net.norm.mean[...], state["norm"]["mean"], rtol=1e-4, atol=1e-6)


def test_frozen_weights_get_no_gradient_and_are_shared() -> None:
    model, frozen, lora = setting()
    module = model.as_nnx(frozen, lora)
    assert module.net.layers[0].kernel.get_value() is frozen["layers"][0]["kernel"]
    grads = nnx.jit(nnx.grad(lambda module: loss(module(IDS)), argnums=nnx.DiffState(0, nnx.Param)))(module)
    for path, grad in nnx.to_flat_state(grads):
        moves = path[-1] == "lora_b" or path == ("net", "layers", 1, "bias")  # lora_a does not yet, as lora_b is zero
        assert (np.linalg.norm(grad[...]) > 0) == moves, path


def test_methods_run_adapted_and_attributes_pass_through() -> None:
    model, frozen, lora = setting()
    lora = trained(lora)
    module = model.as_nnx(frozen, lora)
    expected = model.apply(frozen, lora, IDS, method="features")
    for features in (module.features(IDS), module(IDS, method="features")):
        assert_same_bits(features, expected)
    assert module.layers is module.net.layers
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


def test_eval_turns_dropout_off_in_the_net_and_in_the_adapters() -> None:
    model, frozen, lora = setting(dropout=0.5)
    module = model.as_nnx(frozen, trained(lora), rngs=nnx.Rngs(dropout=1))
    assert not np.array_equal(module.features(IDS), module.features(IDS))
    module.eval()
    assert module.net.dropout.deterministic and module.net.norm.use_running_average
    assert_same_bits(module.features(IDS), module.features(IDS))
    assert_same_bits(module(IDS), module(IDS))


def test_adapters_take_the_axis_names_of_their_weight() -> None:
    model, frozen, lora = setting()
    module = model.as_nnx(frozen, lora)
    specs = nnx.get_partition_spec(nnx.state(module, nnx.LoRAParam))["lora"]["layers"]["0"]["kernel"]
    assert specs["lora_a"].get_value() == jax.sharding.PartitionSpec(None, None)
    assert specs["lora_b"].get_value() == jax.sharding.PartitionSpec(None, "model")


def test_what_the_net_calls_lora_param_itself_is_frozen() -> None:
    net = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    model = lojax.wrap(net, "kernel", rank=2)
    x = jnp.ones((1, 4))
    module = model.as_nnx(*model.init(jax.random.key(0), model.params, x))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.LoRAParam))]
    assert paths == [("lora", "kernel", "lora_a"), ("lora", "kernel", "lora_b")]
    assert_same_bits(module(x), net(x))


def test_other_nets_are_refused() -> None:
    model = lojax.wrap(lambda params, x: x @ params["w"], "w", rank=1)
    frozen, lora = model.init(jax.random.key(0), {"w": jnp.ones((3, 2))})
    text = message(TypeError, model.as_nnx, frozen, lora)
    assert text.startswith("as_nnx is for NNX modules, and this net is a plain function.") and "optax" in text
