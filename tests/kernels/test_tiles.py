"""Tiles fit in the memory of the device, and give it work."""

import jax.numpy as jnp
import pytest

from lojax.kernels.tiles import LEAST_SHARED_MEMORY, MULTIPROCESSORS, SHARED_MEMORY, product_tiles

SHAPES = [(8192, 4096), (8192, 14336), (2048, 1024), (300, 4096), (16, 4096), (1, 8), (100, 14336)]


@pytest.mark.parametrize("shared_memory", [SHARED_MEMORY["9.0"], LEAST_SHARED_MEMORY], ids=["H100", "RTX"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_of_a_product_fit_and_leave_no_multiprocessor_idle_for_want_of_tiles(shape, dtype, shared_memory):
    tokens, n = shape
    tiles = product_tiles(tokens, n, dtype, shared_memory)
    assert tiles.shared_memory(jnp.dtype(dtype).itemsize) <= shared_memory
    count = -(-tokens // tiles.rows) * -(-n // tiles.columns)
    least = -(-tokens // 16) * -(-n // 64)  # with the smallest tiles there are
    assert count >= min(MULTIPROCESSORS, least // 4)
    assert tiles.rows < 2 * max(tokens, 16) and tiles.columns < 2 * max(n, 64)
