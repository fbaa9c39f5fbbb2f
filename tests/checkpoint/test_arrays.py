"""Arrays go through orbax unchanged, and only as the manifest says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, message
from jax.sharding import NamedSharding, PartitionSpec

from lojax.checkpoint.arrays import read, snapshot, start_write
from lojax.checkpoint.manifest import StoredArray

ARRAYS = {"x/a": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones(4, jnp.bfloat16)}
STORED = {name: StoredArray(array.shape, str(array.dtype)) for name, array in ARRAYS.items()}


def test_what_is_written_is_read(tmp_path):
    empty = np.zeros((0, 3), np.int8)  # which orbax itself refuses
    start_write(tmp_path / "arrays", {**ARRAYS, "empty": empty})()
    restored = read(tmp_path / "arrays", STORED | {"empty": StoredArray((0, 3), "int8")}, {})
    assert all(isinstance(array, np.ndarray) for array in restored.values())
    assert_same_bits(restored, {**ARRAYS, "empty": empty})


def test_read_puts_each_array_in_its_sharding(tmp_path):
    start_write(tmp_path / "arrays", ARRAYS)()
    sharding = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
    restored = read(tmp_path / "arrays", STORED, {"y": sharding})
    assert isinstance(restored["x/a"], np.ndarray) and restored["y"].sharding == sharding
    assert_same_bits(restored, ARRAYS)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"y": StoredArray((5,), "bfloat16")}, "holds bfloat16[4] at 'y', but adapter.json says bfloat16[5]"),
        ({"y": StoredArray((4,), "float32")}, "holds bfloat16[4] at 'y', but adapter.json says float32[4]"),
        ({"z": StoredArray((4,), "float32")}, "holds nothing at 'z', but adapter.json says float32[4]"),
    ],
)
def test_read_refuses_arrays_that_the_manifest_does_not_describe(tmp_path, changed, text):
    start_write(tmp_path / "arrays", ARRAYS)()
    assert text in message(ValueError, read, tmp_path / "arrays", STORED | changed, {})


def test_a_snapshot_does_not_change_with_its_array():
    array, donated = np.ones(3, np.float32), jnp.ones(3)
    copies = snapshot({"array": array, "donated": donated})
    array[:] = 2
    donated.delete()
    assert all(type(copy) is np.ndarray and copy.tolist() == [1, 1, 1] for copy in copies.values())
