"""``python -m lojax convert``: PEFT to orbax and back, nothing lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from helpers import assert_same_bits

import lojax.peft
from lojax.cli.main import main
from lojax.store import safetensors
from lojax.store.checkpoint import restore

sys.path.insert(0, str(Path(__file__).parents[1] / "store" / "peft"))
from layouts import LAYOUTS, golden

LAYOUT = LAYOUTS["heads"]


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.txt"
    path.write_text("\n".join(rule.text for rule in LAYOUT.names.rules))
    return str(path)


def params_file(kind: str, tmp_path: Path) -> str:
    base = LAYOUT.base(golden("patterns")[1])
    if kind == "orbax":
        with ocp.StandardCheckpointer() as writer:
            writer.save(tmp_path / "params", base)
        return str(tmp_path / "params")
    if kind == "msgpack":
        (tmp_path / "params.msgpack").write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(base)))
        return str(tmp_path / "params.msgpack")
    flat = {path.replace("/", "."): np.asarray(leaf) for path, leaf in lojax.adapt.paths.flatten(base).items()}
    safetensors.write_all(tmp_path / "params.safetensors", flat, {})
    return str(tmp_path / "params.safetensors")


@pytest.mark.parametrize("kind", ["orbax", "msgpack", "safetensors"])
def test_there_and_back(kind, rules, tmp_path, capsys):
    source, tensors, *_ = golden("patterns")
    params = params_file(kind, tmp_path)
    assert main(["convert", str(source), str(tmp_path / "ours"), "--map", rules, "--params", params]) == 0
    expected = lojax.peft.load(source, LAYOUT.base(tensors), LAYOUT.names)
    assert_same_bits(restore(tmp_path / "ours"), expected)
    back = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--map", rules, "--params", params]
    assert main([*back, "--base", "org/base", "--task", "SEQ_CLS"]) == 0
    assert "->" in capsys.readouterr().out
    for name in ("adapter_model.safetensors",):
        one, other = (safetensors.open_file(path / name) for path in (source, tmp_path / "theirs"))
        assert_same_bits({k: one.read(k) for k in one.entries}, {k: other.read(k) for k in other.entries})
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "SEQ_CLS")
    assert config["auto_mapping"]["base_model_class"] == "Net", "fields lojax does not know are kept on the way"
    assert config["use_rslora"] is True and config["r"] == 2


def test_without_params_the_way_back_still_works(rules, tmp_path):
    params = params_file("safetensors", tmp_path)
    main(["convert", str(golden("linear")[0]), str(tmp_path / "ours"), "--map", rules, "--params", params])
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--map", rules]) == 0
    again = lojax.peft.load(tmp_path / "theirs", LAYOUT.base(golden("linear")[1]), LAYOUT.names)
    assert_same_bits(again, restore(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "pass --params with the JAX base"),
        (["--params", "nowhere"], "nowhere does not exist"),
        (["--params", "README.md"], "README.md is no orbax directory, .msgpack or .safetensors"),
        (["--map", "elmo"], "There is no ready name map 'elmo'"),
    ],
)
def test_wrong_arguments_say_what_to_do(arguments, reason, rules, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("")
    assert main(["convert", str(golden("linear")[0]), str(tmp_path / "out"), "--map", rules, *arguments]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_refused(rules, tmp_path, capsys):
    assert main(["convert", str(golden("linear")[0]), str(tmp_path), "--map", rules]) == 1
    assert "exists. Choose another directory, or pass --overwrite" in capsys.readouterr().err
