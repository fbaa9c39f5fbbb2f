"""What a map says of a tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from helpers import message

from lojax.peft import NameMap


def table(text, *leaves):
    """The table of a map for leaves written ``path shape``."""
    tree: dict = {}
    for leaf in leaves:
        path, shape = leaf.split(" ", 1)
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(eval(shape), jnp.float32)
    return str(NameMap.parse(text).table(tree)).splitlines()


@pytest.mark.parametrize(
    ("text", "leaves", "expected"),
    [
        ("a/{i}/kernel <-> b.{i}", ["a/7/kernel (2, 3)"], ["a/7/kernel <-> b.7.weight"]),
        ("a_{i}/bias <-> b.{i}", ["a_7/bias (3,)"], ["a_7/bias <-> b.7.bias"]),
        ("a/{m*}/kernel <-> b.{m}", ["a/x/kernel (2, 3)"], ["a/x/kernel <-> b.x.weight"]),
        ("a/{m*}/kernel <-> b.{m}", ["a/x/y/kernel (2, 3)"], ["a/x/y/kernel is not mapped"]),
        ("a/{m**}/kernel <-> b.{m}", ["a/x/y/kernel (2, 3)"], ["a/x/y/kernel <-> b.x.y.weight"]),
        ("{m:q=query,o/p}/w <-> {m}", ["o/p/w (2, 3)", "q/w (2, 3)"], ["o/p/w <-> o.p.weight", "q/w <-> query.weight"]),
        (
            "(x/)a/scale <-> (y.)b",
            ["a/scale (3,)", "x/a/scale (3,)"],
            ["a/scale <-> b.weight", "x/a/scale <-> y.b.weight"],
        ),
        ("a/* <-> b", ["a/bias (3,)", "a/kernel (2, 3)"], ["a/bias <-> b.bias", "a/kernel <-> b.weight"]),
        ("a/* <-> b", ["params/a/bias (3,)"], ["params/a/bias <-> b.bias"]),
        ("a/w[{i}, in, out] <-> b.{i}", ["a/w (2, 3, 4)"], ["a/w[0] <-> b.0.weight", "a/w[1] <-> b.1.weight"]),
        ("a/w[in, {m:q,k}, out] <-> {m}", ["a/w (3, 2, 4)"], ["a/w[:, 0] <-> q.weight", "a/w[:, 1] <-> k.weight"]),
        ("a/w[in, {m:q=4,k=2}*out] <-> {m}", ["a/w (3, 6)"], ["a/w[:, :4] <-> q.weight", "a/w[:, 4:6] <-> k.weight"]),
        ("a/*[{i}, in, out, out] <-> b.{i}", ["a/bias (1, 3, 4)"], ["a/bias[0] <-> b.0.bias"]),
        ("a/*[in, out, out] <-> b", ["a/bias (2, 3, 4)"], ["a/bias is not mapped"]),
        ("a/*[{i}, in, out] <-> b.{i}", ["a/weight (1, 4)"], ["a/weight[0] <-> b.0.weight"]),
        ("c <-> d.c : param", ["c (1, 3, 4)"], ["c <-> d.c"]),
        ("a/kernel[in, out] <-> b\na/kernel[in, out, out] <-> c", ["a/kernel (2, 3, 4)"], ["a/kernel <-> c.weight"]),
    ],
)
def test_rules(text, leaves, expected):
    assert table(text, *leaves) == expected


def test_an_empty_map_is_refused():
    assert "at least one rule" in message(ValueError, NameMap.parse, "# nothing\n")


def test_parts_that_do_not_fit_the_axis_are_refused():
    leaf = {"w": jnp.ones((3, 6))}
    text = message(ValueError, NameMap.parse("w[in, {m:q=4,k=4}*out] <-> {m}").table, leaf)
    assert "splits an axis of size 6 into [4, 4], 8 in all" in text
    text = message(ValueError, NameMap.parse("w[{m:q,k}, out] <-> {m}").table, leaf)
    assert "names 2 entries of an axis of size 3" in text


def test_a_prefix_moves_a_map():
    names = NameMap.parse("a/kernel <-> b").prefixed("text/", "encoder.")
    assert str(names.table({"text": {"a": {"kernel": jnp.ones((2, 2))}}})) == "text/a/kernel <-> encoder.b.weight"


def test_scanned_rules_move_the_layer_to_the_first_axis():
    names = NameMap.parse(
        "h/{i}/{m:q,o}/*[in, out, out] <-> h.{i}.{m}\nh_{i}/ln/scale <-> h.{i}.ln\nx <-> x : param"
    ).scanned()
    tree = {
        "h": {"q": {"kernel": jnp.ones((1, 2, 2, 2)), "bias": jnp.ones((1, 2, 2))}, "ln": {"scale": jnp.ones((1, 3))}}
    }
    lines = ["h/ln/scale[0] <-> h.0.ln.weight", "h/q/bias[0] <-> h.0.q.bias", "h/q/kernel[0] <-> h.0.q.weight"]
    assert str(names.table(tree)).splitlines() == lines
