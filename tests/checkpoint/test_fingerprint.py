"""The wrong base is always noticed, the right one never refused, however it is spread over devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_same_bits, message
from jax.sharding import NamedSharding, PartitionSpec

import lojax
from lojax.checkpoint.digest import digest
from lojax.checkpoint.fingerprint import describe_leaf, fingerprint
from lojax.checkpoint.manifest import BaseEntry
from tests.checkpoint import checkpoint_cases as cases


def test_fingerprint_is_plain_data():
    frozen, _ = cases.pair()
    found = fingerprint(frozen, ["params/layer_0/query/kernel"])
    kernel = frozen["params"]["layer_0"]["query"]["kernel"]
    assert found == {
        "params/embed/table": BaseEntry("bfloat16[5,4]"),
        "params/head/bias": None,
        "params/head/kernel": None,
        "params/layer_0/query/kernel": BaseEntry("float32[16,8]", digest(np.asarray(kernel))),
        "params/layer_0/value/kernel": BaseEntry("float32[16,8]"),
    }


def test_spec_of_boxes_and_numbers():
    assert describe_leaf(nn.Partitioned(jnp.ones((2, 3)), ("a", "b"))) == "float32[2,3]"
    assert describe_leaf(jax.ShapeDtypeStruct((4,), jnp.bfloat16)) == "bfloat16[4]"
    assert describe_leaf(None) is None
    assert describe_leaf(jax.random.key(0)) == "key<fry>[]"


@pytest.fixture
def saved(tmp_path):
    frozen, lora = cases.pair()
    lojax.save(tmp_path, lora, frozen=frozen)
    return tmp_path, frozen, lora


def _with(frozen, **changed):
    return {"params": {**frozen["params"], **changed}}


def _layer(frozen, kernel):
    return _with(frozen, layer_0={**frozen["params"]["layer_0"], "query": {"kernel": kernel}})


def test_another_value_in_one_adapted_weight(saved):
    path, frozen, lora = saved
    kernel = frozen["params"]["layer_0"]["query"]["kernel"]
    other = _layer(frozen, kernel.at[15, 7].set(jnp.nextafter(kernel[15, 7], jnp.inf)))
    text = message(ValueError, lojax.restore, path, frozen=other)
    assert text.startswith("params/layer_0/query/kernel: frozen holds other values than the base")
    assert str(path) in text and digest(kernel) in text and "check_base=False" in text
    assert_same_bits(lojax.restore(path, frozen=other, check_base=False), lora)


def test_shapes_are_enough_for_a_base_without_content(saved):
    path, frozen, lora = saved
    assert_same_bits(lojax.restore(path, frozen=jax.eval_shape(lambda: frozen)), lora)


def test_the_base_on_another_mesh(saved):
    path, frozen, lora = saved
    rows = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec(None, "x"))
    kernel = jax.device_put(frozen["params"]["layer_0"]["query"]["kernel"], rows)
    assert_same_bits(lojax.restore(path, frozen=_layer(frozen, kernel)), lora)


def test_another_dtype(saved):
    path, frozen, lora = saved
    other = _with(frozen, embed={"table": frozen["params"]["embed"]["table"].astype(jnp.float32)})
    text = message(ValueError, lojax.restore, path, frozen=other)
    assert "params/embed/table" in text and "trained on bfloat16[5,4], but frozen holds float32[5,4]" in text
    assert_same_bits(lojax.restore(path, frozen=other, check_base=False), lora)


@pytest.mark.parametrize("check_base", [True, False])
def test_another_shape_under_an_adapter_is_never_accepted(saved, check_base):
    path, frozen, _ = saved
    text = message(ValueError, lojax.restore, path, frozen=_layer(frozen, jnp.ones((16, 9))), check_base=check_base)
    assert "params/layer_0/query/kernel" in text and "16,9" in text.replace(" ", "") and "16,8" in text.replace(" ", "")


@pytest.mark.parametrize("check_base", [True, False])
def test_a_missing_leaf(saved, check_base):
    path, frozen, _ = saved
    other = _with(frozen, layer_0={"query": frozen["params"]["layer_0"]["query"]})
    text = message(ValueError, lojax.restore, path, frozen=other, check_base=check_base)
    assert text.startswith("params/layer_0/value/kernel: is in ") and "but not in frozen" in text
    assert "params/layer_0/query/kernel" in text  # the nearest


def test_a_leaf_too_many(saved):
    path, frozen, lora = saved
    other = _with(frozen, pooler=jnp.ones((2, 2)))
    text = message(ValueError, lojax.restore, path, frozen=other)
    assert text.startswith("params/pooler: is in frozen, but not in ")
    restored = lojax.restore(path, frozen=other, check_base=False)
    assert restored["params"].pop("pooler") is None
    assert_same_bits(restored, lora)


def test_params_instead_of_frozen(saved):
    path, _, _ = saved
    text = message(ValueError, lojax.restore, path, frozen=cases.params())
    assert text.startswith("params/head/bias: was trained in full") and "model.init" in text


def test_structure_is_checked_even_without_a_fingerprint(tmp_path):
    frozen, lora = cases.pair()
    lojax.save(tmp_path, lora)
    assert_same_bits(lojax.restore(tmp_path, frozen=frozen), lora)
    text = message(ValueError, lojax.restore, tmp_path, frozen=_with(frozen, pooler=jnp.ones((2, 2))))
    assert text.startswith("params/pooler")


# --- another train= is no other base ---


def test_restored_where_more_trains_in_full(tmp_path):
    targets = ["**/query/kernel", "**/value/kernel"]
    frozen, lora = lojax.init(jax.random.key(0), cases.params(), targets, rank=4)
    lojax.save(tmp_path, lora, frozen=frozen)
    other, _ = lojax.init(jax.random.key(0), cases.params(), targets, rank=4, train="**/head/*")
    text = message(ValueError, lojax.restore, tmp_path, frozen=other)
    assert text.startswith("params/head/bias: frozen holds None, so this init trains it in full, but it was frozen")
    assert "train= of the save" in text and "right base" not in text


def test_restored_where_less_trains_in_full(saved):
    path, _, _ = saved
    frozen, _ = lojax.init(jax.random.key(0), cases.params(), ["**/query/kernel", "**/value/kernel"], rank=4)
    text = message(ValueError, lojax.restore, path, frozen=frozen)
    assert "params/head/bias: was trained in full" in text and "train= of the save" in text


@pytest.mark.parametrize("check_base", [True, False])
def test_restored_where_an_adapted_weight_trains_in_full(saved, check_base):
    path, frozen, _ = saved
    text = message(ValueError, lojax.restore, path, frozen=_layer(frozen, None), check_base=check_base)
    assert text.startswith("params/layer_0/query/kernel: ") and "this init trains it in full" in text
    assert "right base" not in text and "another model" not in text


# --- a start that was taken out of the weight ---


def _moved(init):
    """The pretrained params, and a pair whose init moved the base, before and after some training."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 8)), jnp.float32), "head": jnp.ones((8, 2))}
    net = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]
    if init == "lora_ga":
        x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 12)), jnp.float32)
        model = lojax.wrap(net, "w", rank=2, train="head")
        loss = lambda frozen, lora, x: jnp.sum(model.apply(frozen, lora, x) ** 2)
        frozen, start = lojax.lora_ga(loss, *model.init(jax.random.key(0), params, x), [x])
    else:
        frozen, start = lojax.init(jax.random.key(0), params, "w", rank=2, init=init, train="head")
    assert start["w"].moved_base == init
    moved = dataclasses.replace(start["w"], a=start["w"].a + 0.1, b=start["w"].b - 0.2)
    return params, frozen, start, {"w": moved, "head": start["head"] + 1}


