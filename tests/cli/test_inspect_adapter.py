"""``python -m lojax inspect``: the table, its numbers, and what is no adapter."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from helpers import message, trained

import lojax
from lojax.analysis.analyze import analyze_leaves
from lojax.checkpoint.save_restore import save
from lojax.cli.adapter_leaves import adapter_leaves
from lojax.cli.inspect_adapter import describe
from lojax.cli.main import main
from lojax.cli.merge_files import merge
from lojax.files import safetensors
from tests.checkpoint import bank_cases
from tests.peft.adapter_files import copied, edited
from tests.peft.layouts import GOLDEN, golden


def test_the_table_of_a_peft_adapter(tmp_path, capsys):
    path = copied("patterns", tmp_path, config={"base_model_name_or_path": "org/base", "task_type": "SEQ_CLS"})
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = ["weight", "in", "->", "out", "rank", "scale", "parameters", "norm", "stable", "rank", "effective", "rank"]
    assert lines[0].split() == header
    found = {line.split()[0]: line.split() for line in lines[2:12]}
    assert found["layers.1.q"][1:7] == ["6", "->", "6", "3", "2.309", "36"]
    file = safetensors.open_file(path / "adapter_model.safetensors")
    a, b = (file.read(f"base_model.model.layers.1.q.lora_{side}.weight") for side in "AB")
    assert float(found["layers.1.q"][7]) == pytest.approx(4 / 3**0.5 * np.linalg.norm(b @ a), rel=1e-3)
    assert found["head.weight"][1:] == ["(3,", "6)", "full", "18"]
    facts = "\n".join(lines[12:])
    assert "base:        org/base" in facts and "task:        SEQ_CLS" in facts
    assert "parameters:  141 in 10 weights" in facts and "peft 0.21.2" in facts


def test_the_table_of_a_lojax_adapter(tmp_path):
    params = {"layers": {"w": jnp.ones((2, 4, 2, 3))}, "b": jnp.ones(3)}
    axes = ("stack", "in", "out", "out")
    frozen, lora = lojax.init(jax.random.key(0), params, "layers/w", rank=2, axes=axes, train="b")
    save(tmp_path, trained(lora), frozen=frozen, metadata={"step": 3})
    text = describe(tmp_path)
    words = " ".join(text.split())
    assert "layers/w[0] 4 -> 2*3 2 1 20" in words and "layers/w[1] 4 -> 2*3 2 1 20" in words
    assert (
        "b (3,) full 3" in words
        and "43 in 2 weights" in words
        and "{'step': 3}" in text
        and "known by its fingerprint" in text
    )


def test_the_experts_of_an_adapter_are_counted():
    text = describe(golden("experts")[0])
    words = " ".join(text.split())
    assert [f"mlp.experts.base_layer[{i}] 4 -> 6 2 1.5 20" in words for i in range(4)] == [True] * 3 + [False]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda t: t.pop("base_model.model.layers.0.q.lora_B.weight"),
            "layers.0.q.lora_A.weight has no lora_B beside it",
        ),
        (lambda t: t.update(stray=np.zeros(3)), "stray is not a key of PEFT"),
    ],
)
def test_what_is_no_adapter_is_refused(spoil, reason, tmp_path):
    assert reason in message(ValueError, describe, edited(copied("linear", tmp_path), spoil))


def test_an_empty_directory_is_refused(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "lojax inspect: " in (error := capsys.readouterr().err) and "holds no adapter_config.json" in error


def test_terminal_escapes_out_of_a_file_are_not_printed(tmp_path, capsys):
    config = {"base_model_name_or_path": "\x1b]0;owned\x07", "task_type": "\u202egnp.exe"}
    path = edited(
        copied("linear", tmp_path, config=config),
        lambda t: t.update({"base_model.model.\x1b[31mhead.weight": np.zeros(3, np.float32)}),
    )
    assert main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert all(line.isprintable() for line in output.splitlines()) and "\\x1b[31mhead.weight" in output
    edited(path, lambda t: t.update({"\x1b[31mstray": np.zeros(3, np.float32)}))
    assert main(["inspect", str(path)]) == 1
    assert "\\x1b[31mstray is not a key of PEFT" in (error := capsys.readouterr().err) and "\x1b" not in error


@pytest.mark.parametrize(
    "shapes", [((), (6, 2)), ((2,), (6, 2)), ((2, 6), (6,)), ((2, 6), (6, 3)), ((0, 6), (6, 0)), ((2, 6), (6, 2, 5))]
)
@pytest.mark.parametrize("experts", [False, True])
def test_factors_of_any_shape_are_refused(shapes, experts, tmp_path):
    pair = {
        f"base_model.model.layers.0.q.lora_{s}.weight": np.ones(shape, np.float32)
        for s, shape in zip("AB", shapes, strict=True)
    }
    config = {"target_parameters": ["w"]} if experts else {}
    text = message(ValueError, describe, edited(copied("linear", tmp_path, config=config), lambda t: t.update(pair)))
    assert "not factors of one rank" in text and str(tmp_path) in text


def test_factors_that_are_not_finite_are_shown_as_such(tmp_path):
    key = "base_model.model.layers.0.q.lora_A.weight"
    text = describe(edited(copied("linear", tmp_path), lambda t: t.update({key: np.full((2, 6), np.inf, np.float32)})))
    assert next(line for line in text.splitlines() if line.startswith("layers.0.q ")).split()[-3:] == ["nan"] * 3


def test_a_bank_shows_its_adapters(tmp_path, capsys):
    frozen, bank = bank_cases.plain()
    save(tmp_path, bank, frozen=frozen, metadata={"step": 3})
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["adapter", "weights", "rank", "scale", "parameters", "norm", "folder"]
    assert [line.split()[:5] for line in lines[2:5]] == [
        ["a/b", "1", "2", "2", "96"],
        ["../é", "2", "4", "0.25", "248"],
        ["A/B", "1", "1", "1", "14"],
    ]
    assert lines[6:10] == [
        "kind:        lojax bank of 3 adapters",
        "base:        known by its fingerprint",
        "metadata:    {'step': 3}",
        "parameters:  358",
    ]
    update = bank[2]["blocks"][1]
    norm = np.linalg.norm(np.asarray(update.a) @ np.asarray(update.b))
    assert lines[4].split()[5] == f"{norm:.4g}"
    assert main(["inspect", str(tmp_path / lines[3].split()[-1])]) == 0  # its folder is an adapter by itself
    assert "blocks/1" in capsys.readouterr().out


def test_a_damaged_bank_is_refused(tmp_path, capsys):
    save(tmp_path, bank_cases.at_step(1))
    (tmp_path / "bank-1" / "1-two" / "adapter.json").write_text("{}")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "1-two" in capsys.readouterr().err


# --- with a base ---


EXPERTS = {"experts": "out_in"}
"""What the shapes of a golden base do not tell."""


def row_of(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name + " ")).split()


def on_disk(kind: str, tmp_path) -> tuple:
    """A golden adapter, a base of random weights on disk, and the tensors that ``lojax merge`` makes of both."""
    path, tensors, *_ = golden(kind)
    rng = np.random.default_rng(0)
    tensors = {name: (value + rng.normal(size=value.shape)).astype(np.float32) for name, value in tensors.items()}
    base = tmp_path / "base.safetensors"
    safetensors.write_all(base, tensors, {})
    merge(base, path, tmp_path / "merged", experts=EXPERTS.get(kind))
    file = safetensors.open_file(tmp_path / "merged" / base.name)
    return path, base, tensors, {name: file.read(name) for name in tensors}


@pytest.mark.parametrize("kind", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_a_peft_adapter_beside_its_base_is_what_merging_changes(kind, tmp_path):
    path, base, before, after = on_disk(kind, tmp_path)
    rows = analyze_leaves(adapter_leaves(path, base, experts=EXPERTS.get(kind))[0]).rows
    bare = {row.path.removesuffix(".base_layer"): row for row in analyze_leaves(adapter_leaves(path, None)[0]).rows}
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {row.path for row in rows if row.norm is None or row.norm > 0}
    for name in {row.path for row in rows if row.spectrum is not None}:
        own = [row for row in rows if row.path == name]
        delta = after[name].astype(np.float64) - before[name]
        assert np.sqrt(sum(row.norm**2 for row in own)) == pytest.approx(np.linalg.norm(delta), rel=1e-4)
        if len(own) == 1:
            assert own[0].ratio == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(before[name]), rel=1e-4)
            other = bare.get(name.removesuffix(".weight"), own[0])
            assert (np.prod(own[0].ins), own[0].outs) == (np.prod(other.ins), other.outs)


def test_the_table_and_the_picture_beside_a_base(tmp_path, capsys):
    path, base, before, after = on_disk("linear", tmp_path)
    picture = tmp_path / "view.png"
    assert main(["inspect", str(path), "--base", str(base), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and f"picture:     {picture}" in text
    header = "weight in -> out rank norm ratio top ratio stable rank effective rank amplification intruders lost"
    assert " ".join(text.splitlines()[0].split()) == header
    name = "layers.0.q.weight"
    # The singular vectors on the side of the outputs, which are the rows of a weight of torch.
    u, tuned = (np.linalg.svd(w[name].astype(np.float64))[0] for w in (before, after))
    assert int(row_of(text, name)[11]) == (np.abs(tuned.T @ u).max(1) < 0.5).sum()


@pytest.mark.parametrize("form", ["orbax", "msgpack", "safetensors"])
def test_a_lojax_adapter_beside_its_base(form, tmp_path):
    rng = np.random.default_rng(0)
    params = {"layers": {"w": rng.normal(size=(2, 4, 3)).astype(np.float32)}, "b": np.ones(3, np.float32)}
    frozen, lora = lojax.init(jax.random.key(0), params, "layers/w", rank=2, axes=("stack", "in", "out"), train="b")
    lora = trained(lora)
    save(tmp_path / "adapter", lora, frozen=frozen)
    base = tmp_path / ("base" if form == "orbax" else f"base.{form}")
    if form == "orbax":
        with ocp.StandardCheckpointer() as writer:
            writer.save(base, params)
    elif form == "msgpack":
        base.write_bytes(serialization.msgpack_serialize(params))
    else:
        safetensors.write_all(base, {"layers.w": params["layers"]["w"], "b": params["b"]}, {})
    text = describe(tmp_path / "adapter", base=base)
    for row in lojax.analyze(frozen, lora).matrices:
        assert row_of(text, row.name)[6] == f"{row.ratio:.4g}" and row_of(text, row.name)[11] == str(row.intruders)
    quick = describe(tmp_path / "adapter", base=base, top=0)
    assert "intruders" not in quick and row_of(quick, "layers/w[0]")[6] == row_of(text, "layers/w[0]")[6]


def test_a_base_that_does_not_fit(tmp_path, capsys):
    params = {"layers": {"w": jnp.ones((4, 3))}}
    frozen, lora = lojax.init(jax.random.key(0), params, "layers/w", rank=2)
    save(tmp_path / "adapter", lora, frozen=frozen)
    for name, shape, reason in (
        ("layers.v", (4, 3), "has no layers/w; the nearest is layers/v"),
        ("layers.w", (5, 3), "the adapter is for a weight of shape (4, 3), and"),
    ):
        base = tmp_path / f"{name}.safetensors"
        safetensors.write_all(base, {name: np.ones(shape, np.float32)}, {})
        assert main(["inspect", str(tmp_path / "adapter"), "--base", str(base)]) == 1
        assert reason in capsys.readouterr().err
    path = golden("linear")[0]
    assert "does not fit the base" in message(ValueError, describe, path, base=base)
    assert "--top -1" in message(ValueError, describe, path, top=-1)
    save(tmp_path / "bank", bank_cases.at_step(1))
    assert "holds a bank; --base and --plot are for one adapter" in message(
        ValueError, describe, tmp_path / "bank", plot=tmp_path / "x.png"
    )


def test_without_matplotlib_the_command_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in message(ValueError, describe, golden("linear")[0], plot=tmp_path / "x.png")
