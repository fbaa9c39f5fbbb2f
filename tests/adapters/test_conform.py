"""`conform`: the same update in the form of another adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lojax
from tests.adapters.test_stack import AXES, PARAMS, adapter, same


def update(lora, path="stack"):
    leaf = lora[path]
    scale = np.asarray(leaf.scale, np.float64).reshape(-1, 1, 1)
    return scale * (np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64))


def test_the_update_stays_and_the_form_is_that_of_like():
    lora, like = adapter(0, 2, 6), adapter(1, 4, 8)
    got = lojax.conform(lora, like)
    assert jax.tree.structure(got) == jax.tree.structure(like)
    np.testing.assert_allclose(update(got), update(lora), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got["stack"].a[..., 2:], 0)


def test_an_adapter_of_that_form_is_not_touched():
    lora = adapter(0, 2, 6)
    same(lojax.conform(lora, adapter(1, 2, 6)), lora)


def test_a_missing_target_is_zero():
    got = lojax.conform(adapter(0, 2, 6, ("stack",)), adapter(1, 4, 8))
    assert not got["layer"]["kernel"].a.any() and not got["layer"]["kernel"].b.any()


def test_dora_and_full_leaves_and_dtypes():
    lora = adapter(0, 2, 6, variant="dora", train="head")
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter(1, 3, 6, variant="dora", train="head"))
    got = lojax.conform(lora, like)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(got["stack"].magnitude, lora["stack"].magnitude.astype(jnp.bfloat16))
    np.testing.assert_array_equal(got["head"], lora["head"].astype(jnp.bfloat16))


def test_scales_for_each_entry_of_a_stack():
    rules = [lojax.Rule("stack", rank=[2, 1, 2], alpha=6, axes=AXES["stack"])]
    _, varied = lojax.init(jax.random.key(0), PARAMS, rules)
    varied = jax.tree.map(lambda x: x + 1.0, varied)
    like = adapter(1, 2, 8, ("stack",))
    np.testing.assert_allclose(update(lojax.conform(varied, like)), update(varied), rtol=1e-6)
    with pytest.raises(ValueError, match=r"stack: rank 2 does not fit into the rank \(2, 1, 2\)"):
        lojax.conform(like, varied)


def test_shapes_and_shardings_of_like():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    like = adapter(1, 4, 8, ("layer/kernel",))
    sharded = jax.device_put(like, NamedSharding(mesh, PartitionSpec(None, "x")))
    got = lojax.conform(adapter(0, 2, 6, ("layer/kernel",)), sharded)
    assert got["layer"]["kernel"].a.sharding == sharded["layer"]["kernel"].a.sharding
    shapes = jax.eval_shape(lambda: like)
    same(lojax.conform(adapter(0, 2, 6, ("layer/kernel",)), shapes), jax.device_get(got))


def test_twenty_adapters_in_one_compiled_function():
    model = lojax.wrap(lambda p, x: x @ p["layer"]["kernel"], "layer/kernel")
    frozen, _ = lojax.init(jax.random.key(0), PARAMS, "layer/kernel")
    traces = []

    @jax.jit
    def run(frozen, lora, x):
        traces.append(1)
        return model.apply(frozen, lora, x)

    like = adapter(0, 6, 6, ("layer/kernel",))
    x = jax.random.normal(jax.random.key(1), (3, 6))
    for i in range(20):
        lora = adapter(i, 1 + i % 4, 1 + 3 * (i % 5), ("layer/kernel",))
        np.testing.assert_allclose(
            run(frozen, lojax.conform(lora, like), x), model.apply(frozen, lora, x), rtol=2e-5, atol=2e-5
        )
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("lora", "like", "says"),
    [
        (adapter(0, 4, 4), adapter(1, 2, 2), "layer/kernel: rank 4 does not fit into the rank 2.*lojax.resize"),
        (adapter(0, 2, 2), adapter(1, 2, 2, variant="dora"), "of the variant 'lora'.*of 'dora'"),
        (adapter(0, 2, 2), adapter(1, 2, 2, ("stack",)), "layer/kernel: lora adapts this parameter and like leaves it"),
        (adapter(0, 2, 2), adapter(1, 2, 2, train="head"), r"head: like trains this parameter in full and lora does"),
        (adapter(0, 2, 2, train="head"), adapter(1, 2, 2), r"head: lora trains in full this parameter"),
        (adapter(0, 2, 2, init="pissa"), adapter(1, 2, 2), "belongs to a base moved by 'pissa'"),
        (lojax.stack([adapter(0, 2, 2)]), adapter(1, 2, 2), "lora is a stack of adapters: index one"),
        (adapter(0, 2, 2), lojax.rescale(adapter(1, 2, 2), 0.0), "the scale of like is 0"),
    ],
)
def test_refuses(lora, like, says):
    with pytest.raises(ValueError, match=says):
        lojax.conform(lora, like)
