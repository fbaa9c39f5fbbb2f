"""Ready name maps: every layout of every family."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from helpers import message

import lojax.peft


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
    assert list(lojax.peft.name_map(family).table(tree).parameters) == [name]


def test_every_family_has_a_row():
    assert {family for family, *_ in READY} == set(lojax.peft.name_maps())


def test_gemma_einsum_weights_are_two_modules_with_heads_before_features():
    parameters = (
        lojax.peft.name_map("gemma")
        .table({"layer_0": {"attn": {"kv_einsum": {"w": jnp.ones((2, 3, 4, 5))}}}})
        .parameters
    )
    assert {name: parameter.axes for name, parameter in parameters.items()} == {
        f"model.layers.0.self_attn.{m}_proj.weight": ("stack", "out", "in", "out") for m in "kv"
    }