@pytest.mark.parametrize("init", ["pissa", "olora", "milora", "lora_ga"])
def test_a_moved_base_is_not_advised_away(tmp_path, init):
    params, frozen, _, lora = _moved(init)
    lojax.save(tmp_path, lora, frozen=frozen)
    assert_same_bits(lojax.restore(tmp_path, frozen=frozen), lora)
    pretrained = {**params, "head": None}
    text = message(ValueError, lojax.restore, tmp_path, frozen=pretrained)
    assert text.startswith("w: frozen holds other values than the base")
    assert f"({init}) was taken out of its weight" in text and "start=start" in text and "check_base" not in text


@pytest.mark.parametrize("init", ["pissa", "olora", "milora", "lora_ga"])
def test_saved_with_its_start_it_goes_on_the_pretrained_weights(tmp_path, init):
    """Put on them as it is, it is off by the whole start."""
    params, frozen, start, lora = _moved(init)
    expected = lojax.merge(frozen, lora)
    lojax.save(tmp_path, lora, frozen=frozen, start=start)
    pretrained = {**params, "head": None}
    restored = lojax.restore(tmp_path, frozen=pretrained)
    assert restored["w"].rank == 4 and restored["w"].moved_base is None
    merged = lojax.merge(pretrained, restored)
    np.testing.assert_allclose(merged["w"], expected["w"], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(merged["head"], expected["head"])
    assert float(jnp.abs(lojax.merge(pretrained, lora)["w"] - expected["w"]).max()) > 0.05


def test_a_moved_base_that_nobody_recorded(tmp_path):
    params, frozen, _, lora = _moved("pissa")
    lojax.save(tmp_path, lora)
    for tree in (frozen, {**params, "head": None}):
        text = message(ValueError, lojax.restore, tmp_path, frozen=tree)
        assert text.startswith(f"w: {tmp_path} was saved without frozen=") and "check_base=False" in text
    assert_same_bits(lojax.restore(tmp_path, frozen=frozen, check_base=False), lora)
    assert_same_bits(lojax.restore(tmp_path, frozen=jax.eval_shape(lambda: frozen)), lora)  # shapes hold no values
    assert_same_bits(lojax.restore(tmp_path), lora)


def test_start_must_be_what_init_returned(tmp_path):
    _, frozen, start, lora = _moved("pissa")
    for other, reason in (
        ({"w": start["w"]}, "start and lora have different structure"),
        ({**start, "w": None}, "w: start holds no adapter there"),
        (frozen, "w: start holds no adapter there"),
    ):
        text = message(ValueError, lojax.save, tmp_path, lora, frozen=frozen, start=other)
        assert reason in text
    frozen, plain = cases.pair()
    text = message(ValueError, lojax.save, tmp_path, plain, frozen=frozen, start=plain)
    assert "lora holds none. Leave it out." in text
    assert list(tmp_path.iterdir()) == []
