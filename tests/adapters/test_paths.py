"""Paths: one name for every leaf, the same in params, frozen and lora."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import freeze

from lojax import Adapter
from lojax.adapters.paths import flatten, map_paths, unflatten
from tests.helpers import message

Pair = collections.namedtuple("Pair", ["left", "right"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object


def test_every_kind_of_container_has_readable_paths():
    tree = {"dict": {"a": 1}, "list": [2, (3,)], "named": Pair(4, 5), "data": Layer(6), 0: 7}
    tree = {"root": {str(key): value for key, value in tree.items()}}
    assert flatten(tree) == {
        "root/0": 7,
        "root/data/kernel": 6,
        "root/dict/a": 1,
        "root/list/0": 2,
        "root/list/1/0": 3,
        "root/named/left": 4,
        "root/named/right": 5,
    }
    assert flatten(freeze({"a": {"b": 1}})) == {"a/b": 1}


def test_none_boxes_and_adapters_are_leaves():
    box = nn.Partitioned(jnp.ones((2, 2)), names=("x", None))
    adapter = Adapter(a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=1.0, axes=("in", "out"))
    tree = {"none": None, "box": box, "adapter": adapter}
    found = flatten(tree)
    assert list(found) == ["adapter", "box", "none"]
    assert found["box"] is box
    assert found["adapter"] is adapter
    assert found["none"] is None


def test_map_paths_keeps_the_structure_and_passes_leaves_of_every_tree():
    left, right = {"a": [1, None]}, {"a": [None, 2]}
    assert map_paths(lambda path, x, y: (path, x, y), left, right) == {"a": [("a/0", 1, None), ("a/1", None, 2)]}


def test_a_bare_array_has_the_empty_path():
    assert flatten(3) == {"": 3}


def test_unflatten_is_the_reverse_of_flatten_for_dicts():
    tree = {"a": {"b": 1, "c": {"d": None}}, "e": 2}
    assert unflatten(flatten(tree)) == tree
    assert unflatten({("a", 0): 1, ("a", "b/c"): 2}) == {"a": {0: 1, "b/c": 2}}
    assert unflatten({}) == {}


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b")])
def test_a_path_is_a_leaf_or_a_dict_of_leaves(paths):
    assert "leaf" in message(ValueError, unflatten, dict.fromkeys(paths, 1))
