"""What the kernels for a TPU share: the sizes of tiles, and what lies over the edge of an array."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lojax.types import Array, Dtype

MIB = 2**20
COMMON_VMEM = 64 * MIB
"""The bytes of vector memory that the newer TPUs have at least: a v5p and a 7x; a v5e and a v6e have 128 MiB."""


def device_vmem() -> int:
    """The bytes of vector memory that a kernel may take: three quarters of what the TPU has.

    The TPU is that of the mesh in use (`jax.set_mesh`), ahead of time as well, or of this process.
    """
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # no TPU: compiled ahead of time
        capacity = COMMON_VMEM
    return capacity * 3 // 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tiles of one product ``[T, k] @ [k, n]`` on a TPU.

    Attributes:
        rows: Of the result, along T.
        columns: Of the result, along n.
        inner: Of the contraction in one step.
        resident: Whether the rows of x stay in vector memory, as long as they are, while the columns go by.
    """

    rows: int
    columns: int
    inner: int
    resident: bool = False

    def vmem(self, k: int, rank: int, itemsize: int) -> int:
        """The bytes of vector memory: every tile twice (one moves while one is used), and the sums in float32."""
        # The last axis takes a multiple of 128.
        thin = self.rows * max(rank, 128) * 2 + max(rank, 16) * (self.inner + self.columns)
        x = self.rows * (k if self.resident else self.inner)
        moving = x + self.inner * self.columns + self.rows * self.columns + thin
        return 2 * itemsize * moving + 4 * self.rows * (self.columns + max(rank, 128))

    def traffic(self, tokens: int, n: int, k: int) -> int:
        """How many numbers a product reads and writes: a TPU has no cache between its memory and its vector memory."""
        down, across = math.ceil(tokens / self.rows), math.ceil(n / self.columns)
        return tokens * k * (1 if self.resident else across) + k * n * down + tokens * n


def product_blocks(tokens: int, n: int, k: int, rank: int, dtype: Dtype, *, reserved: int = 0) -> Blocks:
    """The tiles for ``[tokens, k] @ [k, n]`` that move the least.

    Args:
        tokens: The rows T of the product.
        n: Its columns.
        k: The length of the contraction.
        rank: The rank of the update.
        dtype: That of the operands.
        reserved: The bytes of vector memory that something else takes.
    """
    available, itemsize = device_vmem() - reserved, jnp.dtype(dtype).itemsize
    choices = [
        Blocks(fit(tokens, rows), fit(n, columns), inner, resident)
        for inner in (fit(k, 512), fit(k, 256))
        for rows in (4096, 2048, 1024, 512, 256, 128)
        for columns in (2048, 1024, 512, 256, 128)
        for resident in ([True, False] if k % inner == 0 else [False])
    ]
    # Mosaic unrolls the products of a step: beyond 2^30 in 16 bits it takes a minute to compile (v5e, JAX 0.10.2). An
    # eighth of the memory stays free for what it holds between.
    fitting = [
        b
        for b in choices
        if b.rows * b.columns * b.inner * itemsize <= 2**31 and b.vmem(k, rank, itemsize) <= available * 7 // 8
    ]
    # Of tiles that move as little, the ones with the fewest steps.
    return min(fitting or choices[-1:], key=lambda b: (b.traffic(tokens, n, k), -b.rows * b.columns * b.inner))


def fit(length: int, most: int) -> int:
    """The length of a tile along an axis: the whole axis where it is not longer, else ``most``, a multiple of 128."""
    return min(length, most)


def inside(tile: Array, axis: int, step: Array, end: int) -> Array:
    """``tile``, the one with number ``step`` along ``axis``, with zeros where the axis, of length ``end``, is over.

    What a tile holds there is not defined, and zero times NaN is NaN: so both sides of a product are cleared.
    """
    length = tile.shape[axis]
    if end % length == 0:
        return tile
    index = step * length + lax.broadcasted_iota(jnp.int32, tile.shape, axis)
    return jnp.where(index < end, tile, jnp.zeros_like(tile))


def part(step: Array, length: int, end: int):
    """What selects the part number ``step``, of this length, along an axis; all of an axis that has only one."""
    # Mosaic must see that a part starts at a multiple of 128.
    return slice(None) if end == length else pl.ds(pl.multiple_of(step * length, 128), length)


def contract(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two tiles, summed in float32 along one axis of each."""
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def pad_rank(x: Array, axis: int) -> Array:
    """``x`` with at least 8 entries along the axis of the rank: Mosaic has no products with one row."""
    missing = max(8 - x.shape[axis], 0)
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
