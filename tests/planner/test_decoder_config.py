"""Configurations of decoders, and files that are not one."""

import json

import pytest

from lojax.planner.decoder_config import from_fields, read_config
from lojax.planner.plan import plan

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
}
SMALL = from_fields(LLAMA)


CONFIGS = {
    "missing": ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "lacks vocab_size"),
    "another kind": (LLAMA | {"model_type": "mamba"}, "model_type='mamba'; expected one of llama"),
    "no number": (LLAMA | {"hidden_size": "wide"}, "hidden_size='wide'; expected a whole number"),
    "heads": (LLAMA | {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
    "rope": (LLAMA | {"rope_scaling": {"type": "yarn"}}, "rope_scaling of type 'yarn'"),
    "rope fields": (
        LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        "rope_scaling lacks low_freq_factor",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_configs(name, tmp_path):
    fields, message = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_files_that_are_no_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="There is no preset and no file '9B'; expected one of tiny, 8B, 70B, 405B"):
        plan("9B", topology="v5e:2x2", mesh="fsdp=4")
