"""Parameters saved in full, there and back."""

from __future__ import annotations

import numpy as np
import pytest

from lojax.peft.full_parameters import full_from_torch, full_index, full_shape, full_to_torch
from lojax.peft.name_map import TorchParameter


@pytest.mark.parametrize(
    ("kind", "axes", "shape", "index", "expected"),
    [
        ("linear", ("in", "out"), (4, 6), {}, (6, 4)),
        ("conv1d", ("in", "out"), (4, 6), {}, (4, 6)),
        ("embedding", ("in", "out"), (9, 4), {}, (9, 4)),
        ("linear", ("in", "out", "out"), (4, 2, 3), {}, (6, 4)),
        ("linear", ("stack", "out"), (2, 6), {0: 1}, (6,)),
        ("linear", ("in", "out"), (4, 6), {1: slice(2, 5)}, (3, 4)),
        ("conv", ("in", "in", "in", "out"), (3, 5, 2, 4), {}, (4, 2, 3, 5)),
        ("experts", ("expert", "in", "out"), (5, 4, 6), {}, (5, 6, 4)),
        ("experts_t", ("expert", "in", "out"), (5, 4, 6), {}, (5, 4, 6)),
        ("param", None, (1, 3, 4), {}, (1, 3, 4)),
    ],
)
def test_there_and_back(kind, axes, shape, index, expected):
    parameter = TorchParameter("m.weight", kind, "w", shape, axes, index, "")
    leaf = np.random.default_rng(0).normal(size=shape)
    tensor = full_to_torch(parameter, leaf)
    assert tensor.shape == full_shape(parameter) == expected
    back = leaf * np.nan
    back[full_index(parameter)] = full_from_torch(parameter, tensor)
    np.testing.assert_array_equal(back[full_index(parameter)], leaf[full_index(parameter)])
