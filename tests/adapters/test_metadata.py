"""Boxes: no part of a path, kept on every round trip, and they name the axes of the factors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct
from flax.core.meta import AxisMetadata
from jax.sharding import PartitionSpec as P

import lojax
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten
from tests.helpers import assert_same_bits, trained

KINDS = [nn.Partitioned, nn.LogicallyPartitioned]


class Net(nn.Module):
    kind: type

    @nn.compact
    def __call__(self, x):
        def boxed(init, names):
            wrapper = nn.with_partitioning if self.kind is nn.Partitioned else nn.with_logical_partitioning
            return wrapper(init, names)

        kernel = boxed(nn.initializers.lecun_normal(), ("embed", "heads", "kv"))
        x = nn.DenseGeneral(
            (2, 4), kernel_init=kernel, bias_init=boxed(nn.initializers.zeros, ("heads", "kv")), name="query"
        )(x)
        return nn.Dense(3, name="head")(x.reshape(*x.shape[:-2], 8))


@functools.cache
def setup(kind):
    """The net, its model, its variables, a trained pair, and inputs."""
    net, x = Net(kind), jnp.linspace(-1, 1, 30).reshape(5, 6)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    assert isinstance(variables["params"]["query"]["kernel"], kind)
    model = lojax.wrap(net, "params/query/kernel", rank=2, alpha=4, train=["params/query/bias"], strict=True)
    frozen, lora = model.init(jax.random.key(1), variables, x)
    return net, model, variables, frozen, trained(lora), x


@pytest.mark.parametrize("kind", KINDS)
def test_paths_are_those_without_the_box(kind):
    _, _, variables, frozen, lora, _ = setup(kind)
    for tree in (variables, frozen, lora):
        assert set(flatten(tree)) == {
            "params/query/kernel",
            "params/query/bias",
            "params/head/kernel",
            "params/head/bias",
        }


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_survive_the_round_trip(kind):
    net, model, variables, frozen, lora, x = setup(kind)
    assert type(frozen["params"]["query"]["kernel"]) is kind
    assert type(lora["params"]["query"]["bias"]) is kind
    merged = model.merge(frozen, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(variables)
    np.testing.assert_allclose(net.apply(merged, x), model.apply(frozen, lora, x), rtol=1e-5, atol=1e-6)
    assert not np.allclose(net.apply(merged, x), net.apply(variables, x), atol=1e-2)
    back = lojax.unmerge(merged, lora)
    assert type(back["params"]["query"]["kernel"]) is kind
    np.testing.assert_allclose(
        unbox(back["params"]["query"]["kernel"]), unbox(variables["params"]["query"]["kernel"]), atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_inherit_the_axis_names(kind):
    _, _, _, _, lora, _ = setup(kind)
    adapter = lora["params"]["query"]["kernel"]
    assert type(adapter.a) is type(adapter.b) is kind
    assert adapter.a.names == ("embed", None)
    assert adapter.b.names == (None, "heads", "kv")
    specs = nn.get_partition_spec(lora)["params"]["query"]
    assert (specs["kernel"].a, specs["kernel"].b, specs["bias"]) == (
        P("embed", None),
        P(None, "heads", "kv"),
        P("heads", "kv"),
    )


def test_a_stack_keeps_its_name_on_both_factors():
    params = {"w": nn.Partitioned(jnp.ones((3, 4, 5)), names=("layers", "embed", "mlp"))}
    _, lora = lojax.init(jax.random.key(0), params, "w", rank=2, axes=("stack", "in", "out"))
    assert lora["w"].a.names == ("layers", "embed", None)
    assert lora["w"].b.names == ("layers", None, "mlp")
    assert lora["w"].rank == 2


def test_what_else_a_box_carries_is_kept():
    rules = (("embed", "x"),)
    params = {"w": nn.LogicallyPartitioned(np.ones((4, 5), np.float32), names=("embed", "mlp"), rules=rules)}
    _, lora = lojax.init(jax.random.key(0), params, "w", rank=2)
    assert lora["w"].a.rules == lora["w"].b.rules == rules


def test_names_of_fewer_axes_leave_the_rest_unnamed():
    params = {"w": nn.Partitioned(jnp.ones((4, 5, 6)), names=("embed",))}
    _, lora = lojax.init(jax.random.key(0), params, "w", rank=2, axes=("in", "out", "out"))
    assert lora["w"].a.names == ("embed", None)
    assert lora["w"].b.names == (None, None, None)


def test_a_gradient_step_keeps_boxes():
    _, model, _, frozen, lora, x = setup(nn.Partitioned)
    grads = jax.grad(lambda lora: model.apply(frozen, lora, x).sum())(lora)
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    assert np.abs(unbox(grads["params"]["query"]["kernel"].b)).max() > 0


def test_unbox_and_rebox():
    box = nn.Partitioned(jnp.zeros(2), names=("x",))
    assert_same_bits(unbox(rebox(box, jnp.ones(2))), jnp.ones(2))
    assert rebox(box, jnp.ones(2)).names == ("x",)
    assert unbox(3) == 3
    assert rebox(None, 3) == 3


@struct.dataclass
class OwnBox(AxisMetadata):
    """A box of a kind that lojax has never heard of."""

    inside: Any

    def unbox(self):
        return self.inside

    def replace_boxed(self, value):
        return self.replace(inside=value)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def test_a_box_of_any_other_kind_stays_around_the_weight():
    params = {"w": OwnBox(np.ones((4, 5), np.float32))}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2)
    assert lora["w"].a.shape == (4, 2)
    merged = lojax.merge(frozen, trained(lora))
    assert type(merged["w"]) is OwnBox
    assert not np.allclose(merged["w"].inside, params["w"].inside)
