"""Patches of torch weights: their arithmetic. Whole models are in ``tests/cli/test_merge_files.py``."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import message

from lojax.files import safetensors
from lojax.peft import patch
from lojax.peft.patch import Replacement, Update, patches
from tests.peft.adapter_files import copied, edited
from tests.peft.layouts import golden


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("over", ["rows", "columns", None])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, safetensors.DTYPES["BF16"]])
def test_updates_in_blocks_are_those_of_the_whole(block, over, dtype, monkeypatch):
    monkeypatch.setattr(patch, "BLOCK", block)
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=shape) for shape in ((3, 5, 4), (3, 2, 4), (3, 5, 2)))
    w = w.astype(dtype)
    expected = w.astype(np.float64) + 0.5 * b @ a
    magnitude = None
    if over:
        magnitude = rng.uniform(1, 2, size=(3, 1, 4) if over == "rows" else (3, 5, 1))
        expected *= magnitude / np.linalg.norm(expected, axis=1 if over == "rows" else 2, keepdims=True)
    Update(a, b, 0.5, magnitude).apply(w)
    np.testing.assert_allclose(w.astype(np.float64), expected, rtol=2e-2 if w.itemsize == 2 else 1e-5, atol=1e-5)


def test_replacements_take_all_rows_or_some():
    w = np.zeros((4, 2), np.float32)
    Replacement(lambda: np.ones((2, 2)), (3, 1)).apply(w)
    assert w[:, 0].tolist() == [0, 1, 0, 1]
    Replacement(lambda: np.full((4, 2), 2.0)).apply(w)
    assert (w == 2).all()


@pytest.mark.parametrize(
    ("case", "spoil", "reason"),
    [
        ("linear", {"layers.0.q.lora_A.weight": None}, "layers.0.q.lora_B.weight has no lora_A beside it"),
        ("dora", {"layers.0.q.lora_magnitude_vector": None}, "layers.0.q has no lora_magnitude_vector"),
        ("dora", {"layers.0.q.lora_magnitude_vector": (5,)}, "has 5 entries, layers.0.q.weight 6 outputs"),
        ("dora", {"head.lora_magnitude_vector": (3,)}, "head.lora_magnitude_vector has no lora_A and lora_B beside it"),
        ("tokens", {"embed.token_adapter.trainable_tokens_delta": (3, 6)}, "(3, 6): rows [7, 2] have no place"),
        ("tokens", {"head.token_adapter.trainable_tokens_delta": (2, 6)}, "names no trainable_token_indices for head"),
        ("linear", {"head.weight": (3, 5)}, "head.weight (3, 5) has no place: head.weight is (3, 6)"),
    ],
)
def test_what_has_no_place_is_said(case, spoil, reason, tmp_path):
    def edit(tensors):
        for name, shape in spoil.items():
            if shape is None:
                tensors.pop(f"base_model.model.{name}")
            else:
                tensors[f"base_model.model.{name}"] = np.ones(shape, np.float32)

    base = {name: (value.dtype, value.shape) for name, value in golden(case)[1].items()}
    text = message(ValueError, patches, edited(copied(case, tmp_path), edit), base)
    assert reason in text and str(tmp_path) in text
