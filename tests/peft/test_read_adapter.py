"""Adapters that real PEFT wrote compute here what they computed there; what does not fit is refused whole."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, message

import lojax
import lojax.peft
from lojax.adapters.adapter import is_adapter
from lojax.files import safetensors
from tests.peft.adapter_files import copied, edited, outputs, tensors_of, written
from tests.peft.layouts import EXPERTS, LAYOUTS, ROWS, golden, shaped

FLAT = LAYOUTS["flat"]
KEY = "base_model.model.layers.0.q.lora_A.weight"


@pytest.mark.parametrize(("case", "name", "layout"), ROWS, ids=[f"{case}-{name}" for case, name, _ in ROWS])
def test_adapters_of_real_peft_give_its_outputs(case, name, layout):
    path, tensors, x, y = golden(case)
    base = layout.base(tensors)
    lora = lojax.peft.load(path, base, layout.names)
    before = np.asarray(layout.apply(base, x))
    assert np.abs(before - y).max() > 0.1, "the adapter does nothing: this would prove nothing"
    np.testing.assert_allclose(outputs(layout, base, lora, x), y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_shapes_are_enough(name):
    path, tensors, *_ = golden("linear")
    layout = LAYOUTS[name]
    from_shapes = lojax.peft.load(path, shaped(layout.shapes), layout.names)
    from_arrays = lojax.peft.load(path, layout.base(tensors), layout.names)
    assert jax.tree.structure(from_shapes) == jax.tree.structure(from_arrays)


def test_the_adapter_has_the_scale_axes_and_dropout_of_the_config(tmp_path):
    path = copied("patterns", tmp_path, config={"lora_dropout": 0.25})
    lora = lojax.peft.load(path, FLAT.base(golden("patterns")[1]), FLAT.names)
    q, v = lora["layers"]["1"]["q"]["kernel"], lora["layers"]["0"]["v"]["kernel"]
    assert (q.rank, q.scale, q.dropout, q.axes) == (3, 4 / 3**0.5, 0.25, ("in", "out"))
    assert (v.rank, v.scale) == (1, 5.0)


def test_every_layer_of_a_stack_keeps_its_rank_and_scale():
    layout = LAYOUTS["scanned"]
    lora = lojax.peft.load(golden("patterns")[0], layout.base(golden("patterns")[1]), layout.names)
    q, v = lora["layers"]["q"]["kernel"], lora["layers"]["v"]["kernel"]
    assert (q.ranks, q.scale) == ((2, 3), (4 / 2**0.5, 4 / 3**0.5))
    assert (v.ranks, v.scale) == ((1, 2), (5.0, 5 / 2**0.5))
    assert not q.a[0, :, 2:].any() and not q.b[0, 2:].any() and q.a[1, :, 2].any()


@pytest.mark.parametrize(("dtype", "expected"), [(jnp.bfloat16, jnp.bfloat16), (None, jnp.float32)])
def test_the_dtype_is_chosen(dtype, expected):
    path, tensors, *_ = golden("linear")
    lora = lojax.peft.load(path, FLAT.base(tensors), FLAT.names, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(expected)}


def test_only_some_layers_of_a_scanned_leaf_are_adapted_and_saved_in_full():
    path, tensors, *_ = golden("some_layers")
    layout = LAYOUTS["scanned"]
    lora = lojax.peft.load(path, layout.base(tensors), layout.names)
    o = lora["layers"]["o"]["kernel"]
    assert is_adapter(o) and o.ranks == (0, 2) and o.scale == 1.0
    assert not o.a[0].any() and not o.b[0].any() and o.a[1].any()
    text = message(ValueError, lojax.peft.load, partly_saved(path), shaped(layout.shapes), layout.names)
    assert "holds 1 of its 2 entries" in text and "pass its arrays" in text


def partly_saved(path: Path) -> Path:
    return edited(path, lambda tensors: tensors.pop("base_model.model.layers.0.o.bias"))


def test_the_base_embedding_that_peft_saves_beside_its_adapter_must_be_ours(tmp_path):
    layout = {name: layout for _, name, layout in ROWS}["embedding"]
    _, tensors, *_ = golden("embedding")
    base = layout.base(tensors)
    key = "base_model.model.embed.base_layer.weight"
    path = edited(copied("embedding", tmp_path), lambda found: found.update({key: tensors["embed.weight"]}))
    assert is_adapter(lojax.peft.load(path, base, layout.names)["embed"]["embedding"])
    path = edited(path, lambda found: found.update({key: tensors["embed.weight"] + 1}))
    assert "embed/embedding differs" in message(ValueError, lojax.peft.load, path, base, layout.names)


# --- experts ---


def test_experts_of_older_peft_with_in_and_out_exchanged(tmp_path):
    """PEFT before 0.19 took ``[E, out, in]`` parameters for ``[E, in, out]``: the same update, other tensors."""
    tensors = golden("experts")[1]
    base = EXPERTS.base(tensors)

    def exchange(found: dict[str, np.ndarray]) -> None:
        for module in ("mlp.experts.base_layer", "mlp.experts"):
            a, b = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
            one, other = found[a].reshape(3, 2, -1), found[b].reshape(-1, 2, 3)
            found[a], found[b] = other.transpose(2, 1, 0).reshape(6, -1), one.transpose(2, 1, 0).reshape(-1, 6)

    new = lojax.peft.load(copied("experts", tmp_path / "new"), base, EXPERTS.names)
    old = lojax.peft.load(
        edited(copied("experts", tmp_path / "old", config={"peft_version": "0.18.1"}), exchange), base, EXPERTS.names
    )
    weights = [np.asarray(lojax.merge(base, lora)["experts"]["up"]) for lora in (new, old)]
    np.testing.assert_allclose(*weights, atol=1e-6)


@pytest.mark.parametrize(("version", "exchanged"), [("0.18.1", True), ("0.19.0", False), (None, True)])
def test_the_version_decides_for_square_experts(tmp_path, version, exchanged):
    rng = np.random.default_rng(0)
    base = {"w": jnp.zeros((2, 4, 4))}
    names = lojax.peft.NameMap.parse("w[expert, in, out] <-> experts.w : experts")
    a, b = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_parameters": ["w"], "peft_version": version}
    written(
        tmp_path, fields, {"base_model.model.experts.lora_A.weight": a, "base_model.model.experts.lora_B.weight": b}
    )
    update = lojax.merge(base, lojax.peft.load(tmp_path, base, names))["w"]
    spec = "ore,eri->eoi" if exchanged else "ore,eri->eio"  # torch has [E, out, in], JAX [E, in, out]
    expected = np.einsum(spec, b.reshape(4, 3, 2), a.reshape(2, 3, 4))
    np.testing.assert_allclose(update, expected, atol=1e-5)


def test_where_shapes_do_not_tell_the_first_rule_is_the_innermost_wrapper(tmp_path):
    """PEFT wraps a module's parameters in the order in which torch registered them; the rules say which that is."""
    base = {"first": jnp.zeros((2, 4, 4)), "second": jnp.zeros((2, 4, 4))}
    ordered = lojax.peft.NameMap.parse(
        "second[expert, in, out] <-> experts.second : experts\nfirst[expert, in, out] <-> experts.first : experts"
    )
    fields = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_parameters": ["first", "second"],
        "peft_version": "0.21",
    }
    ones = {f"base_model.model.experts.lora_{side}.weight": np.ones(shape, np.float32) for side, shape in SQUARE}
    twos = {key.replace("experts.", "experts.base_layer."): 2 * value for key, value in ones.items()}
    update = lojax.merge(base, lojax.peft.load(written(tmp_path, fields, ones | twos), base, ordered))
    assert (update["first"] == 1).all() and (update["second"] == 4).all()


