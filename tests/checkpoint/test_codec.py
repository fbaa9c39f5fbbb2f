"""A tree becomes flat arrays and entries, and comes back in the structure that is asked for."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_same_bits, message

import lojax
from lojax.checkpoint.codec import (
    build_tree,
    check_like,
    check_paths,
    collect_arrays,
    describe_leaves,
    flatten_with_keys,
)
from lojax.checkpoint.manifest import Manifest, StoredArray


def _every_field() -> lojax.Adapter:
    """An adapter that uses every field there is, each with a value of its own."""
    names = (None, "model")
    adapter = lojax.Adapter(
        a=np.ones((3, 6, 2), np.float32),
        b=nn.Partitioned(np.full((3, 2, 4), 2, np.float32), (None, *names)),
        scale=(0.5, 1.0, 2.0),
        axes=("stack", "in", "out"),
        dropout=0.25,
        magnitude=np.full((3, 4), 3, np.float32),
        rows=np.full((2, 4), 4, np.float32),
        tokens=(5, 1),
        ranks=(2, 1, 2),
        requested_rank=9,
        invocation_tokens=(7, 8),
        moved_base="pissa",
        frozen_a=True,
    )
    for field in dataclasses.fields(lojax.Adapter):
        if field.name == "entries":
            continue  # of a bank, whose adapters are stored one by one: see test_bank_checkpoint.py
        assert getattr(adapter, field.name) is not field.default, f"say what {field.name} is, so that it is tested"
    return adapter


def _manifest(lora):
    leaves, keys = flatten_with_keys(lora)
    entries = dict(zip(("adapters", "full", "other"), describe_leaves(leaves), strict=True))
    manifest = Manifest(**entries, keys=keys, base=None, metadata={}, arrays="arrays-1", files={})
    return manifest, collect_arrays(leaves)


def test_every_field_of_an_adapter_comes_back_through_the_file(tmp_path):
    lora = {"layer": {"w": _every_field()}, "rest": None}
    lojax.save(tmp_path, lora)
    restored = lojax.restore(tmp_path)
    assert_same_bits(restored, lora)
    adapter = restored["layer"]["w"]
    assert (adapter.scale, adapter.tokens, adapter.ranks) == ((0.5, 1.0, 2.0), (5, 1), (2, 1, 2))
    assert adapter.frozen_a is True and adapter.moved_base == "pissa" and adapter.b.names == (None, None, "model")


def test_flatten_with_keys_tells_only_of_keys_that_the_path_does_not():
    leaves, keys = flatten_with_keys({"a": [1.0, None], "b": {"c/d": 2.0, "e": 3.0}})
    assert leaves == {"a/0": 1.0, "a/1": None, "b/c/d": 2.0, "b/e": 3.0}
    assert keys == {"a/0": ("a", 0), "a/1": ("a", 1), "b/c/d": ("b", "c/d")}


def test_collect_arrays_names_each_array_by_path_and_field():
    arrays = collect_arrays({"w": _every_field(), "bias": np.ones(2), "rest": None})
    assert list(arrays) == ["w/a", "w/b", "w/magnitude", "w/rows", "bias"]
    assert isinstance(arrays["w/b"], np.ndarray)  # out of its box


def test_describe_leaves():
    adapters, full, other = describe_leaves({"w": _every_field(), "bias": np.ones(2, np.int8), "rest": None})
    assert adapters["w"].rank == 2 and adapters["w"].weight_shape == (3, 6, 4)
    assert adapters["w"].b.box == {"kind": "Partitioned", "names": [None, None, "model"]}
    assert full == {"bias": StoredArray((2,), "int8")} and other == ("rest",)


@pytest.mark.parametrize("lora", [np.ones(2), {"": np.ones(2)}, {"": {"": np.ones(2)}}, {0: {"x": np.ones(2)}}])
def test_build_tree_without_a_template_gives_nested_dicts_with_the_same_keys(lora):
    manifest, arrays = _manifest(lora)
    assert_same_bits(build_tree(manifest, arrays, like=None, frozen=None), lora)


def test_build_tree_takes_the_structure_and_the_boxes_of_its_template():
    adapter = lojax.Adapter(np.ones((4, 2)), np.ones((2, 3)), 1.0, ("in", "out"))
    manifest, arrays = _manifest([adapter, None])
    frozen = [nn.Partitioned(np.ones((4, 3)), ("data", "model")), np.ones(1)]
    restored = build_tree(manifest, arrays, like=None, frozen=frozen)
    assert isinstance(restored, list) and restored[1] is None
    assert restored[0].a.names == ("data", None) and restored[0].b.names == (None, "model")
    plain = build_tree(manifest, arrays, like=(adapter, None), frozen=frozen)
    assert isinstance(plain, tuple) and isinstance(plain[0].a, np.ndarray)


def test_check_like_compares_static_fields_and_shapes(tmp_path):
    lora = {"w": _every_field()}
    manifest, _ = _manifest(lora)
    check_like(manifest, lora, tmp_path)
    for field, value in {"frozen_a": False, "ranks": None, "tokens": (1, 5), "dropout": 0.0}.items():
        like = {"w": dataclasses.replace(lora["w"], **{field: value})}
        assert f"w: {tmp_path} has {field}=" in message(ValueError, check_like, manifest, like, tmp_path)
    like = {"w": dataclasses.replace(lora["w"], magnitude=None)}
    text = message(ValueError, check_like, manifest, like, tmp_path)
    assert text == f"w/magnitude: {tmp_path} holds float32[3,4], but like holds None."


def test_check_paths_names_the_first_path_and_the_nearest_ones(tmp_path):
    manifest, _ = _manifest({"query": jnp.ones(1), "value": None})
    check_paths(manifest, {"query": 0, "value": 0}, "frozen", tmp_path)
    text = message(ValueError, check_paths, manifest, {"querry": 0, "value": 0}, "frozen", tmp_path)
    assert text.startswith(f"query: is in {tmp_path}, but not in frozen.") and "querry" in text
    text = message(ValueError, check_paths, manifest, {"query": 0, "value": 0, "x": 0}, "like", tmp_path)
    assert text.startswith(f"x: is in like, but not in {tmp_path}.")
