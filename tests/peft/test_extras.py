"""DoRA's magnitude and trained token rows, both ways: what real PEFT wrote means the same here; misfits are named."""

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
from tests.peft.adapter_files import copied, edited, outputs, tensors_of
from tests.peft.layouts import CONV2D, EMBEDDING, EXPERTS, LAYOUTS, golden, shaped

FLAT = LAYOUTS["flat"]
KEY = "base_model.model.layers.0.q.lora_magnitude_vector"


def moved(lora, size=0.3):
    """``lora`` with every array a little elsewhere."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + size * jnp.asarray(rng.normal(size=x.shape), x.dtype), lora)


def refusal(path, layout=FLAT, case="dora"):
    return message(ValueError, lojax.peft.load, path, layout.base(golden(case)[1]), layout.names)


# --- reading magnitudes ---


@pytest.mark.parametrize(("name", "shape"), [("flat", (6,)), ("heads", (2, 3)), ("scanned", (2, 2, 3))])
def test_a_magnitude_has_the_out_axes_of_its_weight(name, shape):
    lora = lojax.peft.load(golden("dora")[0], LAYOUTS[name].base(golden("dora")[1]), LAYOUTS[name].names)
    layers = lora["layers"]
    adapter = (layers["q"] if name == "scanned" else layers["0"]["q"])["kernel"]
    assert adapter.variant == "dora" and adapter.magnitude.shape == shape


def test_layers_without_an_adapter_keep_their_own_lengths():
    layout, (path, tensors, *_) = LAYOUTS["scanned"], golden("dora")
    base = layout.base(tensors)
    v = lojax.peft.load(path, base, layout.names)["layers"]["v"]["kernel"]
    assert v.ranks == (0, 2)
    own = np.linalg.norm(np.asarray(base["layers"]["v"]["kernel"]), axis=1)
    np.testing.assert_allclose(v.magnitude[0], own[0], rtol=1e-6)
    assert np.abs(v.magnitude[1] - own[1]).max() > 0.01
    text = message(ValueError, lojax.peft.load, path, shaped(layout.shapes), layout.names)
    assert "only 1 of its modules are DoRA adapted" in text and "pass its arrays, not shapes" in text
    lojax.peft.load(path, shaped(FLAT.shapes), FLAT.names)  # where all are, shapes are enough


def test_the_longer_spelling_of_the_key_is_read_too(tmp_path):
    path = edited(copied("dora", tmp_path), lambda found: found.update({f"{KEY}.weight": found.pop(KEY)}))
    _, tensors, x, y = golden("dora")
    base = FLAT.base(tensors)
    np.testing.assert_allclose(outputs(FLAT, base, lojax.peft.load(path, base, FLAT.names), x), y, rtol=1e-4, atol=1e-5)


def test_a_missing_magnitude_is_named(tmp_path):
    assert f"missing: {KEY}" in refusal(edited(copied("dora", tmp_path), lambda found: found.pop(KEY)))


def test_a_misshapen_magnitude_is_named(tmp_path):
    path = edited(copied("dora", tmp_path / "a"), lambda found: found.update({KEY: np.ones(5, np.float32)}))
    assert f"mis-shaped: {KEY} is (5,); layers/0/q/kernel (6, 6) needs (6,)" in refusal(path)
    key = "base_model.model.wide.lora_magnitude_vector"
    path = edited(copied("dora_conv2d", tmp_path / "b"), lambda found: found.update({key: np.ones(4, np.float32)}))
    assert f"{key} is (4,); wide/kernel (3, 3, 2, 4) needs (1, 4, 1, 1)" in refusal(path, CONV2D, "dora_conv2d")


def test_a_magnitude_out_of_place_is_named(tmp_path):
    text = refusal(copied("dora", tmp_path / "a", config={"use_dora": False}))
    assert f"unexpected: {KEY} (adapter_config.json says use_dora=False)" in text
    key = "base_model.model.layers.0.v.lora_magnitude_vector"
    path = edited(copied("dora", tmp_path / "b"), lambda found: found.update({key: np.ones(6, np.float32)}))
    assert f"unexpected: {key} (layers.0.v has no lora_A and lora_B beside it)" in refusal(path)


def test_dora_on_parameters_is_refused_as_peft_does(tmp_path):
    text = refusal(copied("experts", tmp_path, config={"use_dora": True}), EXPERTS, "experts")
    assert "use_dora=True with target_parameters=" in text and "PEFT has no DoRA on parameters" in text


PARTS = lojax.peft.NameMap.parse("w[{m:q,v}*in, out] <-> {m}")


def test_parts_along_an_in_axis_have_no_lengths_of_their_own(tmp_path):
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q", "v"], "use_dora": True}
    tensors = {}
    for m in "qv":
        tensors[f"base_model.model.{m}.lora_A.weight"] = np.ones((1, 2), np.float32)
        tensors[f"base_model.model.{m}.lora_B.weight"] = np.ones((3, 1), np.float32)
        tensors[f"base_model.model.{m}.lora_magnitude_vector"] = np.ones(3, np.float32)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    safetensors.write_all(tmp_path / "adapter_model.safetensors", tensors, {"format": "pt"})
    base = {"w": jnp.ones((4, 3))}
    expected = "q as a part along the in axis 0, and DoRA takes the length of whole columns"
    assert expected in message(ValueError, lojax.peft.load, tmp_path, base, PARTS)
    frozen, lora = lojax.init(jax.random.key(0), base, "w", rank=1, variant="dora")
    assert expected in message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, PARTS)


# --- writing magnitudes ---


def test_one_dora_adapter_across_a_fused_kernel_becomes_one_per_module(tmp_path):
    layout = LAYOUTS["side by side"]
    base, x = layout.base(golden("linear")[1]), golden("linear")[2]
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/*/qv/kernel", rank=2, alpha=6, variant="dora")
    lora = moved(lora)
    lojax.peft.save(tmp_path, lora, frozen, layout.names, overwrite=True)
    q, v = (tensors_of(tmp_path)[f"base_model.model.layers.0.{m}.lora_magnitude_vector"] for m in "qv")
    np.testing.assert_array_equal(np.concatenate([q, v]), lora["layers"]["0"]["qv"]["kernel"].magnitude)
    again = lojax.peft.load(tmp_path, base, layout.names)
    expected = outputs(layout, base, lora, x)
    np.testing.assert_allclose(outputs(layout, base, again, x), expected, rtol=1e-4, atol=1e-4)


def test_a_magnitude_that_moved_where_the_rank_is_zero_is_written_with_factors_of_zeros(tmp_path):
    layout = LAYOUTS["scanned"]
    base, x = layout.base(golden("linear")[1]), golden("linear")[2]
    rule = lojax.Rule("layers/o/kernel", rank=[0, 2], variant="dora", axes=("stack", "in", "in", "out"))
    frozen, lora = lojax.init(jax.random.key(0), base, rule)
    keys = {f"base_model.model.layers.{i}.o.lora_magnitude_vector" for i in (0, 1)}
    lojax.peft.save(tmp_path / "start", lora, frozen, layout.names)
    assert keys & set(tensors_of(tmp_path / "start")) == {"base_model.model.layers.1.o.lora_magnitude_vector"}
    adapter = lora["layers"]["o"]["kernel"]
    lora["layers"]["o"]["kernel"] = lojax.Adapter(
        adapter.a, adapter.b, adapter.scale, adapter.axes, magnitude=adapter.magnitude * 1.5, ranks=adapter.ranks
    )
    lojax.peft.save(tmp_path / "out", lora, frozen, layout.names)
    tensors = tensors_of(tmp_path / "out")
    assert keys <= set(tensors)
    assert not tensors["base_model.model.layers.0.o.lora_A.weight"].any()
    again = lojax.peft.load(tmp_path / "out", base, layout.names)
    assert again["layers"]["o"]["kernel"].ranks == (1, 2)
    expected = outputs(layout, base, lora, x)
    np.testing.assert_allclose(outputs(layout, base, again, x), expected, rtol=1e-4, atol=1e-4)


def test_dora_beside_plain_lora_is_refused(tmp_path):
    rules = [lojax.Rule("layers/*/q/kernel", variant="dora"), "layers/1/v/kernel"]
    frozen, lora = lojax.init(jax.random.key(0), FLAT.base(golden("linear")[1]), rules, rank=2)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, FLAT.names)
    assert "one use_dora for all adapters; 2 of these are DoRA (layers/0/q/kernel) and 1 are not (layers/1/v/k" in text
    assert not (tmp_path / "out").exists()


def test_dora_of_the_other_end_is_refused(tmp_path):
    base = FLAT.base(golden("linear")[1])
    axes = ("out", "in")
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/0/q/kernel", rank=2, variant="dora", axes=axes)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, FLAT.names)
    assert "layers/0/q/kernel: the adapter has axes ('out', 'in')" in text and "Correct the rule" in text


def test_dora_on_experts_is_refused(tmp_path):
    base = EXPERTS.base(golden("experts")[1])
    axes = ("stack", "in", "out")
    frozen, lora = lojax.init(jax.random.key(0), base, "experts/up", rank=2, variant="dora", axes=axes)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, EXPERTS.names)
    assert "experts/up: the adapter is a DoRA one, and PEFT has no DoRA on parameters such as mlp.experts.up" in text


def test_lora_fa_is_plain_lora_on_disk(tmp_path):
    base = FLAT.base(golden("linear")[1])
    for variant in ("lora", "lora-fa"):
        frozen, lora = lojax.init(jax.random.key(0), base, "layers/*/q/kernel", rank=2, variant=variant)
        lojax.peft.save(tmp_path / variant, trained(lora), frozen, FLAT.names)
    one, other = (tensors_of(tmp_path / variant) for variant in ("lora", "lora-fa"))
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert not lojax.peft.read_config(tmp_path / "lora-fa")["use_dora"]


# --- token rows: PEFT holds the new rows, an adapter what is added to the base ---

ROWS_KEY = "base_model.model.embed.token_adapter.trainable_tokens_delta"
ROWS = Rule("embed/embedding", train="tokens", tokens=[7, 2])


def started(**settings):
    base = EMBEDDING.base(golden("tokens")[1])
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/*/q/kernel", rank=2, train=ROWS, **settings)
    return base, frozen, lora


# --- reading rows ---


@pytest.mark.parametrize("chosen", [{"embed": [7, 2]}, [7, 2]])
def test_rows_are_what_is_added_to_the_base(chosen, tmp_path):
    path = copied("tokens", tmp_path, config={"trainable_token_indices": chosen})
    _, tensors, x, y = golden("tokens")
    base = EMBEDDING.base(tensors)
    lora = lojax.peft.load(path, base, EMBEDDING.names)
    adapter = lora["embed"]["embedding"]
    assert adapter.variant == "tokens" and adapter.tokens == (7, 2) and adapter.axes == ("in", "out")
    np.testing.assert_allclose(
        adapter.rows + base["embed"]["embedding"][jnp.array([7, 2])], tensors_of(path)[ROWS_KEY], atol=1e-6
    )
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
    assert "embed/embedding differs" in refusal(path, EMBEDDING, "tokens")


@pytest.mark.parametrize("chosen", [{"embed": [7, 2]}, [7, 2]])
def test_missing_rows_are_named(chosen, tmp_path):
    path = copied("tokens", tmp_path, config={"trainable_token_indices": chosen})
    assert f"missing: {ROWS_KEY}" in refusal(edited(path, lambda found: found.pop(ROWS_KEY)), EMBEDDING, "tokens")


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
    text = refusal(
        edited(copied("tokens", tmp_path, config=config), lambda found: found.update(more)), EMBEDDING, "tokens"
    )
    assert ROWS_KEY in text and reason in text


def test_rows_of_what_is_no_embedding_are_refused(tmp_path):
    key = "base_model.model.head.token_adapter.trainable_tokens_delta"
    path = copied("tokens", tmp_path, config={"trainable_token_indices": {"head": [7, 2]}})
    text = refusal(edited(path, lambda found: found.update({key: found.pop(ROWS_KEY)})))
    assert f"{key} (token rows are of an embedding, and the name map has head/kernel as a linear weight there)" in text


# --- writing rows ---


def test_rows_are_written_whole(tmp_path):
    base, frozen, lora = started(dropout=0.25)
    lora["embed"]["embedding"] = jax.tree.map(lambda x: x + 0.5, lora["embed"]["embedding"])
    lojax.peft.save(tmp_path, lora, frozen, EMBEDDING.names, overwrite=True)
    np.testing.assert_allclose(
        tensors_of(tmp_path)[ROWS_KEY], base["embed"]["embedding"][jnp.array([7, 2])] + 0.5, atol=1e-6
    )
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
