"""A quantized base on a mesh: what is stored is sharded like the axes of the weight that it stands for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lojax
from lojax.quantized.formats import KINDS
from lojax.sharding import shardings

SPECS = {"stack": P(None, "fsdp", "tensor"), "out": P("tensor", "fsdp")}


def net(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0] @ p["out"]


def params():
    rng = np.random.default_rng(0)
    return {
        "stack": jnp.asarray(rng.normal(size=(3, 128, 256)) / 8, jnp.float32)[:, :, :128],
        "out": jnp.asarray(rng.normal(size=(128, 384)) / 8, jnp.float32),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_mesh_is_the_step_on_one_device(kind):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    model = lojax.wrap(net, ["stack", "out"], rank=2, alpha=4)
    x = jax.random.normal(jax.random.key(1), (8, 128))
    frozen, lora = model.init(jax.random.key(0), lojax.quantize(params(), kind), x)
    lora = jax.tree.map(lambda v: v + jnp.asarray(0.02, v.dtype), lora)

    def step(frozen, lora, x):
        return jax.value_and_grad(lambda v: jnp.mean(jnp.sin(model.apply(frozen, v, x))))(lora)

    expected = jax.jit(step)(frozen, lora, x)
    placed = shardings(frozen, lora, mesh=mesh, specs=SPECS)
    assert jax.tree.structure(placed.frozen) == jax.tree.structure(frozen)
    on_mesh = jax.device_put(frozen, placed.frozen), jax.device_put(lora, placed.lora)
    codes = on_mesh[0]["stack"].arrays["codes"]
    assert codes.sharding.spec == P(None, "fsdp", "tensor")
    assert codes.addressable_shards[0].data.size == codes.size // 4, "every device holds its quarter"
    actual = jax.jit(step)(*on_mesh, jax.device_put(x, NamedSharding(mesh, P("fsdp"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), actual, expected)
    # Read back from the arrays, as a user does who places them himself.
    again = shardings(*on_mesh)
    assert again.lora["stack"].a.spec == placed.lora["stack"].a.spec == P(None, "fsdp", None)


def explicit_net(p, x):
    """As JAX wants it where the types of arrays say how they are sharded."""

    def layer(x, w):
        y = jnp.tanh(jnp.matmul(x, w, out_sharding=P("fsdp", "tensor")))
        return jax.sharding.reshard(y, P("fsdp", None)), None

    x = lax.scan(layer, x, p["stack"])[0]
    return jnp.matmul(x, p["out"], out_sharding=P("fsdp", None))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_mesh_of_explicit_axes(kind, double):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Explicit,) * 2, devices=jax.devices())
    # Inferred from the net of one device: `matmul` wants the mesh for its output.
    model = lojax.wrap(net, ["stack", "out"], rank=2, alpha=4)
    x = jax.random.normal(jax.random.key(1), (8, 128))
    frozen, lora = model.init(jax.random.key(0), lojax.quantize(params(), kind, double=double), x)
    lora = jax.tree.map(lambda v: v + jnp.asarray(0.02, v.dtype), lora)

    def step(apply, frozen, lora, x):
        return jax.value_and_grad(lambda v: jnp.mean(jnp.sin(apply(frozen, v, x))))(lora)

    expected = jax.jit(lambda *args: step(model.apply, *args))(frozen, lora, x)
    placed = shardings(frozen, lora, mesh=mesh, specs=SPECS)
    on_mesh = jax.device_put(frozen, placed.frozen), jax.device_put(lora, placed.lora)
    adapted = lojax.transform(explicit_net)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *args: step(adapted, *args))
        actual = run(*on_mesh, jax.device_put(x, NamedSharding(mesh, P("fsdp"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), actual, expected)


def test_scales_that_the_mesh_does_not_divide_are_replicated():
    mesh = jax.make_mesh((4,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:4])
    frozen, lora = lojax.init(jax.random.key(0), lojax.quantize(params(), "nf4", double=False), "out", rank=2)
    arrays = shardings(frozen, lora, mesh=mesh, specs={"out": P(None, "tensor")}).frozen["out"].arrays
    assert arrays["codes"].spec == P(None, "tensor")  # 192 bytes a row
    assert arrays["scales"].spec == P(None, None)  # 6 blocks a row


def test_the_report_says_how_weights_are_stored():
    model = lojax.wrap(net, ["stack", "out"], rank=2)
    frozen, lora = model.init(jax.random.key(0), lojax.quantize(params(), "int8", "out"), jnp.ones((2, 128)))
    text = str(model.report(frozen, lora, jnp.ones((2, 128))))
    assert "1 of 2 adapted weights stored as int8 (8.25 bits)" in text
    assert "not kept" in text
