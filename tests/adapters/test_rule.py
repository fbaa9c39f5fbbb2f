"""Rules: how they are spelled, what they leave open, and what they refuse."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from lojax import Rule
from lojax.adapters.rule import DEFAULTS as rule_defaults
from lojax.adapters.rule import as_rules
from tests.helpers import message

DEFAULTS = Rule(
    (), rank=8, alpha=16, scaling="standard", init="kaiming", dropout=0.1, variant="lora", dtype=jnp.float32
)


KNOWN = ["gaussian", "kaiming", "loftq", "loftq_niter_1", "milora", "olora", "orthogonal", "pissa", "pissa_niter_4"]


def has_two_axes(path, leaf):
    return leaf.ndim == 2


@pytest.mark.parametrize("target", ["**/kernel", re.compile(".*kernel"), has_two_axes])
def test_a_bare_target_takes_every_default(target):
    (rule,) = as_rules(target, DEFAULTS)
    assert rule.targets is target
    assert (rule.rank, rule.alpha, rule.init, rule.dropout, rule.train) == (8, 16, "kaiming", 0.1, "lora")


def test_a_rule_keeps_what_it_says_and_takes_the_rest():
    (rule,) = as_rules(Rule("**/kernel", rank=2, dropout=0.0, init="gaussian", axes=("in", "out")), DEFAULTS)
    assert (rule.rank, rule.dropout, rule.init, rule.axes) == (2, 0.0, "gaussian", ("in", "out"))
    assert (rule.alpha, rule.scaling, rule.dtype) == (16, "standard", jnp.float32)


def test_a_sequence_keeps_its_order_and_kinds():
    rules = as_rules(["a", Rule("b", rank=3), re.compile("c"), has_two_axes], DEFAULTS)
    assert [rule.rank for rule in rules] == [8, 3, 8, 8]
    assert [rule.targets for rule in rules] == ["a", "b", re.compile("c"), has_two_axes]


def test_no_targets_are_no_rules():
    assert as_rules(None, DEFAULTS) == as_rules((), DEFAULTS) == []


@pytest.mark.parametrize(
    ("alpha", "rank", "scaling", "scale"),
    [
        (None, 8, None, 1.0),
        (16, 8, "standard", 2.0),
        (1, 4, "standard", 0.25),
        (16, 4, "rslora", 8.0),
        (None, 9, "rslora", 3.0),
        (0.5, 2, "rslora", 0.5 / math.sqrt(2)),
        (np.float32(16), 8, "standard", 2.0),
    ],
)
def test_scale(alpha, rank, scaling, scale):
    got = Rule("w", rank=rank, alpha=alpha, scaling=scaling).scale(rank)
    assert got == scale
    assert type(got) is float


def test_repr_shows_what_was_said_and_no_more():
    assert repr(Rule("**/bias", train="full")) == "Rule('**/bias', train='full')"
    assert repr(Rule(["a", "b"], rank=4, alpha=8)) == "Rule(['a', 'b'], rank=4, alpha=8)"


def test_a_numpy_integer_is_a_rank():
    (rule,) = as_rules(Rule("w", rank=np.int64(4)), DEFAULTS)
    assert rule.rank == 4
    assert type(rule.rank) is int


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"rank": 0}, "rank=0; expected an integer of at least 1."),
        ({"rank": -3}, "rank=-3; expected an integer of at least 1."),
        ({"rank": 2.0}, "rank=2.0; expected an integer of at least 1."),
        ({"rank": True}, "rank=True; expected an integer of at least 1."),
        ({"rank": "8"}, "rank='8'; expected an integer of at least 1."),
        ({"alpha": 0}, "alpha=0; expected a finite number above 0, or None for alpha = rank."),
        ({"alpha": -1.0}, "alpha=-1.0; expected a finite number above 0, or None for alpha = rank."),
        ({"alpha": math.nan}, "alpha=nan; expected a finite number above 0, or None for alpha = rank."),
        ({"alpha": math.inf}, "alpha=inf; expected a finite number above 0, or None for alpha = rank."),
        ({"alpha": "16"}, "alpha='16'; expected a finite number above 0, or None for alpha = rank."),
        ({"dropout": 1.0}, "dropout=1.0; expected a rate in [0, 1)."),
        ({"dropout": -0.1}, "dropout=-0.1; expected a rate in [0, 1)."),
        ({"dropout": math.nan}, "dropout=nan; expected a rate in [0, 1)."),
        ({"scaling": "rs"}, "scaling='rs'; expected one of ['rslora', 'standard']."),
        ({"variant": "dorra"}, "variant='dorra'; expected one of lora, dora, lora-fa. Did you mean 'dora'?"),
        ({"train": "half"}, "train='half'; expected 'lora', 'full', 'tokens' or 'none'."),
        (
            {"dtype": jnp.dtype("int8")},
            "dtype=dtype('int8'); expected a real floating-point dtype, or None for float32.",
        ),
        (
            {"dtype": jnp.dtype("complex64")},
            "dtype=dtype('complex64'); expected a real floating-point dtype, or None for float32.",
        ),
    ],
)
def test_a_setting_out_of_range_names_the_rule_and_what_was_expected(setting, text):
    got = message(ValueError, as_rules, Rule("some/kernel", **setting), DEFAULTS)
    assert got.startswith("Rule('some/kernel', ")
    assert got.endswith(f": {text}")


def test_an_unknown_init_suggests_the_nearest():
    assert message(ValueError, as_rules, Rule("w", init="kaimin"), DEFAULTS) == (
        f"init='kaimin' is unknown; expected one of {KNOWN}. Did you mean 'kaiming'?"
    )


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("bf16", " Did you mean 'bfloat16'?"),
        ("fp32", " Did you mean 'float32'?"),
        ("f16", " Did you mean 'float16'?"),
        ("F32", " Did you mean 'float32'?"),
        ("blfoat16", " Did you mean 'bfloat16'?"),
        ("zzz", ""),
    ],
)
def test_a_dtype_that_jax_does_not_have_suggests_the_one_that_was_meant(dtype, hint):
    assert message(ValueError, as_rules, Rule("w", dtype=dtype), DEFAULTS).endswith(
        f"dtype={dtype!r}; expected a real floating-point dtype, or None for float32.{hint}"
    )


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", np.float32, jnp.bfloat16, jnp.dtype("float16"), "float8_e4m3fn"]
)
def test_every_spelling_of_a_dtype_is_one(dtype):
    (rule,) = as_rules(Rule("w", dtype=dtype), DEFAULTS)
    assert rule.dtype == dtype


# --- settings by another name ---


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("r", " Did you mean 'rank='?"),
        ("ranks", " Did you mean 'rank='?"),
        ("lora_alpha", " Did you mean 'alpha='?"),
        ("lora_dropout", " Did you mean 'dropout='?"),
        ("target_modules", " Did you mean 'targets='?"),
        ("modules_to_save", " Did you mean 'train='?"),
        ("use_rslora", " Did you mean 'scaling=\"rslora\"'?"),
        ("use_dora", " Did you mean 'variant=\"dora\"'?"),
        ("init_lora_weights", " Did you mean 'init='?"),
        ("dropuot", " Did you mean 'dropout='?"),
        ("zzz", ""),
    ],
)
def test_a_setting_by_another_name_suggests_ours(name, hint):
    setting = {name: 4}
    assert message(TypeError, Rule, "w", **setting) == f"Rule has no argument {name!r}.{hint}"
    assert message(TypeError, lojax.wrap, print, "w", **setting) == f"wrap has no argument {name!r}.{hint}"
    text = message(TypeError, lojax.init, jax.random.key(0), {"w": jnp.ones((4, 4))}, "w", **setting)
    assert text == f"init has no argument {name!r}.{hint}"


def test_other_arguments_of_wrap_and_init_are_suggested_too():
    assert message(TypeError, lojax.wrap, print, "w", exclud="b").endswith("Did you mean 'exclude='?")
    assert message(TypeError, lojax.wrap, print, "w", modes="b") == "wrap has no argument 'modes'."
    text = message(TypeError, lojax.init, jax.random.key(0), {}, "w", exclude_modules="b", apply_fun=print)
    assert text == "init has no argument 'exclude_modules'. Did you mean 'exclude='?"


def test_the_signatures_are_still_there():
    assert list(inspect.signature(Rule).parameters)[:3] == ["targets", "rank", "alpha"]
    assert list(inspect.signature(lojax.wrap).parameters)[:3] == ["net", "targets", "rank"]
    assert copy.deepcopy(Rule("w", rank=2)) == pickle.loads(pickle.dumps(Rule("w", rank=2))) == Rule("w", rank=2)


def test_the_defaults_of_wrap_are_those_of_a_rule():
    parameters = inspect.signature(lojax.wrap).parameters
    for name in ("rank", "alpha", "scaling", "init", "variant", "axes", "dtype", "dropout"):
        assert parameters[name].default == getattr(rule_defaults, name), name


@pytest.mark.parametrize("entry", [3, None, b"kernel"])
def test_what_is_no_target_is_refused(entry):
    text = f"A target is a glob, a compiled regex, a predicate (path, leaf) -> bool, or a lojax.Rule; got {entry!r}."
    assert message(TypeError, as_rules, ["**/kernel", entry], DEFAULTS) == text


def test_a_single_thing_that_is_no_target_is_refused():
    assert message(TypeError, as_rules, 3, DEFAULTS).endswith("got 3.")


@pytest.mark.parametrize("train", ["full", "none"])
def test_an_adapter_rule_has_no_place_in_train_or_exclude(train):
    got = message(ValueError, as_rules, Rule("w", rank=2), Rule((), train=train))
    assert got == "Rule('w', rank=2) trains an adapter: its place is in targets=, not in train= or exclude=."
