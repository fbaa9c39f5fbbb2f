"""Trained token rows, both ways: PEFT holds the new rows, an adapter what is added to the base."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message, trained

import lojax
import lojax.peft
from lojax import Rule
from lojax.files import safetensors
from tests.peft.layouts import EMBEDDING, LAYOUTS, golden, shaped
from tests.peft.test_load import copied, edited, outputs

KEY = "base_model.model.embed.token_adapter.trainable_tokens_delta"
ROWS = Rule("embed/embedding", train="tokens", tokens=[7, 2])


def read(path):
    file = safetensors.open_file(path / "adapter_model.safetensors")
    return {name: file.read(name) for name in file.entries}


def refusal(path, layout=EMBEDDING):
    return message(ValueError, lojax.peft.load, path, layout.base(golden("tokens")[1]), layout.names)


def started(**settings):
    base = EMBEDDING.base(golden("tokens")[1])
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/*/q/kernel", rank=2, train=ROWS, **settings)
    return base, frozen, lora


# --- reading ---


@pytest.mark.parametrize("chosen", [{"embed": [7, 2]}, [7, 2]])
def test_rows_are_what_is_added_to_the_base(chosen, tmp_path):
    path = copied("tokens", tmp_path, config={"trainable_token_indices": chosen})
    _, tensors, x, y = golden("tokens")
    base = EMBEDDING.base(tensors)
    lora = lojax.peft.load(path, base, EMBEDDING.names)
    adapter = lora["embed"]["embedding"]
    assert adapter.variant == "tokens" and adapter.tokens == (7, 2) and adapter.axes == ("in", "out")
    np.testing.assert_allclose(adapter.rows + base["embed"]["embedding"][jnp.array([7, 2])], read(path)[KEY], atol=1e-6)
    assert np.abs(adapter.rows).max() > 0.05, "the rows did not train: this would prove nothing"
    np.testing.assert_allclose(outputs(EMBEDDING, base, lora, x), y, rtol=1e-5, atol=1e-5)


def test_rows_need_the_array_of_the_embedding():
    text = message(ValueError, lojax.peft.load, golden("tokens")[0], shaped(EMBEDDING.shapes), EMBEDDING.names)
    assert "embed/embedding: trainable_tokens_delta holds whole rows" in text
    assert "pass the array of the embedding, not its shape" in text


def test_an_embedding_that_peft_resized_is_saved_beside_its_rows(tmp_path):
    tensors = golden("tokens")[1]
    key = "base_model.model.embed.token_adapter.base_layer.weight"
    path = edited(copied("tokens", tmp_path), lambda found: found.update({key: tensors["embed.weight"]}))
    assert lojax.peft.load(path, EMBEDDING.base(tensors), EMBEDDING.names)["embed"]["embedding"].tokens == (7, 2)
    path = edited(path, lambda found: found.update({key: tensors["embed.weight"] + 1}))
    assert "embed/embedding differs" in refusal(path)


@pytest.mark.parametrize("chosen", [{"embed": [7, 2]}, [7, 2]])
def test_missing_rows_are_named(chosen, tmp_path):
    path = copied("tokens", tmp_path, config={"trainable_token_indices": chosen})
    assert f"missing: {KEY}" in refusal(edited(path, lambda found: found.pop(KEY)))


@pytest.mark.parametrize(
    ("config", "edit", "reason"),
    [
        ({"trainable_token_indices": None}, {}, "names no trainable_token_indices for embed)"),
        ({"trainable_token_indices": {"embed": [7, 9]}}, {}, "trains row 9; embed/embedding (9, 6) has 9"),
        ({"trainable_token_indices": {"embed": [7, 2, 1]}}, {}, "is (2, 6); embed/embedding (9, 6) needs (3, 6)"),
        ({}, {"embed.lora_embedding_A": (2, 9), "embed.lora_embedding_B": (6, 2)}, "embed has an adapter too, which"),
    ],
)
def test_rows_that_do_not_fit_are_named(config, edit, reason, tmp_path):
    more = {f"base_model.model.{name}": np.ones(shape, np.float32) for name, shape in edit.items()}
    text = refusal(edited(copied("tokens", tmp_path, config=config), lambda found: found.update(more)))
    assert KEY in text and reason in text


def test_rows_of_what_is_no_embedding_are_refused(tmp_path):
    key = "base_model.model.head.token_adapter.trainable_tokens_delta"
    path = copied("tokens", tmp_path, config={"trainable_token_indices": {"head": [7, 2]}})
    text = refusal(edited(path, lambda found: found.update({key: found.pop(KEY)})))
    assert f"{key} (token rows are of an embedding, and the name map has head/kernel as a linear weight there)" in text


# --- writing ---


def test_rows_are_written_whole(tmp_path):
    base, frozen, lora = started(dropout=0.25)
    lora["embed"]["embedding"] = jax.tree.map(lambda x: x + 0.5, lora["embed"]["embedding"])
    lojax.peft.save(tmp_path, lora, frozen, EMBEDDING.names, overwrite=True)
    np.testing.assert_allclose(read(tmp_path)[KEY], base["embed"]["embedding"][jnp.array([7, 2])] + 0.5, atol=1e-6)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["trainable_token_indices"] == {"embed": [7, 2]} and fields["lora_dropout"] == 0.25
    again = lojax.peft.load(tmp_path, base, EMBEDDING.names)["embed"]["embedding"]
    np.testing.assert_allclose(again.rows, 0.5, atol=1e-6)


def test_rows_of_a_bfloat16_embedding_keep_what_is_below_its_rounding(tmp_path):
    base, frozen, lora = started()
    small = lambda x: x.astype(jnp.bfloat16)
    frozen["embed"]["embedding"], base["embed"]["embedding"] = (small(t["embed"]["embedding"]) for t in (frozen, base))
    lora["embed"]["embedding"] = jax.tree.map(lambda x: x + 1e-4, lora["embed"]["embedding"])
    lojax.peft.save(tmp_path, lora, frozen, EMBEDDING.names, overwrite=True)
    again = lojax.peft.load(tmp_path, base, EMBEDDING.names)["embed"]["embedding"]
    np.testing.assert_allclose(again.rows, 1e-4, rtol=0.01)


def test_rows_without_the_array_of_the_embedding_cannot_be_written(tmp_path):
    _, frozen, lora = started()
    abstract = jax.eval_shape(lambda: frozen)
    for frozen in (abstract, None):
        text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, EMBEDDING.names)
        assert "embed/embedding: PEFT stores whole" in text and "added to them; pass" in text


def test_an_adapter_and_rows_on_one_embedding_are_refused(tmp_path):
    base = EMBEDDING.base(golden("tokens")[1])
    frozen, lora = lojax.init(jax.random.key(0), base, Rule("embed/embedding", tokens=[2]), rank=2)
    for tree in (frozen, None):
        text = message(ValueError, lojax.peft.save, tmp_path / "out", trained(lora), tree, EMBEDDING.names)
        assert "embed/embedding holds an adapter and token rows; PEFT has one or the other for an embedding" in text


def test_columns_of_an_embedding_are_no_rows(tmp_path):
    base = EMBEDDING.base(golden("tokens")[1])
    columns = Rule("embed/embedding", train="tokens", tokens=[2], axes=("out", "in"))
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/*/q/kernel", rank=2, train=columns)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, EMBEDDING.names)
    assert "embed/embedding: the token rows are of axes ('out', 'in'), the name rule" in text


def test_rows_of_a_kernel_are_refused(tmp_path):
    layout = LAYOUTS["flat"]
    rows = Rule("head/kernel", train="tokens", tokens=[2])
    base = layout.base(golden("linear")[1])
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/*/q/kernel", rank=2, train=rows)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, layout.names)
    assert "head/kernel (6, 3) is head as a linear weight" in text and "token rows are of an embedding" in text
