"""The specs of weights: from the user, from boxes, from arrays; and those that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import lojax
from lojax.sharding.shardings import shardings

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)


def test_user_specs_win_and_cover_whole_branches():
    mesh = mesh_of()
    params = {"block": {"q": jnp.ones((8, 4)), "k": jnp.ones((8, 4))}, "out": jnp.ones((4, 8))}
    frozen, lora = lojax.init(jax.random.key(0), params, "**", rank=2)
    found = shardings(frozen, lora, mesh=mesh, specs={"block": P("fsdp", "tensor"), "out": P(("tensor", "fsdp"))})
    assert found.lora["block"]["k"].a.spec == P("fsdp", None) and found.lora["block"]["q"].b.spec == P(None, "tensor")
    assert found.lora["out"].a.spec == P(("tensor", "fsdp"), None)


def test_linen_boxes_and_logical_names():
    mesh = mesh_of()

    class Net(nn.Module):
        boxed: object

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, kernel_init=self.boxed(nn.initializers.lecun_normal()))(x)

    x = jnp.ones((2, 8))
    for boxed, rules in (
        (lambda f: nn.with_partitioning(f, ("fsdp", "tensor")), None),
        (lambda f: nn.with_logical_partitioning(f, ("embed", "heads")), (("embed", "fsdp"), ("heads", "tensor"))),
    ):
        module = Net(boxed)
        variables = module.init(jax.random.key(0), x)
        model = lojax.wrap(module, "**/kernel", rank=2)
        frozen, lora = model.init(jax.random.key(1), variables, x)
        found = shardings(frozen, lora, optax.adam(1e-3).init(lora), mesh=mesh, rules=rules)
        adapter = found.lora["params"]["Dense_0"]["kernel"]
        assert adapter.a.value.spec == P("fsdp", None) and adapter.b.value.spec == P(None, "tensor")
        placed = jax.device_put(lora, found.lora)
        assert jax.tree.structure(placed) == jax.tree.structure(lora)
        moment = found.opt_state[0].mu["params"]["Dense_0"]["kernel"]
        assert moment.a.value.spec == P("fsdp", None)


def test_nnx_metadata():
    mesh = mesh_of()
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        module = nnx.Linear(8, 4, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
    model = lojax.wrap(module, "kernel", rank=2)
    frozen, lora = model.init(jax.random.key(1), model.params, jnp.ones((2, 8)))
    for found in (
        shardings(frozen, lora),
        shardings(*jax.tree.map(np.asarray, (frozen, lora)), mesh=mesh, specs=module),
    ):
        assert found.lora["kernel"].a.spec == P("fsdp", None) and found.lora["kernel"].b.spec == P(None, "tensor")


BAD = {
    "does not divide": (
        lambda: shardings(*lojax.init(jax.random.key(0), {"w": jnp.ones((6, 9))}, "w", rank=2), mesh=mesh_of(),
                          specs={"w": P(None, "tensor")}),
        r"w: axis 1 of shape \(6, 9\) is sharded over tensor = 2 devices, but 9 is not a multiple of 2",
    ),
    "unknown axis": (
        lambda: shardings(*lojax.init(jax.random.key(0), {"w": jnp.ones((6, 8))}, "w", rank=2), mesh=mesh_of(),
                          specs={"w": P("model")}),
        r"w is sharded over the mesh axis 'model', but the mesh has",
    ),
    "no such path": (
        lambda: shardings(*lojax.init(jax.random.key(0), {"w": jnp.ones((6, 8))}, "w", rank=2), mesh=mesh_of(),
                          specs={"v": P("fsdp")}),
        r"specs holds 'v', but the parameters have no such path",
    ),
    "too many entries": (
        lambda: shardings(*lojax.init(jax.random.key(0), {"w": jnp.ones((6, 8))}, "w", rank=2), mesh=mesh_of(),
                          specs={"w": P(None, None, "fsdp")}),
        r"has 3 entries for a weight of shape",
    ),
    "no mesh": (
        lambda: shardings(*lojax.init(jax.random.key(0), {"w": jnp.ones((6, 8))}, "w", rank=2)),
        r"No mesh: no weight is sharded over one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_specs_of_another_kind():
    trees = lojax.init(jax.random.key(0), {"w": jnp.ones((6, 8))}, "w", rank=2)
    with pytest.raises(TypeError, match="expected a PartitionSpec or a NamedSharding"):
        shardings(*trees, mesh=mesh_of(), specs={"w": "fsdp"})
