"""Into which tiles a product is cut for a GPU: by its shape, its dtype, and the shared memory of a multiprocessor."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lojax.types import Dtype

KIB = 1024
SHARED_MEMORY = {"8.0": 163 * KIB, "8.7": 163 * KIB, "9.0": 227 * KIB, "10.0": 227 * KIB, "10.3": 227 * KIB}
"""The bytes of shared memory that a block may take, by compute capability (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability")."""
LEAST_SHARED_MEMORY = 99 * KIB
"""That of the others since 8.6: of the cards for workstations and desktops."""
MULTIPROCESSORS = 132
"""Of an H100. With fewer programs than that, a part of the device waits."""


def device_shared_memory() -> int:
    """The bytes of shared memory that a block may take on the GPU of this process; on an H100 where it has none."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return SHARED_MEMORY["9.0"]  # compiled ahead of time; Pallas takes an H100 then as well
    return SHARED_MEMORY.get(str(device.compute_capability), LEAST_SHARED_MEMORY)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one product ``[T, k] @ [k, n]``, and how a GPU works through them.

    Attributes:
        rows: Of the result, along T.
        columns: Of the result, along n.
        inner: Of the contraction in one step.
        warps: The warps (32 threads each) of one program.
        stages: How many steps of the contraction are on their way from memory at once.
        group: How many tiles along T are computed one after the other before the next ones along n, so that the tiles
            of both operands are still in the L2 cache when they are read again.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8

    def shared_memory(self, itemsize: int) -> int:
        """The bytes of shared memory for the tiles on their way."""
        return self.stages * self.inner * (self.rows + self.columns) * itemsize


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not less than ``n``; Triton has no other lengths.

    >>> [next_power_of_two(n) for n in (1, 16, 100)]
    [1, 16, 128]
    """
    return 1 << max(n - 1, 0).bit_length()


def padded_rank(rank: int) -> int:
    """The rank as the tensor cores take it, a power of two and at least 16."""
    return max(next_power_of_two(rank), 16)


def rank_step(rank: int) -> int:
    """The length of a step along the rank: one step up to 64, and at least 16, the least that tensor cores take.

    >>> [rank_step(rank) for rank in (1, 64, 100)]
    [16, 64, 32]
    """
    # Several steps are on their way from memory at once, and wait in shared memory. So they are shorter.
    return padded_rank(rank) if rank <= 64 else 32


def product_tiles(tokens: int, n: int, dtype: Dtype, shared_memory: int | None = None) -> Tiles:
    """The tiles for ``[tokens, k] @ [k, n]`` in ``dtype``: the largest that still give every multiprocessor work.

    A tile of 128 x 256 reads each number 128 times or more out of registers and shared memory, which is what keeps the
    tensor cores of an H100 busy (its float32 sums take half of the registers of a block of eight warps).

    Args:
        tokens: The rows T of the product.
        n: The columns of the product.
        dtype: That of the operands.
        shared_memory: The bytes of shared memory that a block may take; None for those of the device.
    """
    itemsize, available = jnp.dtype(dtype).itemsize, shared_memory or device_shared_memory()
    choices = [(128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (16, 128, 4), (16, 64, 4)]
    # 128 bytes: a line of the cache, and a row as the tensor cores of an H100 read it.
    inner = 128 // itemsize
    fitting = [
        Tiles(rows, columns, inner, warps, stages=3)
        for rows, columns, warps in choices
        if 3 * inner * (rows + columns) * itemsize <= available
        # No tile twice as long as the matrix: half of it would be for nothing.
        and (rows == 16 or rows < 2 * tokens)
        and (columns == 64 or columns < 2 * n)
    ]
    busy = [t for t in fitting if math.ceil(tokens / t.rows) * math.ceil(n / t.columns) >= MULTIPROCESSORS]
    return busy[0] if busy else fitting[-1]


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the work on a matrix ``g [T, n]``, read once for two thin products, is divided among programs.

    Attributes:
        rows: Of a part, a multiple of the step.
        columns: Of a part.
        step: The rows that a program reads at once.
        warps: As in `Tiles`.
        stages: As in `Tiles`.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    def shared_memory(self, rank: int, itemsize: int) -> int:
        """A bound on the bytes of shared memory: the tiles of ``g`` and ``h`` on their way, ``b``, and a tile of u."""
        on_their_way = self.stages * self.step * (self.columns + rank) * itemsize
        return on_their_way + self.columns * rank * itemsize + self.step * rank * 4


def cotangent_parts(tokens: int, n: int, rank: int, dtype: Dtype, shared_memory: int | None = None) -> Parts:
    """The parts of ``g [T, n]``: one for each multiprocessor, and as wide as its memory and its registers allow.

    The partial sums are ``4 r (n T / rows + T n / columns)`` bytes: the larger the parts, the fewer.

    Args:
        tokens: The rows of ``g``.
        n: Its columns.
        rank: The width of the two thin products.
        dtype: That of ``g``.
        shared_memory: The bytes of shared memory that a block may take; None for those of the device.
    """
    itemsize, width = jnp.dtype(dtype).itemsize, padded_rank(rank)
    available = shared_memory or device_shared_memory()
    step = 64 if width <= 32 else 32
    fitting = [
        parts
        for columns in (512, 256, 128, 64)
        # The sums of dB, [width, columns] in float32, stay in registers: at most half of them, and in float32, where
        # the operands of the tensor cores take more, an eighth.
        if columns * width <= (32768 if itemsize == 2 else 8192)
        if (parts := Parts(step, columns, step, warps=8, stages=3)).shared_memory(width, itemsize) <= available
        if columns == 64 or columns < 2 * n
    ]
    columns = fitting[0].columns if fitting else 64
    across, steps = math.ceil(n / columns), math.ceil(tokens / step)
    down = max(1, min(MULTIPROCESSORS // across, steps))
    return Parts(math.ceil(steps / down) * step, columns, step, warps=8, stages=3)


@dataclasses.dataclass(frozen=True)
class Thin:
    """How a program walks along some rows of a matrix ``[T, k]``, for a product with few columns.

    Attributes:
        rows: Of a program.
        inner: Of the contraction in one step.
        warps: As in `Tiles`.
        stages: As in `Tiles`.
    """

    rows: int
    inner: int
    warps: int
    stages: int


def thin_steps(tokens: int, rank: int, dtype: Dtype, shared_memory: int | None = None) -> Thin:
    """The steps along a matrix ``[T, k]`` in ``dtype``, for a product with ``rank`` columns, of float32 as stored.

    Args:
        tokens: The rows T of the matrix.
        rank: The columns of the product.
        dtype: That of the matrix.
        shared_memory: The bytes of shared memory that a block may take; None for those of the device.
    """
    # Many bytes must be on their way to keep the memory busy: so rather long steps than many rows.
    rows = next((rows for rows in (64, 32) if math.ceil(tokens / rows) >= MULTIPROCESSORS // 2), 16)
    itemsize, stages = jnp.dtype(dtype).itemsize, 4
    available = shared_memory or device_shared_memory()
    bytes_per_step = stages * (rows * itemsize + padded_rank(rank) * 4)
    inner = next((n for n in (256 // itemsize, 64, 32) if n * bytes_per_step <= available), 16)
    return Thin(rows, inner, warps=4, stages=stages)
