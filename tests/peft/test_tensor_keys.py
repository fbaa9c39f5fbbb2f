"""The keys of a file: each is one thing, and what is none is said."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import message

from lojax.files import safetensors
from lojax.peft.config import Config
from lojax.peft.name_map import TorchParameter
from lojax.peft.tensor_keys import FactorPair, assign, factor_keys, match_factors, read_keys

START = "base_model.model."


def keys_of(tmp_path, names, has_module=lambda module: True):
    tensors = {START + name: np.ones(2, np.float32) for name in names}
    safetensors.write_all(tmp_path / "x", tensors, {})
    return read_keys(safetensors.open_file(tmp_path / "x"), has_module)


def test_pairs_know_their_module_and_their_wrappers(tmp_path):
    names = ["m.base_layer.base_layer.lora_A.weight", "m.base_layer.base_layer.lora_B.weight", "e.lora_embedding_A"]
    names += ["e.lora_embedding_B", ".base_layer.lora_A.weight", ".base_layer.lora_B.weight"]
    keys = keys_of(tmp_path, names)
    found = {(pair.module, pair.depth, pair.is_embedding) for pair in keys.pairs}
    assert found == {("m", 2, False), ("e", 0, True), (".base_layer", 0, False)}
    assert keys.pairs[0].a.endswith("A.weight") and not keys.unexpected and not keys.full


def test_extras_and_full_parameters_are_found_under_their_names(tmp_path):
    names = ["q.lora_magnitude_vector", "p.lora_magnitude_vector.weight", "e.token_adapter.trainable_tokens_delta"]
    names += ["q.base_layer.bias", "head.modules_to_save.weight", "e.token_adapter.base_layer.weight"]
    keys = keys_of(tmp_path, names)
    assert [(key.module, key.extra.field) for key in keys.extras] == [
        ("q", "magnitude"),
        ("p", "magnitude"),
        ("e", "rows"),
    ]
    assert set(keys.full) == {"q.bias", "head.weight", "e.weight"}


def test_what_is_wrong_with_a_key_is_said(tmp_path):
    keys = keys_of(tmp_path, ["q.lora_A.weight", "k.lora_embedding_B", "a" * 1000 + ".weight"])
    assert list(keys.unexpected.values()) == [
        "is not a key of PEFT",
        "has no lora_B beside it",
        "has no lora_A beside it",
    ]
    assert "q.lora_B.bias holds a bias on B" in message(ValueError, keys_of, tmp_path / "..", ["q.lora_B.bias"])


def test_token_rows_of_a_tied_module_that_the_base_lacks_are_a_copy(tmp_path):
    names = [f"{m}.token_adapter.trainable_tokens_delta" for m in ("embed", "head")] + ["head.weight"]
    keys = keys_of(tmp_path, names, {"embed"}.__contains__)
    assert [key.module for key in keys.extras] == ["embed"] and not keys.full


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parameters_of_one_module_are_told_apart_by_shape_or_by_the_order_of_the_rules(order):
    weights = [
        TorchParameter(f"m.{name}", "experts", name, shape, ("expert", "in", "out"), {}, "", i)
        for name, shape, i in (("up", (3, 4, 6), order[0]), ("down", (3, 6, 4), order[1]))
    ]
    pairs = [FactorPair("m", depth, False, f"a{depth}", f"b{depth}") for depth in (0, 1)]
    shapes = {"a1": (3, 4), "b1": (6, 3), "a0": (3, 6), "b0": (4, 3)}
    config = Config({"r": 1, "peft_version": "0.21.0"})
    matched, unexpected = match_factors(pairs, {"m": weights}, shapes, config)
    assert {weight.path: a for weight, a, _ in matched} == {"up": "a1", "down": "a0"} and not unexpected
    matched, unexpected = match_factors(pairs, {"m": weights[:1]}, shapes, config)
    assert not matched and set(unexpected) == set(shapes)


def test_assignments_are_found_without_trying_every_order():
    shapes = {f"w{i}": ((1, i), (i, 1)) for i in range(2000)}
    assert assign(list(shapes.values())[::-1], shapes) == list(shapes)[::-1]
    assert assign([((9, 9), (9, 9))], shapes) is None
    assert assign([shapes["w1"]] * 2, shapes) is None


def test_the_keys_of_a_parameter():
    weight = TorchParameter("m.weight", "linear", "w", (2, 2), ("in", "out"), {}, "")
    assert factor_keys(weight, 1) == (f"{START}m.base_layer.lora_A.weight", f"{START}m.base_layer.lora_B.weight")
