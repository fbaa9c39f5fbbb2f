"""Axes: roles, sizes, and the shapes of the factors."""

from __future__ import annotations

import pytest

from lojax.adapters.adapter import array_shapes
from lojax.adapters.axes import check, convention, positions, size
from tests.helpers import message


def test_the_convention_is_that_only_the_last_axis_is_out():
    assert convention(2) == ("in", "out")
    assert convention(4) == ("in", "in", "in", "out")


@pytest.mark.parametrize(
    ("axes", "shape", "m", "n", "a", "b"),
    [
        (("in", "out"), (6, 5), 6, 5, (6, 4), (4, 5)),
        (("out", "in"), (6, 5), 5, 6, (5, 4), (4, 6)),
        (("in", "out", "out"), (6, 2, 3), 6, 6, (6, 4), (4, 2, 3)),
        (("in", "in", "out"), (2, 3, 7), 6, 7, (2, 3, 4), (4, 7)),
        (("stack", "in", "out"), (9, 6, 5), 6, 5, (9, 6, 4), (9, 4, 5)),
        (("in", "stack", "out"), (6, 9, 5), 6, 5, (9, 6, 4), (9, 4, 5)),
        (("out", "stack", "in", "stack"), (5, 9, 6, 8), 6, 5, (9, 8, 6, 4), (9, 8, 4, 5)),
    ],
)
def test_sizes_and_factor_shapes(axes, shape, m, n, a, b):
    assert (size(axes, shape, "in"), size(axes, shape, "out")) == (m, n)
    shapes = array_shapes(axes, shape, 4)
    assert (shapes["a"], shapes["b"]) == (a, b)


def test_positions_are_in_order():
    axes = ("out", "stack", "in", "out")
    assert (positions(axes, "in"), positions(axes, "out"), positions(axes, "stack")) == ((2,), (0, 3), (1,))


def test_check_returns_a_tuple():
    assert check(["in", "out"], (3, 4), "w") == ("in", "out")


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (("in", "ot"), "w: axes ('in', 'ot') hold 'ot'; each must be 'in', 'out' or 'stack'."),
        (
            ("in", "in", "out"),
            "w: axes ('in', 'in', 'out') describe 3 axes, but the weight has shape (3, 4) (2 axes). "
            "Give one role per axis.",
        ),
        (
            ("in", "in"),
            "w: axes ('in', 'in') need at least one 'in' and one 'out'. "
            "A low-rank update is a map from in axes to out axes.",
        ),
        (
            ("stack", "out"),
            "w: axes ('stack', 'out') need at least one 'in' and one 'out'. "
            "A low-rank update is a map from in axes to out axes.",
        ),
    ],
)
def test_axes_that_cannot_describe_the_weight(axes, text):
    assert message(ValueError, check, axes, (3, 4), "w") == text
