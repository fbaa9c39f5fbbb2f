"""The rule language: what is not of it says where."""

from __future__ import annotations

import pytest
from helpers import message

from lojax.peft.rule_language import parse_rule


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a/kernel b", "expected one '<->' between a JAX path and a torch name"),
        ("a/{i}/kernel <-> b", "placeholder {i} is on the left but not on the right"),
        ("a/kernel <-> b.{i}", "placeholder {i} is on the right but not on the left"),
        ("(x/)a/kernel <-> b", "an optional (...) is on the left but not on the right"),
        ("a/kernel[in, sideways] <-> b", "axis 'sideways' is not one of in, out"),
        ("a/kernel[in, {m:q=x}*out] <-> {m}", "sizes are numbers"),
        ("a/kernel[in, {m}*out] <-> {m}", "needs the names of its parts, as in {p:a,b}*out"),
        ("a/kernel <-> b : lstm", "kind 'lstm' is not one of linear, conv1d, embedding, conv"),
        ("{i}/{i}/kernel <-> {i}", "the path does not parse"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(line, reason):
    text = message(ValueError, parse_rule, line)
    assert text.startswith(f"Name rule {line!r}: ") and reason in text
