"""``adapter_config.json``: PEFT's own matching, and refusals by name."""

from __future__ import annotations

import json
import time

import pytest
from helpers import message

from lojax.peft.config import REFUSED, Config, read_config

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}


def read(tmp_path, text):
    data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    (tmp_path / "adapter_config.json").write_bytes(data)
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
        (PLAIN | {"rank_pattern": {"a)(b": 4}}, "'a)(b' is not a regular expression"),
        (PLAIN | {"rank_pattern": {"(?i)q": 4}}, "'(?i)q' is not a regular expression"),
        (PLAIN | {"modules_to_save": ["("]}, "'(' is not a regular expression"),
        (PLAIN | {"layers_pattern": ["[a"], "layers_to_transform": [1]}, "'[a' is not a regular expression"),
        (PLAIN | {"target_modules": "a{99999999999999999999}"}, "is not a regular expression"),
        (PLAIN | {"target_modules": "(" * 100_000}, "is not a regular expression"),
        (PLAIN | {"lora_alpha": 10**400}, "lora_alpha=1000000"),
        (PLAIN | {"lora_alpha": -(10**400)}, "is not a valid value"),
        (PLAIN | {"alpha_pattern": {"q": 10**400}}, "is not a valid value"),
        (PLAIN | {"r": 10**400}, "is not a valid value"),
        (PLAIN | {"rank_pattern": {"q": 2**40}}, "rank_pattern={'q': 1099511627776} is not a valid value"),
        (PLAIN | {"trainable_token_indices": [10**30]}, "is not a valid value"),
        (PLAIN | {"rank_pattern": dict.fromkeys(map(str, range(60_000)), 4)}, "rank_pattern holds 60,000 patterns"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "is not JSON: "),
        (b"\xff\xfe", "is not JSON: "),
        ("[" * 200_000, "is not JSON: "),
        (PLAIN | {"bias": []}, "bias=[] is not a valid value"),
        (PLAIN | {"init_lora_weights": {}}, "init_lora_weights={} changed the base weights"),
        (PLAIN | {"peft_type": ["LORA"]}, "peft_type is ['LORA']"),
        (PLAIN | {"target_modules": {"q": 1}}, "is not a valid value"),
        (PLAIN | {"layers_to_transform": {"1": 1}}, "is not a valid value"),
        (PLAIN | {"lora_bias": "\x1b[31m" * 1000}, "lora_bias='\\x1b[31m"),
    ],
)
def test_wrong_fields_are_refused(tmp_path, fields, reason):
    text = message(ValueError, read, tmp_path, fields)
    assert reason in text and str(tmp_path) in text
    assert len(text) < 2000 and text.isprintable(), "what the file holds is shortened and escaped"


@pytest.mark.parametrize("version", ["²", "0.²", "9" * 5000, "v", "", 3, None, [], {"a": 1}, "0.19.0" * 10_000])
def test_any_version_is_compared(version):
    assert Config(PLAIN | {"peft_version": version}).exchanges_experts in (True, False)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.18.1", True), ("0.19.0", False), ("0.21.2", False), ("0.20.1.dev0", False), ("1.0", False), (None, True)],
)
def test_peft_before_0_19_exchanged_the_axes_of_experts(version, expected):
    assert Config(PLAIN | {"peft_version": version}).exchanges_experts is expected


# --- regular expressions that would run for hours ---

SLOW = [
    "(a+)+$", "(a*)*b", "(.*a){20}x", "(a|a)*b", "(a|aa)+$", "(?:.*?)+x", ".*.*.*.*.*.*.*.*.*x", "(a?){30}a{30}",
    "(?x)(a+) +", "((a)*b?)*c", "(?P<n>a+)+", "(?i:a+)+", "([a]+)*", "(\\w+\\.?)+x", ".?" * 60,
]  # fmt: skip


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_could_run_for_hours_are_refused(field, pattern, tmp_path):
    value = {"rank_pattern": {pattern: 4}, "modules_to_save": [pattern]}.get(field, pattern)
    text = message(ValueError, read, tmp_path, PLAIN | {field: value})
    assert "could take hours to match" in text and "(a+)+" in text and str(tmp_path) in text


REAL = [
    r".*(q|k|v)_proj",
    r"^(?!.*visual).*(?:self_attn|mlp).*(?:q_proj|k_proj|v_proj)$",
    r"(?:.*?(?:vision|image|visual|patch|embed|tower|projector).*?(?:self_attn|attention|attn|mlp|feed_forward).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj)))",
    r"model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj)",
    r"(model\.)?(language_model\.)?layers\.(\d+)\.(self_attn\.[qv]_proj|mlp\.(up|down)_proj)",
    r"layers\.(1[0-9]|2[0-3])\.self_attn\.o_proj",
    r"[^.]+\.[(*]?q(?#comment (a+)q",
    r"\(a+\)+",
    r"^base\.layers\.0\.q",
]


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_that_people_write_are_taken(pattern, tmp_path):
    assert read(tmp_path, PLAIN | {"target_modules": pattern}).targets("model.layers.3.self_attn.k_proj") in (
        True,
        False,
    )


def test_many_patterns_and_names_cost_no_more_than_their_size(tmp_path):
    count = 40_000
    names = [f"layers.{i}.q" for i in range(count)]
    config = read(tmp_path, PLAIN | {"target_modules": names, "rank_pattern": dict.fromkeys(names, 4)})
    start = time.process_time()
    for module in ("layers.7.q", "model.layers.39999.q", "layers.7.v"):
        assert config.targets(module) is module.endswith("q")
        assert config.rank(module) == (4 if module.endswith("q") else 8)
    for i in range(3000):
        config.targets(f"other.{i}.q"), config.rank("layers.7.q"), config.scale("layers.7.q", 4)
    assert time.process_time() - start < 15


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
