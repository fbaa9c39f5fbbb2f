"""``adapter_config.json``: PEFT's own matching, and refusals by name."""

from __future__ import annotations

import json

import pytest
from helpers import message

from lojax.peft.config import REFUSED, Config, read_config

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}


def read(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return read_config(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_features_are_named(tmp_path, name):
    text = message(ValueError, read, tmp_path, PLAIN | {name: [1]})
    assert f"{name}=[1] is not supported ({REFUSED[name]})" in text
    assert read(tmp_path, PLAIN | {name: None})["r"] == 8


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", 1])
def test_inits_that_changed_the_base_are_refused(tmp_path, init):
    text = message(ValueError, read, tmp_path, PLAIN | {"init_lora_weights": init})
    assert f"init_lora_weights={init!r} changed the base weights" in text
    assert "path_initial_model_for_weight_conversion=" in text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("{not json", "is not JSON: "),
        ("[1]", "holds a list; expected a JSON object"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; lojax reads 'LORA' adapters"),
        ({"peft_type": "LORA"}, "lacks the rank, r"),
        (PLAIN | {"r": 0}, "r=0 is not a valid value"),
        (PLAIN | {"r": True}, "r=True is not a valid value"),
        (PLAIN | {"lora_alpha": "16"}, "lora_alpha='16' is not a valid value"),
        (PLAIN | {"lora_alpha": float("nan")}, "lora_alpha=nan is not a valid value"),
        (PLAIN | {"lora_dropout": 1}, "lora_dropout=1 is not a valid value"),
        (PLAIN | {"rank_pattern": {"q": 1.5}}, "rank_pattern={'q': 1.5} is not a valid value"),
        (PLAIN | {"use_dora": "yes"}, "use_dora='yes' is not a valid value"),
        (PLAIN | {"trainable_token_indices": [1, -2]}, "trainable_token_indices=[1, -2] is not a valid value"),
        (
            PLAIN | {"trainable_token_indices": {"e": [3, 3]}},
            "={'e': [3, 3]} is not a valid value",
        ),
        (PLAIN | {"trainable_token_indices": {"e": 3}}, "trainable_token_indices={'e': 3} is not a valid value"),
        (PLAIN | {"use_dora": True, "target_parameters": ["w"]}, "PEFT has no DoRA on parameters. Adapt them with"),
        (PLAIN | {"bias": "some"}, "bias='some' is not a valid value"),
        (PLAIN | {"rank_pattern": {"(": 4}}, "'(' is not a regular expression"),
    ],
)
def test_wrong_fields_are_refused(tmp_path, fields, reason):
    text = message(ValueError, read, tmp_path, fields)
    assert reason in text and str(tmp_path) in text


def test_unknown_truthy_fields_are_kept_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="unknown fields use_magic are kept, and not acted on"):
        assert read(tmp_path, PLAIN | {"use_magic": True, "no_magic": False})["use_magic"] is True


@pytest.mark.parametrize(
    ("fields", "module", "expected"),
    [
        ({"target_modules": ["q"]}, "layers.0.q", True),
        ({"target_modules": ["q"]}, "layers.0.pq", False),
        ({"target_modules": ["layers.0.q"]}, "layers.0.q", True),
        ({"target_modules": r".*\.q"}, "layers.0.q", True),
        ({"target_modules": "q"}, "layers.0.q", False),
        ({"target_modules": ["q"], "exclude_modules": ["layers.0.q"]}, "layers.0.q", False),
        ({"target_modules": ["q"], "exclude_modules": r"layers\.0.*"}, "layers.0.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["0"]}, "layers.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1, 2]}, "model.layers.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1, 2]}, "model.layers.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "model.layers.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "layers.1.q", False),  # PEFT wants something before
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"}, "layers.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "h"}, "m.layers.0.q", False),
        ({"target_modules": ["model.layers.0.q"], "layers_to_transform": [1]}, "model.layers.0.q", True),
        ({"target_modules": None}, "layers.0.q", False),
    ],
)
def test_targets_are_matched_as_peft_does(fields, module, expected):
    assert Config(PLAIN | fields).targets(module) is expected


def test_patterns_take_the_first_key_that_matches():
    config = Config(PLAIN | {"rank_pattern": {"layers.0.q": 2, "q": 4}, "alpha_pattern": {"^q": 1, "0.q": 3}})
    assert [config.rank(m) for m in ("m.layers.0.q", "m.layers.1.q", "m.layers.1.v")] == [2, 4, 8]
    assert [config.scale(m, 2) for m in ("q", "a.0.q", "a.1.q")] == [0.5, 1.5, 8.0]
    assert Config(PLAIN | {"use_rslora": True}).scale("q", 4) == 8.0
