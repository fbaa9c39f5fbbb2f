"""``python -m lojax inspect``: the table, its numbers, and what is no adapter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message, trained

import lojax
from lojax.checkpoint.save_restore import save
from lojax.cli.inspect_adapter import describe, effective_rank, singular_values
from lojax.cli.main import main
from lojax.files import safetensors
from tests.checkpoint import bank_cases
from tests.peft.adapter_files import copied, edited
from tests.peft.layouts import golden


def test_the_table_of_a_peft_adapter(tmp_path, capsys):
    path = copied("patterns", tmp_path, config={"base_model_name_or_path": "org/base", "task_type": "SEQ_CLS"})
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["weight", "in", "->", "out", "rank", "scale", "parameters", "norm", "effective", "rank"]
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
    assert "layers/w 2 x 4 -> 2*3 2 1 40" in " ".join(text.split())
    assert "b (3,) full 3" in " ".join(text.split()) and "{'step': 3}" in text and "known by its fingerprint" in text


def test_norms_and_effective_ranks_are_those_of_the_update():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 7, 2)), rng.normal(size=(3, 2, 5))
    expected = np.linalg.svd(-2.0 * a @ b, compute_uv=False)[:, :2]
    np.testing.assert_allclose(singular_values(a, b, -2.0), expected, rtol=1e-10)
    assert effective_rank(np.array([3.0, 0.0])) == 1.0
    assert effective_rank(np.zeros(3)) == 0.0
    assert singular_values(np.ones((2, 8)), np.ones((8, 3)), 1.0).shape == (1, 2)


def test_the_experts_of_an_adapter_are_counted():
    text = describe(golden("experts")[0])
    assert "mlp.experts.base_layer  3 x 4 -> 6     2    1.5" in text


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
    assert next(line for line in text.splitlines() if line.startswith("layers.0.q ")).split()[-2] == "nan"


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
