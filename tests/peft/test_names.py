"""The rule language, and what it says of a tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from helpers import message

import lojax.peft
from lojax.peft import NameMap
from lojax.peft.rule_language import parse_rule


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


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a/kernel b", "expected one '<->' between a JAX path and a torch name"),
        ("a/{i}/kernel <-> b", "placeholder {i} is on the left but not on the right"),
        ("a/kernel <-> b.{i}", "placeholder {i} is on the right but not on the left"),
        ("(x/)a/kernel <-> b", "an optional (...) is on the left but not on the right"),
        ("a/kernel[in, sideways] <-> b", "axis 'sideways' is none of in, out"),
        ("a/kernel[in, {m:q=x}*out] <-> {m}", "sizes are numbers"),
        ("a/kernel[in, {m}*out] <-> {m}", "needs the names of its parts, as in {p:a,b}*out"),
        ("a/kernel <-> b : lstm", "kind 'lstm' is none of linear, conv1d, embedding, conv"),
        ("{i}/{i}/kernel <-> {i}", "the path does not parse"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(line, reason):
    text = message(ValueError, parse_rule, line)
    assert text.startswith(f"Name rule {line!r}: ") and reason in text


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


def test_an_unknown_ready_map_is_refused():
    text = message(ValueError, lojax.peft.name_map, "elmo")
    assert "no ready name map 'elmo'; there are bert, roberta, gpt2" in text


# --- ready maps: a leaf of every layout, and the torch name it has ---

READY = [
    (
        "bert",
        "bert/encoder/layer/3/attention/self/query/kernel (4, 4)",
        "bert.encoder.layer.3.attention.self.query.weight",
    ),
    ("bert", "encoder/layer_3/attention/query/kernel (4, 2, 2)", "encoder.layer.3.attention.self.query.weight"),
    ("bert", "params/encoder/layer/attention/out/kernel (1, 2, 2, 4)", "encoder.layer.0.attention.output.dense.weight"),
    ("roberta", "classifier/out_proj/kernel (4, 2)", "classifier.out_proj.weight"),
    ("gpt2", "transformer/h/1/attn/c_attn/kernel (12, 4)", "transformer.h.1.attn.c_attn.weight"),
    ("gpt2_plain", "h_1/attn/c_attn/kernel (4, 3, 2, 2)", "h.1.attn.c_attn.weight"),
    ("llama", "model/layers/0/mlp/down_proj/kernel (8, 4)", "model.layers.0.mlp.down_proj.weight"),
    ("llama", "layers_0/self_attn/o_proj/kernel (2, 2, 4)", "layers.0.self_attn.o_proj.weight"),
    ("mistral", "model/layers/self_attn/q_proj/kernel (1, 4, 4)", "model.layers.0.self_attn.q_proj.weight"),
    ("qwen", "model/layers/0/self_attn/q_proj/bias (4,)", "model.layers.0.self_attn.q_proj.bias"),
    ("gemma", "layer_2/attn/q_einsum/w (2, 4, 2)", "model.layers.2.self_attn.q_proj.weight"),
    ("gemma", "model/embed_tokens/embedding (9, 4)", "model.embed_tokens.weight"),
    (
        "t5",
        "decoder/block/1/layer/2/DenseReluDense/wi/kernel (4, 8)",
        "decoder.block.1.layer.2.DenseReluDense.wi.weight",
    ),
    (
        "vit",
        "vit/embeddings/patch_embeddings/projection/kernel (2, 2, 3, 4)",
        "vit.embeddings.patch_embeddings.projection.weight",
    ),
    ("clip", "text_model/encoder/layers/0/mlp/fc1/kernel (4, 8)", "text_model.encoder.layers.0.mlp.fc1.weight"),
]


@pytest.mark.parametrize(("family", "leaf", "name"), READY, ids=[f"{f}-{leaf.split()[0]}" for f, leaf, _ in READY])
def test_ready_maps(family, leaf, name):
    path, shape = leaf.split(" ", 1)
    tree = jax.ShapeDtypeStruct(eval(shape), jnp.float32)
    for key in reversed(path.split("/")):
        tree = {key: tree}
    assert list(lojax.peft.name_map(family).table(tree).slots) == [name]


def test_every_family_has_a_row():
    assert {family for family, *_ in READY} == set(lojax.peft.name_maps())


def test_gemma_einsum_weights_are_two_modules_with_heads_before_features():
    slots = (
        lojax.peft.name_map("gemma").table({"layer_0": {"attn": {"kv_einsum": {"w": jnp.ones((2, 3, 4, 5))}}}}).slots
    )
    assert {name: slot.axes for name, slot in slots.items()} == {
        f"model.layers.0.self_attn.{m}_proj.weight": ("stack", "out", "in", "out") for m in "kv"
    }
