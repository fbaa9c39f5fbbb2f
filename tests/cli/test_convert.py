"""``python -m lojax convert``: PEFT to orbax and back, nothing lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from helpers import assert_same_bits

import lojax
import lojax.peft
from lojax.checkpoint.save_restore import restore
from lojax.cli.main import main
from lojax.files import safetensors
from tests.peft.adapter_files import copied
from tests.peft.layouts import EMBEDDING, LAYOUTS, golden

LAYOUT = LAYOUTS["heads"]


def rules_file(layout: Any, tmp_path: Path) -> str:
    path = tmp_path / "rules.txt"
    path.write_text("\n".join(rule.text for rule in layout.names.rules))
    return str(path)


@pytest.fixture
def rules(tmp_path):
    return rules_file(LAYOUT, tmp_path)


def params_file(kind: str, tmp_path: Path, layout: Any = LAYOUT, case: str = "patterns") -> str:
    base = layout.base(golden(case)[1])
    if kind == "orbax":
        with ocp.StandardCheckpointer() as writer:
            writer.save(tmp_path / "params", base)
        return str(tmp_path / "params")
    if kind == "msgpack":
        (tmp_path / "params.msgpack").write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(base)))
        return str(tmp_path / "params.msgpack")
    flat = {path.replace("/", "."): np.asarray(leaf) for path, leaf in lojax.adapters.paths.flatten(base).items()}
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


@pytest.mark.parametrize("kind", ["orbax", "msgpack", "safetensors"])
@pytest.mark.parametrize(("case", "layout"), [("tokens", EMBEDDING), ("dora_embedding", EMBEDDING)])
def test_what_needs_numbers_of_the_base_gets_them_from_params(case, layout, kind, tmp_path):
    """PEFT has whole token rows, an adapter what is added to those of the base."""
    source, tensors, *_ = golden(case)
    options = ["--map", rules_file(layout, tmp_path), "--params", params_file(kind, tmp_path, layout, case)]
    assert main(["convert", str(source), str(tmp_path / "ours"), *options]) == 0
    expected = lojax.peft.load(source, layout.base(tensors), layout.names)
    assert_same_bits(restore(tmp_path / "ours"), expected)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), *options]) == 0
    one, other = (safetensors.open_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "theirs"))
    assert one.entries.keys() == other.entries.keys()
    for key in one.entries:
        np.testing.assert_allclose(one.read(key), other.read(key), rtol=1e-6, atol=1e-6)


def test_token_rows_without_params_say_what_to_do(tmp_path, capsys):
    rules, params = rules_file(EMBEDDING, tmp_path), params_file("safetensors", tmp_path, EMBEDDING, "tokens")
    main(["convert", str(golden("tokens")[0]), str(tmp_path / "ours"), "--map", rules, "--params", params])
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--map", rules]) == 1
    error = capsys.readouterr().err
    assert "embed/embedding has token rows" in error and "pass --params with the JAX base" in error
    assert not (tmp_path / "theirs").exists()


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
        (["--params", "README.md"], "README.md is not an orbax directory, .msgpack or .safetensors"),
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


def as_safetensors(tensors: Any, path: Path) -> None:
    safetensors.write_all(path, tensors, {})


BROKEN = {
    "strings.msgpack": lambda path: path.write_bytes(serialization.msgpack_serialize({"a": {"b": "text"}})),
    "numbers.msgpack": lambda path: path.write_bytes(serialization.msgpack_serialize({"a": 3})),
    "root.msgpack": lambda path: path.write_bytes(serialization.msgpack_serialize("text")),
    "noise.msgpack": lambda path: path.write_bytes(bytes(range(256))),
    "empty.msgpack": lambda path: path.write_bytes(b""),
    "noise.safetensors": lambda path: path.write_bytes(bytes(range(256))),
    "leaf_and_dict.safetensors": lambda path: as_safetensors({"a": np.ones(1), "a.b": np.ones(1)}, path),
    "not_orbax": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_params_that_are_broken_are_refused_with_their_path(name, rules, tmp_path, capsys):
    BROKEN[name](tmp_path / name)
    arguments = ["convert", str(golden("linear")[0]), str(tmp_path / "out"), "--map", rules]
    assert main([*arguments, "--params", str(tmp_path / name)]) == 1
    assert f"{tmp_path / name} does not hold a parameter tree (" in capsys.readouterr().err


def test_a_file_of_rules_that_is_broken_is_named(tmp_path, capsys):
    for data in (b"not a rule", b"\xff\xfe"):
        (tmp_path / "rules.txt").write_bytes(data)
        arguments = ["convert", str(golden("linear")[0]), str(tmp_path / "out"), "--map", str(tmp_path / "rules.txt")]
        assert main(arguments) == 1
        assert f"{tmp_path / 'rules.txt'}: " in capsys.readouterr().err


@pytest.mark.parametrize("target", ["params", ".", "adapter"])
def test_a_target_that_is_or_holds_an_input_is_refused(target, rules, tmp_path, capsys):
    params_file("orbax", tmp_path)
    copied("linear", tmp_path / "adapter")
    before = sorted(map(str, tmp_path.rglob("*")))
    arguments = ["--map", rules, "--params", str(tmp_path / "params"), "--overwrite"]
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / target), *arguments]) == 1
    assert "which is an input" in capsys.readouterr().err
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_overwrite_replaces_only_what_lojax_wrote(rules, tmp_path, capsys):
    params = params_file("safetensors", tmp_path)
    there = [
        "convert",
        str(golden("linear")[0]),
        str(tmp_path / "ours"),
        "--map",
        rules,
        "--params",
        params,
        "--overwrite",
    ]
    back = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--map", rules, "--overwrite"]
    for arguments, target in ((there, "ours"), (back, "theirs")):
        assert main(arguments) == 0 and main(arguments) == 0
        (tmp_path / target / "notes.txt").write_text("precious")
        assert main(arguments) == 1
        assert "holds notes.txt, which lojax did not write" in capsys.readouterr().err
        (tmp_path / target / "notes.txt").unlink()
    copied("linear", tmp_path / "of PEFT")
    (tmp_path / "of PEFT" / "golden.safetensors").unlink()
    assert main([*back[:2], str(tmp_path / "of PEFT"), *back[3:]]) == 1


def test_the_home_of_the_user_is_known(rules, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    params_file("safetensors", tmp_path)
    copied("linear", tmp_path / "adapter")
    assert main(["convert", "~/adapter", "~/ours", "--map", "~/rules.txt", "--params", "~/params.safetensors"]) == 0
    assert main(["inspect", "~/ours"]) == 0


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_an_adapter_of_a_moved_weight_is_converted_with_its_start(init, tmp_path, capsys):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)}
    settings = {"base": "nf4"} if init == "loftq" else {}
    frozen, start = lojax.init(jax.random.key(0), params, "w", rank=2, alpha=3, init=init, **settings)
    lora = {"w": dataclasses.replace(start["w"], a=start["w"].a + 0.1, b=start["w"].b - 0.2)}
    lojax.save(tmp_path / "trained", lora, frozen=frozen)
    lojax.save(tmp_path / "start", start, frozen=frozen)
    (tmp_path / "rules.txt").write_text("w <-> w.weight")
    arguments = ["convert", str(tmp_path / "trained"), str(tmp_path / "theirs"), "--map", str(tmp_path / "rules.txt")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "w: the start of this adapter was taken out of its weight" in error and "Pass --start" in error
    assert not (tmp_path / "theirs").exists()
    assert main([*arguments, "--start", str(tmp_path / "start")]) == 0
    file = safetensors.open_file(tmp_path / "theirs" / "adapter_model.safetensors")
    down, up = (np.float64(next(file.read(name) for name in file.entries if f"lora_{x}" in name)) for x in "AB")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    update = config["lora_alpha"] / config["r"] * (up @ down).T  # what PEFT itself computes
    adapters = [jax.tree.map(np.float64, tree["w"]) for tree in (lora, start)]
    trained, at_start = (adapter.scale * adapter.a @ adapter.b for adapter in adapters)
    np.testing.assert_allclose(update, trained - at_start, rtol=0, atol=3e-6)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "x"), *arguments[3:], "--start", "start"]) == 1
    assert "--start is for an adapter that lojax.save wrote" in capsys.readouterr().err