SQUARE = (("A", (2, 4)), ("B", (4, 2)))


def test_two_experts_parameters_are_told_apart_by_shape_whatever_the_order_of_the_rules():
    path, tensors, x, y = golden("experts")
    base = EXPERTS.base(tensors)
    backwards = lojax.peft.NameMap(EXPERTS.names.rules[::-1])
    np.testing.assert_allclose(outputs(EXPERTS, base, lojax.peft.load(path, base, backwards), x), y, atol=1e-5)


# --- what does not fit ---


def refusal(path: Path, names: Any = FLAT.names) -> str:
    return message(ValueError, lojax.peft.load, path, FLAT.base(golden("linear")[1]), names)


def test_an_adapter_for_another_architecture_is_refused():
    text = refusal(golden("conv2d")[0])
    assert "is an adapter for another architecture, or the name map is for another: no key fits the base" in text
    assert "unexpected: base_model.model.point.lora_A.weight (nearest in the base:" in text


def test_every_missing_unexpected_and_misshapen_key_is_listed(tmp_path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["base_model.model.layers.7.q.lora_A.weight"] = tensors.pop("base_model.model.layers.1.q.lora_A.weight")
        del tensors["base_model.model.layers.1.v.lora_A.weight"], tensors["base_model.model.layers.1.v.lora_B.weight"]
        tensors["base_model.model.layers.0.o.lora_A.weight"] = np.zeros((2, 5), np.float32)
        tensors["stray"] = np.zeros(3, np.float32)

    text = refusal(edited(copied("linear", tmp_path), spoil))
    assert "does not fit the base:" in text
    assert "unexpected: base_model.model.layers.7.q.lora_A.weight" in text
    assert "unexpected: base_model.model.layers.1.q.lora_B.weight" in text  # without its partner
    assert "missing: base_model.model.layers.1.v.lora_A.weight" in text
    assert (
        "mis-shaped: base_model.model.layers.0.o.lora_A.weight is (2, 5); layers/0/o/kernel (6, 6) needs (2, 6)" in text
    )
    assert "unexpected: stray" in text
    assert "print(name_map.table(params)) shows" in text


def test_a_rank_that_differs_from_the_config_is_refused(tmp_path):
    text = refusal(copied("linear", tmp_path, config={"r": 4}))
    assert f"{KEY} has rank 2, adapter_config.json says 4 for layers.0.q" in text


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    path = copied("linear", tmp_path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    text = refusal(path)
    assert "is a pickle, which can run any code" in text and "safetensors.torch.save_file(torch.load(" in text


def test_missing_files_are_named(tmp_path):
    base = FLAT.base(golden("linear")[1])
    load = lambda path: message(FileNotFoundError, lojax.peft.load, path, base, FLAT.names)
    assert "is not a directory" in load(tmp_path / "nothing")
    copied("linear", tmp_path / "dir" / "named")
    assert "It holds adapters in the subdirectories named: pass one of these" in load(tmp_path / "dir")
    (tmp_path / "dir" / "named" / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in load(tmp_path / "dir" / "named")


@pytest.mark.parametrize(
    ("key", "feature"),
    [
        ("base_model.model.layers.0.q.lora_B.bias", "a bias on B"),
        ("base_model.model.layers.0.q.lora_diag", "KaSA"),
    ],
)
def test_keys_of_unsupported_features_are_named(tmp_path, key, feature):
    path = edited(copied("linear", tmp_path), lambda tensors: tensors.update({key: np.zeros(6, np.float32)}))
    text = refusal(path)
    assert key in text and feature in text


def test_a_map_that_does_not_say_which_axes_are_in_is_refused():
    layout = LAYOUTS["heads"]
    names = lojax.peft.NameMap.parse("layers/{i}/{m:q,v,o}/kernel <-> layers.{i}.{m}")
    text = message(ValueError, lojax.peft.load, golden("linear")[0], shaped(layout.shapes), names)
    assert "does not say which axes are in and out. Spell them, as in kernel[in, out, out]" in text


def test_names_that_look_like_paths_are_only_names(tmp_path):
    key = "base_model.model.../../etc/passwd.lora_A.weight"
    path = edited(copied("linear", tmp_path), lambda tensors: tensors.update({key: np.zeros((2, 6), np.float32)}))
    assert f"unexpected: {key}" in refusal(path)


def test_a_rank_above_both_sides_of_the_weight_is_imported_exactly(tmp_path):
    """PEFT allows it; a new adapter of ours would have its rank lowered."""
    rng, keys = np.random.default_rng(0), {}

    def widen(tensors: dict[str, np.ndarray]) -> None:
        for key, old in tensors.items():
            shape = (9, old.shape[1]) if "lora_A" in key else (old.shape[0], 9)
            keys[key] = tensors[key] = rng.normal(size=shape).astype(np.float32)

    base = FLAT.base(golden("linear")[1])
    path = edited(copied("linear", tmp_path, config={"r": 9, "lora_alpha": 18}), widen)
    lora = lojax.peft.load(path, base, FLAT.names)
    q = lora["layers"]["0"]["q"]["kernel"]
    assert (q.rank, q.scale, q.requested_rank) == (9, 2.0, None) and q.rank > max(q.weight_shape)
    a, b = keys[KEY], keys[KEY.replace("lora_A", "lora_B")]
    merged = lojax.merge(lojax.peft.freeze(base, lora), lora)["layers"]["0"]["q"]["kernel"]
    np.testing.assert_allclose(merged, base["layers"]["0"]["q"]["kernel"] + 2 * (b @ a).T, rtol=1e-5, atol=1e-5)
    lojax.peft.save(tmp_path / "again", lora, lojax.peft.freeze(base, lora), FLAT.names)
    again = lojax.peft.load(tmp_path / "again", base, FLAT.names)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


# --- hostile and damaged files ---


def test_a_changed_digit_in_the_config_of_our_own_files_is_noticed(tmp_path):
    """It changes the scale and nothing else: no shape tells."""
    base = FLAT.base(golden("linear")[1])
    lora = lojax.peft.load(golden("linear")[0], base, FLAT.names)
    lojax.peft.save(tmp_path, lora, lojax.peft.freeze(base, lora), FLAT.names)
    config = tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    assert fields["lora_alpha"] == 3
    config.write_text(json.dumps(fields | {"lora_alpha": 5}))
    text = refusal(tmp_path)
    assert (
        f"{config} is not the one that lojax wrote beside adapter_model.safetensors: lora_alpha is 5, and was 3" in text
    )
    assert "safetensors.numpy.save_file(t, path, metadata={'format': 'pt'})" in text
    config.write_text(json.dumps(fields | {"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/other"}))
    assert_same_bits(lojax.peft.load(tmp_path, base, FLAT.names), lora)


def test_the_way_to_keep_a_config_that_was_changed_on_purpose_works(tmp_path):
    safetensors_of_others = pytest.importorskip("safetensors.numpy")
    base = FLAT.base(golden("linear")[1])
    lora = lojax.peft.load(golden("linear")[0], base, FLAT.names)
    lojax.peft.save(tmp_path, lora, lojax.peft.freeze(base, lora), FLAT.names)
    config, path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 30'))
    assert "lora_alpha is 30, and was 3" in refusal(tmp_path)
    safetensors_of_others.save_file(safetensors_of_others.load_file(path), path, metadata={"format": "pt"})
    again = lojax.peft.load(tmp_path, base, FLAT.names)
    assert again["layers"]["0"]["q"]["kernel"].scale == 10 * lora["layers"]["0"]["q"]["kernel"].scale


@pytest.mark.parametrize("record", ["{", "[1]", "3", "[" * 100_000, '{"r": 77}'])
def test_a_record_of_the_config_that_is_no_such_thing_is_refused(record, tmp_path):
    path = copied("linear", tmp_path)
    tensors = tensors_of(path)
    (path / "adapter_model.safetensors").unlink()
    safetensors.write_all(path / "adapter_model.safetensors", tensors, {"lojax_config": record})
    text = refusal(path)
    assert "lojax_config in its metadata is not a JSON object" in text or "r is 2, and was 77" in text


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (
            ["base_model.model.head.weight", "base_model.model.head.base_layer.weight"],
            "is the second tensor for one place",
        ),
        (
            ["base_model.model.head.modules_to_save.weight", "base_model.model.head.weight"],
            "is the second tensor for one",
        ),
        (["base_model.model." + "a." * 600 + "weight"], "is not a key of PEFT"),
    ],
)
def test_keys_that_would_be_dropped_in_silence_are_refused(keys, reason, tmp_path):
    more = {f"base_model.model.{key}": np.full((3, 6), i, np.float32) for i, key in enumerate(keys)}
    text = refusal(edited(copied("linear", tmp_path), lambda tensors: tensors.update(more)))
    assert reason in text and len(text) < 1000


def test_two_spellings_of_one_magnitude_are_refused(tmp_path):
    key = "base_model.model.layers.0.q.lora_magnitude_vector"
    more = {f"{key}.weight": np.ones(6, np.float32)}
    path = edited(copied("dora", tmp_path), lambda tensors: tensors.update(more))
    text = message(ValueError, lojax.peft.load, path, FLAT.base(golden("dora")[1]), FLAT.names)
    assert "is the second tensor for one place" in text


def test_factors_of_whole_numbers_are_refused(tmp_path):
    path = edited(copied("linear", tmp_path), lambda tensors: tensors.update({KEY: tensors[KEY].view(np.int32)}))
    assert f"unexpected: {KEY} holds int32, not floating-point numbers" in refusal(path)


def test_a_parameter_of_whole_numbers_in_the_place_of_another_is_refused(tmp_path):
    key = "base_model.model.head.weight"
    path = edited(copied("patterns", tmp_path), lambda tensors: tensors.update({key: tensors[key].view(np.int32)}))
    text = message(ValueError, lojax.peft.load, path, FLAT.base(golden("patterns")[1]), FLAT.names)
    assert f"{key} holds int32; head/kernel is float32" in text and str(path) in text


MANY = {
    "foreign keys": lambda i: f"key{i}",
    "modules of no base": lambda i: f"base_model.model.layers.{i}.q.lora_A.weight",
    "parameters of no base": lambda i: f"base_model.model.layers.{i}.weight",
    "magnitudes of no base": lambda i: f"base_model.model.layers.{i}.lora_magnitude_vector",
    "token rows of no base": lambda i: f"base_model.model.layers.{i}.token_adapter.trainable_tokens_delta",
    "wrappers": lambda i: f"base_model.model.layers{'.base_layer' * (i % 80)}.{i}.lora_B.weight",
}


@pytest.mark.parametrize("kind", MANY)
def test_the_time_to_refuse_many_keys_is_linear_in_their_number(kind, tmp_path):
    count = 20_000
    path = written(
        tmp_path,
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]},
        {MANY[kind](i): np.zeros(1, np.float16) for i in range(count)},
    )
    start = time.process_time()
    text = refusal(path)
    assert time.process_time() - start < 5
    assert "more" in text and len(text) < 10_000 and str(path) in text


