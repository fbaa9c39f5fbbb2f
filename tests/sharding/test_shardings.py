"""Adapters and optimizer state lie as the weights do."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lojax
from lojax.planner.collectives import traffic
from lojax.sharding.shardings import Placement, init_sharded, shardings

pytestmark = pytest.mark.optimized(False)  # collectives are placed before the optimizations that this leaves out

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)


def put(mesh, x, *spec, **kind):
    return jax.device_put(x, NamedSharding(mesh, P(*spec), **kind))


def weights(mesh):
    """A scanned stack of attention kernels [L, D, H, K] -> [L, H, K, D], and a head trained in full."""
    key = jax.random.key(0)
    return {
        "q": put(mesh, 0.3 * jax.random.normal(key, (3, 8, 4, 6)), None, "fsdp", "tensor"),
        "o": put(mesh, 0.3 * jax.random.normal(key, (3, 4, 6, 8)), None, "tensor", None, "fsdp"),
        "head": put(mesh, jax.random.normal(key, (8, 10)), "fsdp", "tensor"),
        "norm": put(mesh, jnp.ones(8)),
    }


def net(params, x):
    def layer(x, w):
        h = jnp.einsum("bd,dhk->bhk", x * params["norm"], w["q"])
        return x + jnp.einsum("bhk,hkd->bd", h, w["o"]), None

    x, _ = jax.lax.scan(layer, x, {"q": params["q"], "o": params["o"]})
    return x @ params["head"]


def wrapped():
    return lojax.wrap(net, ["q", "o"], rank=2, train="head", strict=True)


def test_factors_lie_as_the_axes_of_their_weight():
    mesh = mesh_of()
    frozen, lora = wrapped().init(jax.random.key(1), weights(mesh), jnp.ones((2, 8)))
    found = shardings(frozen, lora)
    assert found.lora["q"].a.spec == P(None, "fsdp", None)
    assert found.lora["q"].b.spec == P(None, None, "tensor", None)
    assert found.lora["o"].a.spec == P(None, "tensor", None, None)
    assert found.lora["o"].b.spec == P(None, None, "fsdp")
    assert found.lora["head"].spec == P("fsdp", "tensor") and found.frozen["head"] is None
    assert found.frozen["q"].spec == P(None, "fsdp", "tensor", None)
    assert jax.tree.structure(found.lora) == jax.tree.structure(lora)
    assert jax.tree.structure(found.frozen) == jax.tree.structure(frozen)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "multi_transform": lambda: optax.multi_transform({"x": optax.adam(1e-3)}, lambda t: jax.tree.map(lambda _: "x", t)),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "ema": lambda: optax.chain(optax.trace(0.9), optax.ema(0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_as_what_they_are_moments_of(name):
    mesh = mesh_of()
    frozen, lora = wrapped().init(jax.random.key(1), weights(mesh), jnp.ones((2, 8)))
    state = OPTIMIZERS[name]().init(lora)
    found = shardings(frozen, lora, state)
    assert jax.tree.structure(found.opt_state) == jax.tree.structure(state)
    by_shape = {x.shape: s for x, s in zip(*map(jax.tree.leaves, (lora, found.lora)), strict=True)}
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found.opt_state), strict=True):
        if leaf.shape in by_shape:
            assert sharding == by_shape[leaf.shape], leaf.shape
        elif leaf.ndim == 0:
            assert sharding.spec == P()
    if name != "adafactor":
        assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state)) >= len(jax.tree.leaves(lora))


def test_factored_moments_keep_the_axes_that_are_left():
    mesh = mesh_of()
    frozen, lora = wrapped().init(jax.random.key(1), weights(mesh), jnp.ones((2, 8)))
    state = optax.adafactor(1e-3, min_dim_size_to_factor=4).init(lora)
    found = shardings(frozen, lora, state).opt_state
    rows, columns = state[0].v_row["head"], state[0].v_col["head"]
    assert {(rows.shape, found[0].v_row["head"].spec), (columns.shape, found[0].v_col["head"].spec)} == {
        ((8,), P("fsdp")),
        ((10,), P("tensor")),
    }


def test_optimizer_state_of_a_combined_tree():
    mesh = mesh_of()
    frozen, lora = wrapped().init(jax.random.key(1), weights(mesh), jnp.ones((2, 8)))
    state = lojax.optimizer(optax.adam(1e-3)).init({"frozen": frozen, "lora": lora})
    found = shardings(frozen, lora, state).opt_state
    got = {s.spec for s in jax.tree.leaves(found)}
    assert P(None, "fsdp", None) in got and P("fsdp", "tensor") in got


def test_init_makes_adapters_in_place_and_moves_no_weight():
    mesh = mesh_of()
    params, model, x = weights(mesh), wrapped(), jnp.ones((2, 8))
    frozen, lora = init_sharded(model, jax.random.key(1), params, x)
    assert lora["q"].a.sharding.spec == P(None, "fsdp", None)
    assert lora["q"].b.sharding.spec == P(None, None, "tensor", None)
    pointer = lambda x: x.addressable_shards[0].data.unsafe_buffer_pointer()
    assert pointer(frozen["q"]) == pointer(params["q"])  # the weight itself, no copy
    wanted = shardings(frozen, lora).lora
    start = jax.jit(lambda key, params: model.init(key, params, x), out_shardings=(None, wanted))
    assert traffic(start.lower(jax.random.key(1), params).compile().as_text()).collectives == ()
    for got, want in zip(
        jax.tree.leaves(lora), jax.tree.leaves(model.init(jax.random.key(1), params, x)[1]), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)  # under jit, one rounding less in uniform()


def test_spread_lays_factors_over_unused_axes():
    mesh = mesh_of()
    frozen, lora = wrapped().init(jax.random.key(1), weights(mesh), jnp.ones((2, 8)))
    found = shardings(frozen, lora, optax.adam(1e-3).init(lora), spread=True)
    assert found.lora["q"].a.spec == P(None, ("fsdp", "data", "tensor"), None)
    shares = [
        np.prod(s.shard_shape(x.shape)) / x.size for x, s in zip(*map(jax.tree.leaves, (lora, found.lora)), strict=True)
    ]
    assert min(shares) == 1 / 8 and found.opt_state[0].mu["q"].a == found.lora["q"].a


def test_sharded_step_equals_the_single_device_step():
    mesh = mesh_of()
    params, model = weights(mesh), wrapped()
    x = jax.random.normal(jax.random.key(3), (8, 8))
    frozen, lora = init_sharded(model, jax.random.key(1), params, x)
    lora = jax.tree.map(lambda t: t + 0.01, lora)
    tx = optax.sgd(0.1)

    def step(frozen, lora, state, x):
        loss, grads = jax.value_and_grad(lambda t: (model.apply(frozen, t, x) ** 2).mean())(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    host = lambda tree: jax.tree.map(lambda t: jax.device_put(np.asarray(t), jax.devices()[0]), tree)
    want, _, loss = jax.jit(step)(host(frozen), host(lora), tx.init(lora), x)
    found = shardings(frozen, lora, tx.init(lora))
    donated = jax.jit(step, donate_argnums=(1, 2), out_shardings=(found.lora, found.opt_state, None))
    before = lora
    got, _, got_loss = donated(frozen, lora, tx.init(lora), put(mesh, x, ("data", "fsdp")))
    assert before["q"].a.is_deleted()  # donated
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert got["q"].a.sharding == found.lora["q"].a


def test_under_shard_map():
    mesh = mesh_of()
    params, model = weights(mesh), wrapped()
    x = jax.random.normal(jax.random.key(3), (8, 8))
    frozen, lora = init_sharded(model, jax.random.key(1), params, x)
    lora = jax.tree.map(lambda t: t + 0.01, lora)
    whole = jax.tree.map(lambda _: P(), (frozen, lora))
    f = jax.shard_map(model.apply, mesh=mesh, in_specs=(*whole, P("data")), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(f)(frozen, lora, x), model.apply(frozen, lora, x), rtol=1e-5, atol=1e-5)


def test_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit)
    params = {"w": put(mesh, jax.random.normal(jax.random.key(0), (8, 4)), None, "tensor")}
    f = lambda params, x: x @ params["w"]
    model = lojax.wrap(f, "w", rank=2, strict=True)
    with jax.set_mesh(mesh):
        x = put(mesh, jax.random.normal(jax.random.key(1), (8, 8)), "data")
        frozen, lora = init_sharded(model, jax.random.key(2), params, x)
        assert lora["w"].b.sharding.spec == P(None, "tensor")
        lora = jax.tree.map(lambda t: t + jnp.ones_like(t), lora)
        y = jax.jit(model.apply)(frozen, lora, x)
        assert jax.typeof(y).sharding.spec == P("data", "tensor")
        np.testing.assert_allclose(y, f(model.merge(frozen, lora), x), rtol=1e-4, atol=1e-4)
        grads = jax.jit(jax.grad(lambda t: (model.apply(frozen, t, x) ** 2).sum()))(lora)
    assert grads["w"].b.sharding.spec == P(None, "tensor")


def test_a_magnitude_along_a_summed_axis_of_an_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit)
    f = lambda params, x: x @ params["w"]
    model = lojax.wrap(f, "w", rank=2, axes=("out", "in"), variant="dora", strict=True)
    with jax.set_mesh(mesh):
        params = {"w": put(mesh, jax.random.normal(jax.random.key(0), (8, 4)), "tensor")}
        x = put(mesh, jax.random.normal(jax.random.key(1), (8, 8)), "data")
        frozen, lora = init_sharded(model, jax.random.key(2), params, x)
        assert lora["w"].magnitude.sharding.spec == P("tensor")
        lora = jax.tree.map(lambda t: t + jnp.ones_like(t), lora)
        y = jax.jit(model.apply)(frozen, lora, x)
        assert jax.typeof(y).sharding.spec == jax.typeof(f(params, x)).sharding.spec
        np.testing.assert_allclose(y, f(model.merge(frozen, lora), x), rtol=1e-4, atol=1e-4)


def test_a_magnitude_along_merged_axes_of_an_explicit_mesh():
    """Two sharded out axes become one, beside an axis of length one, and are summed: found by a random program."""
    mesh = mesh_of(AxisType.Explicit)
    f = lambda p, x: jax.vmap(lambda w: jnp.einsum("xabc,abc->x", x, w.reshape(w.shape[0] * w.shape[1], 2, 2) * 0.5))(
        p["w"]
    )
    model = lojax.wrap(f, "w", rank=1, axes=("stack", "out", "out", "in", "in"), variant="dora")
    x = jax.random.normal(jax.random.key(1), (3, 8, 2, 2))  # made outside of the mesh
    with jax.set_mesh(mesh):
        params = {"w": put(mesh, jax.random.normal(jax.random.key(0), (1, 4, 2, 2, 2)), None, "data", "tensor")}
        frozen, lora = model.init(jax.random.key(2), params, x)
        lora = jax.tree.map(lambda t: t + jnp.ones_like(t), lora)
        y = jax.jit(model.apply)(frozen, lora, x)
        np.testing.assert_allclose(y, f(model.merge(frozen, lora), x), rtol=1e-4, atol=1e-4)


def test_a_scale_by_channel_that_lies_on_an_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit)
    lying = NamedSharding(mesh, P("data", "tensor"))
    scales = lambda: jax.lax.broadcast_in_dim(jnp.arange(4.0), (8, 4), (1,), out_sharding=lying)
    f = lambda params, x: x @ (params["w"] * scales())
    model = lojax.wrap(f, "w", rank=2, strict=True)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (8, 4)), lying)}
        x = jax.random.normal(jax.random.key(1), (8, 8))
        frozen, lora = init_sharded(model, jax.random.key(2), params, x)
        lora = jax.tree.map(lambda t: t + jnp.ones_like(t), lora)
        y = jax.jit(model.apply)(frozen, lora, x)
        np.testing.assert_allclose(y, f(model.merge(frozen, lora), x), rtol=1e-4, atol=1e-4)


def test_frozen_weights_on_the_host():
    mesh = mesh_of()
    params = weights(mesh)

    def fetching(params, x):
        def layer(x, w):
            w = jax.tree.map(lambda t: jax.device_put(t, jax.memory.Space.Device), w)
            h = jnp.einsum("bd,dhk->bhk", x, w["q"])
            return x + jnp.einsum("bhk,hkd->bd", h, w["o"]), None

        return jax.lax.scan(layer, x, {"q": params["q"], "o": params["o"]})[0]

    model = lojax.wrap(fetching, ["q", "o"], rank=2, strict=True)
    params = {name: params[name] for name in ("q", "o")}
    x = put(mesh, jax.random.normal(jax.random.key(3), (8, 8)), ("data", "fsdp"))
    frozen, lora = init_sharded(model, jax.random.key(1), params, x)
    lora = jax.tree.map(lambda t: t + 0.01, lora)
    found = shardings(frozen, lora, memory_kind="pinned_host")
    away = jax.device_put(frozen, found.frozen)
    assert away["q"].sharding.memory_kind == "pinned_host" and found.lora["q"].a.memory_kind != "pinned_host"
    loss = lambda frozen, t: (model.apply(frozen, t, x) ** 2).mean()
    got, want = (jax.jit(jax.value_and_grad(loss, argnums=1))(tree, lora) for tree in (away, frozen))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_magnitude_lies_as_the_outputs():
    """What an adapter holds besides its factors has one value for each output; several adapters lead."""
    mesh = mesh_of()
    _, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, "w", rank=2)
    place = Placement(mesh, {"w": P("fsdp", "tensor")}, False)
    assert place.array_entries(SimpleNamespace(axes=("in", "out"), magnitude=jnp.ones(4)), "magnitude", "w") == [
        "tensor"
    ]
    several = dataclasses.replace(lora["w"], a=jnp.ones((5, 8, 2)), b=jnp.ones((5, 2, 4)))
    assert place.shard_leaf("w", several).a.spec == P(None, "fsdp", None)
    assert place.shard_leaf("w", several).b.spec == P(None, None, "tensor")
