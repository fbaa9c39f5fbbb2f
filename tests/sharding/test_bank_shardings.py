"""Banks on a mesh: every device holds all adapters, or each its share, and a mixed batch is what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lojax
from lojax.sharding import check_agreement, shardings
from tests.checkpoint import bank_cases
from tests.helpers import message, trained

P = PartitionSpec
KEY = jax.random.key(0)


def mesh_of():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def params():
    return {"up": jax.random.normal(KEY, (8, 16)), "down": jax.random.normal(KEY, (16, 8)), "head": jnp.ones((8, 6))}


SPECS = {"up": P(None, "tensor"), "down": P("tensor", None), "head": P(None, "tensor")}


def net(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"] @ params["head"]


def pair(train=(), count=4):
    model = lojax.wrap(net, ["up", "down"], train=train)
    loras = []
    for i in range(count):
        frozen, lora = lojax.init(KEY, params(), ["up", "down"], rank=1 + i % 3, alpha=i + 1, train=train)
        loras.append(trained(lora, i))
    return model, frozen, lojax.stack(loras)


def test_the_axis_of_the_bank_is_replicated_and_the_rest_as_for_one_adapter():
    _, frozen, bank = pair(train="head")
    found = shardings(frozen, bank, mesh=mesh_of(), specs=SPECS).lora
    one = shardings(frozen, bank[0], mesh=mesh_of(), specs=SPECS).lora
    assert jax.tree.structure(found) == jax.tree.structure(bank)
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
        assert got.spec == P(None, *expected.spec)
    assert found.lora["up"].b.spec == P(None, None, "tensor") and found.lora["head"].spec == P(None, None, "tensor")


def test_over_a_mesh_axis_on_request_and_the_state_of_an_optimizer():
    _, frozen, bank = pair(train="head")
    for tx in (optax.adam(1e-3), lojax.optimizer(optax.adam(1e-3))):
        state = jax.eval_shape(tx.init, bank)
        found = shardings(frozen, bank, state, mesh=mesh_of(), specs=SPECS, bank_axis="data")
        assert {s.spec[0] for s in jax.tree.leaves(found.lora)} == {"data"}
        specs = [s.spec for s in jax.tree.leaves(found.lora)]
        moments = [s.spec for s in jax.tree.leaves(found.opt_state) if len(s.spec)]
        assert moments == specs * 2
        placed = jax.device_put(bank, found.lora)
        assert {x.sharding.shard_shape(x.shape)[0] for x in jax.tree.leaves(placed)} == {1}
        np.testing.assert_array_equal(placed.lora["up"].a, bank.lora["up"].a)


def test_spread_leaves_the_axis_of_the_bank_alone():
    _, frozen, bank = pair(count=8)
    for found in (
        shardings(frozen, bank, mesh=mesh_of(), specs=SPECS, spread=True).lora,
        shardings(frozen, bank, mesh=mesh_of(), spread=True).lora,
    ):
        assert {s.spec[0] for s in jax.tree.leaves(found)} == {None}
        assert all("data" in str(s.spec) for s in jax.tree.leaves(found))
    both = shardings(frozen, bank, mesh=mesh_of(), specs=SPECS, spread=True, bank_axis="data").lora
    assert {s.spec[0] for s in jax.tree.leaves(both)} == {"data"}


def test_shardings_are_read_from_boxes_and_from_arrays():
    mesh = mesh_of()
    _, frozen, bank = pair(train="head")
    placed = jax.device_put(frozen, shardings(frozen, bank, mesh=mesh, specs=SPECS).frozen)
    placed_bank = jax.device_put(bank, shardings(frozen, bank, mesh=mesh, specs=SPECS, bank_axis="data").lora)
    found = shardings(placed, placed_bank)
    assert found.frozen["up"].spec == P(None, "tensor") and found.lora.lora["head"].spec == P(None, None, "tensor")
    boxed_frozen, boxed = bank_cases.boxed()
    rules = [("embed", None), ("mlp", "tensor"), ("x", "tensor")]
    leaf = shardings(boxed_frozen, boxed, mesh=mesh, rules=rules).lora.lora["w"]
    assert leaf.b.value.spec == P(None, None, "tensor")


def test_what_cannot_be_is_refused_with_the_remedy():
    _, frozen, bank = pair()
    mesh = mesh_of()
    text = message(ValueError, shardings, frozen, bank, mesh=mesh, specs=SPECS, bank_axis="tensor")
    assert text.startswith("down is sharded over the mesh axis 'tensor', and so is the bank by bank_axis='tensor'")
    assert "no 'ten" not in message(ValueError, shardings, frozen, bank, mesh=mesh, bank_axis="tenso")
    small = lojax.stack(lojax.unstack(bank)[:3])
    assert "3 is not a multiple of 4" in message(ValueError, shardings, frozen, small, mesh=mesh, bank_axis="data")
    text = message(ValueError, shardings, frozen, bank[0], mesh=mesh, bank_axis="data")
    assert "is for a bank, and lora is one adapter" in text


@pytest.mark.parametrize("bank_axis", [None, "data"])
def test_a_mixed_batch_with_sharded_rows(bank_axis):
    """Against a loop over the rows on one device, forward and gradient."""
    mesh = mesh_of()
    model, frozen, bank = pair()
    x, ids = jax.random.normal(KEY, (16, 8)), np.arange(16) % 5 - 1
    placed = shardings(frozen, bank, mesh=mesh, specs=SPECS, bank_axis=bank_axis)
    rows = NamedSharding(mesh, P("data"))
    arguments = (
        jax.device_put(frozen, placed.frozen),
        jax.device_put(bank, placed.lora),
        jax.device_put(x, rows),
        jax.device_put(jnp.asarray(ids), rows),
    )

    def loss(frozen, bank, x, ids):
        return jnp.sum(jnp.sin(model.apply(frozen, bank, x, adapter=ids)))

    apply = jax.jit(lambda frozen, bank, x, ids: model.apply(frozen, bank, x, adapter=ids))
    got = apply(*arguments)
    expected = [model.apply(frozen, None if i < 0 else bank[i], x[k : k + 1])[0] for k, i in enumerate(ids)]
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-5, atol=1e-4)
    assert got.sharding.shard_shape(got.shape)[0] == 4
    gradient = jax.jit(jax.grad(loss, 1))(*arguments)
    for i, one in enumerate(bank):
        mine = jax.grad(lambda lora: jnp.sum(jnp.sin(model.apply(frozen, lora, x[ids == i]))))(one)
        for a, b in zip(jax.tree.leaves(jax.device_get(gradient)[i]), jax.tree.leaves(mine), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_agreement_between_processes_sees_scales_and_ranks():
    _, _, bank = pair()
    other = lojax.stack([lojax.rescale(one, 2.0) for one in bank])
    sent = []
    check_agreement(bank, gather=lambda text: sent.append(text) or [text])
    text = message(ValueError, check_agreement, other, gather=lambda text: [*sent, text])
    assert text.startswith("down differs between processes: process 0: scales and ranks [(1.0, 1), (1.0, 2)")


@pytest.mark.parametrize("spec", [P(), P("data")], ids=str)
def test_a_mixed_batch_on_a_mesh_of_explicit_axes(spec):
    model, frozen, bank = pair()
    x, ids = jax.random.normal(KEY, (4, 3, 8)), jnp.array([2, 0, -1, 3])

    def run(frozen, bank, x, ids):
        return jax.value_and_grad(lambda b: jnp.sum(jnp.sin(model.apply(frozen, b, x, adapter=ids))))(bank)

    expected, expected_gradient = run(frozen, bank, x, ids)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = {"up": P(), "down": P(None, "tensor"), "head": P()}
        sharded = {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in frozen.items()}
        replicated = jax.device_put(bank, NamedSharding(mesh, P()))
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        got, gradient = jax.jit(run)(sharded, replicated, rows, jax.device_put(ids, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-5)
