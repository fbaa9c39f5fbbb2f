"""The factors of an adapter, there and back through torch's layout, for random parameters."""

from __future__ import annotations

import numpy as np
import pytest

from lojax.peft import factors
from lojax.peft.name_map import TorchParameter

KINDS = [
    ("linear", ("in", "out"), (4, 6), {}),
    ("linear", ("in", "out", "out"), (4, 2, 3), {}),
    ("linear", ("stack", "in", "in", "out"), (3, 2, 4, 6), {0: 1}),
    ("linear", ("in", "out"), (4, 6), {1: slice(2, 5)}),
    ("conv", ("in", "in", "in", "out"), (3, 3, 2, 4), {}),
    ("experts", ("expert", "in", "out"), (5, 4, 6), {}),
    ("embedding", ("in", "out"), (9, 4), {}),
]


@pytest.mark.parametrize(("kind", "axes", "shape", "index"), KINDS)
@pytest.mark.parametrize("rank", [1, 3])
def test_there_and_back(kind, axes, shape, index, rank):
    rng = np.random.default_rng(rank)
    parameter = TorchParameter("m.weight", kind, "w", shape, axes, index, "")
    shapes = factors.torch_shapes(parameter, rank)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    update = factors.from_torch(parameter, a, b, 2.0)
    assert update.rank == rank and not update.is_zero and factors.rank_in_file(parameter, a.shape) == rank
    adapter = factors.assemble([(parameter, update)], np.float32)
    assert adapter.weight_shape == shape and factors.entry_rank(parameter, adapter) == rank
    back = factors.read_update(parameter, adapter)
    assert back.scale == 2.0
    for there, here in zip((a, b), factors.to_torch(parameter, back), strict=True):
        np.testing.assert_array_equal(there, here)