def test_terminal_escapes_out_of_a_file_are_not_printed(tmp_path):
    more = {"base_model.model.\x1b[31mred\x07.lora_A.weight": np.zeros((2, 6), np.float32), "\ud800": np.zeros(1)}
    text = refusal(edited(copied("linear", tmp_path), lambda tensors: tensors.update(more)))
    assert "\\x1b[31mred" in text and "\\ud800" in text and all(line.isprintable() for line in text.splitlines())


# --- ranks ---


@pytest.mark.parametrize("rank", [4, 8, 20])
def test_a_rank_above_the_sides_of_its_weight_is_loaded_as_it_is(rank, tmp_path):
    """PEFT allows it, as on a head of three classes: there the update is of rank 3, and the factors are not."""
    rng = np.random.default_rng(rank)
    a, b = rng.normal(size=(rank, 6)).astype(np.float32), rng.normal(size=(3, rank)).astype(np.float32)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["head"]}
    tensors = {f"base_model.model.head.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
    base = FLAT.base(golden("linear")[1])
    lora = lojax.peft.load(written(tmp_path / "in", fields, tensors), base, FLAT.names)
    head = lora["head"]["kernel"]
    assert (head.rank, head.scale, head.requested_rank) == (rank, 2.0, None), "that of a new adapter would be lowered"
    frozen = lojax.peft.freeze(base, lora)
    merged = lojax.merge(frozen, lora)["head"]["kernel"]
    np.testing.assert_allclose(merged, base["head"]["kernel"] + 2 * (b @ a).T, rtol=1e-5, atol=1e-4)
    x = golden("linear")[2]
    np.testing.assert_allclose(
        outputs(FLAT, base, lora, x), FLAT.apply(lojax.merge(frozen, lora), x), rtol=1e-4, atol=1e-4
    )
    lojax.peft.save(tmp_path / "out", lora, frozen, FLAT.names)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)
    lojax.save(tmp_path / "orbax", lora)
    assert_same_bits(lojax.restore(tmp_path / "orbax"), lora)


def test_the_home_of_the_user_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copied("linear", tmp_path / "adapter")
    base = FLAT.base(golden("linear")[1])
    lora = lojax.peft.load("~/adapter", base, FLAT.names)
    lojax.peft.save("~/again", lora, lojax.peft.freeze(base, lora), FLAT.names)
    assert lojax.peft.read_config("~/again")["r"] == 2 and (tmp_path / "again").is_dir()
