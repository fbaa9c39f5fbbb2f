"""`summary`: one row a parameter, and the closing line in the words of Hugging Face PEFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lojax
from lojax.report.summary import Row, Summary
from tests.checkpoint import bank_cases
from tests.helpers import message

PARAMS = {
    "dense": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32), "bias": jax.ShapeDtypeStruct((32,), jnp.float32)},
    "head": jax.ShapeDtypeStruct((32, 2), jnp.float32),
    "layers": jax.ShapeDtypeStruct((3, 16, 8), jnp.float32),
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def make(params=PARAMS, **settings):
    def init(key, params):
        targets = [lojax.Rule("layers", axes=("stack", "in", "out"), rank=2), "dense/kernel"]
        return lojax.init(key, params, targets, rank=4, train="head", **settings)

    return jax.eval_shape(init, jax.random.key(0), params)


def test_one_row_a_parameter_and_the_closing_line():
    assert str(lojax.summary(*make())) == (
        "parameter     shape       rank  trainable    all\n"
        "------------------------------------------------\n"
        "dense/bias    (32,)                     0     32\n"
        "dense/kernel  (64, 32)       4        384  2,432\n"
        "head          (32, 2)                  64     64\n"
        "layers        (3, 16, 8)     2        144    528\n"
        "scale         ()                        0      1\n"
        "trainable params: 592 || all params: 3,057 || trainable%: 19.3654"
    )


def test_the_rows_of_what_trains_alone():
    lines = lojax.summary(*make()).text(frozen=False).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["dense/kernel", "head", "layers"]
    assert lines[-1] == "trainable params: 592 || all params: 3,057 || trainable%: 19.3654"


def test_the_data():
    summary = lojax.summary(*make())
    assert summary.rows == (
        Row("dense/bias", (32,), None, 0, 32),
        Row("dense/kernel", (64, 32), 4, 4 * (64 + 32), 64 * 32 + 4 * (64 + 32)),
        Row("head", (32, 2), None, 64, 64),
        Row("layers", (3, 16, 8), 2, 3 * 2 * (16 + 8), 3 * 16 * 8 + 3 * 2 * (16 + 8)),
        Row("scale", (), None, 0, 1),
    )
    assert (summary.trainable, summary.total) == (592, 3057)
    assert summary.percent == 100 * 592 / 3057


def test_it_counts_as_the_arrays_do():
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), PARAMS)
    targets = [lojax.Rule("layers", axes=("stack", "in", "out"), rank=2), "dense/kernel"]
    frozen, lora = lojax.init(jax.random.key(0), params, targets, rank=4, train="head")
    summary = lojax.summary(frozen, lora)
    assert summary == lojax.summary(*make())
    assert summary.trainable == sum(x.size for x in jax.tree.leaves(lora))
    assert summary.total == sum(x.size for x in jax.tree.leaves((frozen, lora)))


def test_boxes_are_looked_into():
    params = {"w": nn.Partitioned(jnp.ones((6, 4)), names=("x", "y")), "v": nn.Partitioned(jnp.ones(5), names=("x",))}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2)
    assert lojax.summary(frozen, lora).rows == (Row("v", (5,), None, 0, 5), Row("w", (6, 4), 2, 20, 44))


def test_the_closing_line_rounds_and_groups_as_peft_does():
    rows = (Row("base", (1,), None, 0, 6_658_473_984), Row("lora", (1,), 16, 8_388_608, 8_388_608))
    assert Summary(rows).line == "trainable params: 8,388,608 || all params: 6,666,862,592 || trainable%: 0.1258"


def test_an_empty_summary_divides_by_nothing():
    assert Summary(()).line == "trainable params: 0 || all params: 0 || trainable%: 0.0000"


def test_trees_that_do_not_fit_are_refused():
    frozen, lora = make()
    text = message(ValueError, lojax.summary, {k: v for k, v in frozen.items() if k != "scale"}, lora)
    assert text.startswith("frozen and lora have different structure: scale is in lora but not in frozen.")


def test_a_number_is_a_parameter_without_axes():
    frozen, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((6, 4)), "temperature": 0.5}, "w", rank=2)
    assert lojax.summary(frozen, lora).rows == (Row("temperature", (), None, 0, 1), Row("w", (6, 4), 2, 20, 44))


def test_what_is_not_a_parameter_is_named():
    frozen, lora = make()
    text = message(TypeError, lojax.summary, frozen | {"name": "bert"}, lora | {"name": None})
    assert text.startswith("name: frozen holds 'bert' (str), which is neither an array nor a number.")
    text = message(TypeError, lojax.summary, frozen | {"name": None}, lora | {"name": "bert"})
    assert text.startswith("name: lora holds 'bert' (str)")
    text = message(ValueError, lojax.summary, lora, frozen)
    assert text.startswith("frozen holds an adapter at dense/kernel, and lora holds none: they are swapped.")


def test_it_shows_as_a_table_in_a_repl_and_in_a_notebook():
    summary = lojax.summary(*make())
    assert repr(summary) == str(summary)
    lines = summary._repr_html_().splitlines()
    assert lines[0] == "<table>" and lines[-2:] == ["</table>", f"<p>{summary.line}</p>"]
    assert len(lines) == 1 + 1 + len(summary.rows) + 2
    words = [f'<td style="text-align: left">{cell}</td>' for cell in ("dense/kernel", "(64, 32)")]
    numbers = [f'<td style="text-align: right">{cell}</td>' for cell in ("4", "384", "2,432")]
    assert lines[3] == f"<tr>{''.join([*words, *numbers])}</tr>"


@pytest.mark.peer
def test_the_closing_line_is_what_peft_prints(capsys):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 7))
    peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"])).print_trainable_parameters()
    params = {
        "0": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)},
        "1": {"kernel": jnp.ones((32, 7)), "bias": jnp.ones(7)},
    }
    summary = lojax.summary(*lojax.init(jax.random.key(0), params, "0/kernel", rank=4))
    assert capsys.readouterr().out.strip() == summary.line


def test_a_lowered_rank_is_shown():
    def init(key):
        return lojax.init(key, {"w": jnp.ones((6, 3))}, "*", rank=8)

    row = str(lojax.summary(*jax.eval_shape(init, jax.random.key(0)))).splitlines()[2]
    assert row.endswith("(6, 3)  8 → 3         27   45")


def test_numbers_are_parameters_too():
    params = {"w": jnp.ones((6, 3)), "factor": 0.5, "bias": 1.0}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, train="bias")
    assert [(row.path, row.shape, row.total) for row in lojax.summary(frozen, lora).rows] == [
        ("bias", (), 1),
        ("factor", (), 1),
        ("w", (6, 3), 36),
    ]


# --- banks ---


@pytest.mark.parametrize("name", bank_cases.CASES)
def test_a_bank_counts_what_its_adapters_count(name):
    """The oracle is a summary of each adapter: its own rank, no padding, no weight that it leaves alone."""
    frozen, bank = bank_cases.CASES[name]()
    found, single = lojax.summary(frozen, bank), [lojax.summary(frozen, one) for one in bank]
    assert [row.trainable for row in found.adapters] == [of.trainable for of in single]
    assert found.trainable == sum(of.trainable for of in single)
    assert found.total == sum(row.total for row in found.rows)
    assert found.total - found.trainable == single[0].total - single[0].trainable
    by_path = [{row.path: row for row in of.rows} for of in single]
    assert [row.path for row in found.rows] == [row.path for row in single[0].rows]
    for row in found.rows:
        own = [of[row.path] for of in by_path]
        assert row.shape == own[0].shape and row.trainable == sum(of.trainable for of in own)
        assert [*row.ranks] == [of.rank for of in own if of.rank is not None]
    assert str(lojax.summary(jax.eval_shape(lambda: frozen), jax.eval_shape(lambda: bank))) == str(found)


def test_a_bank_says_how_many_adapters_it_holds_and_their_ranks():
    frozen, bank = bank_cases.plain()
    found = lojax.summary(frozen, bank)
    assert str(found).splitlines()[-2:] == [
        "3 adapters: a/b (rank 2), ../é (rank 4), A/B (rank 1)",
        "trainable params: 358 || all params: 697 || trainable%: 51.3630",
    ]
    assert [row.rank_text for row in found.rows][:2] == ["2-4", "1-4"]
    assert "3 adapters: a/b" in found._repr_html_() and "3 adapters" in found.text(frozen=False)
    many = lojax.stack([bank[0]] * 11)
    assert str(lojax.summary(frozen, many)).splitlines()[-2].endswith("7 (rank 2), and 3 more")


def test_a_bank_beside_a_base_that_holds_what_is_trained_in_full():
    frozen, bank = bank_cases.dora()
    without, whole = lojax.summary(frozen, bank), lojax.summary({**frozen, "head": jnp.ones((4, 3))}, bank)
    assert whole.trainable == without.trainable and whole.total == without.total + 12


def test_a_bank_of_another_base_is_refused():
    _, bank = bank_cases.plain()
    assert "different structure" in message(ValueError, lojax.summary, {"w": jnp.ones(3)}, bank)
