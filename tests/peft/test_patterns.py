"""Patterns of a config: PEFT's own matching, whatever way a key goes. What is refused is in ``test_config.py``."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import message

from lojax.peft.patterns import MAX_BITS, ModulePattern, _bits, compile_pattern


@pytest.mark.parametrize(
    "key", ["q", "0.q", "layers.0.q", "layers", "^layers.0.q", "q|k", "(q|k)", "a-b.q", r"layers\.0\.q", ".q"]
)
def test_keys_match_as_in_peft(key):
    """Most keys are compared as text, with a dot for any character: as ``re`` would have it."""
    rng, words = np.random.default_rng(0), ["layers", "0", "q", "k", "xq", "layersX0", "a-b", "layer", "", "0Xq"]
    modules = [".".join(rng.choice(words, size=rng.integers(1, 5))) for _ in range(400)] + ["layers.0.q"]
    expected = [re.match(rf"(.*\.)?({key})$", module) is not None for module in modules]
    assert [ModulePattern(key).matches(module) for module in modules] == expected
    assert any(expected) and not all(expected)


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [
        ("layers.q", 0), ("a?b?", 2), ("a*", 6), ("a*|b*c*", 12), ("(a*)(b)", 6), ("(a*|b*c*)d*", 18), ("a{3}", 0),
        ("a{1,4}", 2), ("a{2,}", 6), ("[*+]", 0), (r"\*\+", 0), ("(?=a*)b", 6), ("(a)?", 1), ("(a*)?", 7),
        ("(a*){1}", 6), ("{}", 0), ("a{,3}", 2),
        ("(a+)*", float("inf")), ("(a|b)+", float("inf")), ("(a?){3}", float("inf")), ("((a*))+", float("inf")),
        ("(?x)a", float("inf")), (")a*", 6), ("((a*", 6),
    ],
)  # fmt: skip
def test_the_ways_to_match_are_counted(pattern, bits):
    assert _bits(pattern) == bits


def test_several_patterns_are_one():
    pattern = compile_pattern(r"^(?:{})$", "a{2}", "b")
    assert [bool(pattern.match(text)) for text in ("aa", "b", "a")] == [True, True, False]
    assert "'(' is not a regular expression" in message(ValueError, compile_pattern, "{}", "(")
    assert "could take hours" in message(ValueError, compile_pattern, "{}", "b", ".*" * (MAX_BITS // 6 + 1))
