"""Digests of arrays: 64 bits that depend on every element and its position, and on nothing else.

The digest of an array is a pair of sums over its words ``w`` at flat position ``k``::

    h = mix(w + k * G)        s1 = sum(h)        s2 = sum(h * k)        (all modulo 2**32)

``mix`` is MurmurHash3's 32-bit finalizer. Addition is associative, so each device sums its own shard: the
result is the same for every sharding and process count, an array is never gathered, and one that lives on
an accelerator is never copied to the host. This tells arrays apart; it does not stop someone who forges
one on purpose.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from lojax.types import Array, ArrayLike

_GOLDEN = 0x9E3779B1  # 2**32 / golden ratio, made odd: neighboring positions land far apart
_MIX_1, _MIX_2 = 0x85EBCA6B, 0xC2B2AE35  # the constants of MurmurHash3's fmix32
_BLOCK = 1 << 16  # words: 256 KiB, and two more buffers of it, stay in the second-level cache of a core
_cache: dict[int, tuple[weakref.ref, str]] = {}  # JAX arrays are immutable, so each is read once


def digest(array: ArrayLike) -> str:
    """The digest of one array, as 16 hexadecimal digits.

    >>> digest(np.arange(6, dtype=np.float32))
    'a12f6f73bfe09ac4'
    """
    return digests({"": array})[""]


def digests(arrays: Mapping[str, ArrayLike]) -> dict[str, str]:
    """The digests of several arrays by name. Devices work at the same time.

    Args:
        arrays: NumPy or JAX arrays of any shape, dtype and sharding. Where several processes share an
            array, every process must call this with the same names.
    """
    results = {name: value for name, array in arrays.items() if (value := _recall(array))}
    partial_sums = {name: _start(array) for name, array in arrays.items() if name not in results}
    # Sums modulo 2**32 can be added in any order, so every sharding of an array, over any number of processes, has the
    # digest of the whole array.
    sums = {name: np.sum(np.asarray(jax.device_get(parts)), axis=0) for name, parts in partial_sums.items()}
    if shared := [name for name in sums if not _is_local(arrays[name])]:  # each process has summed its own shards
        gathered = multihost_utils.process_allgather(np.stack([sums[name] for name in shared]).astype(np.uint32))
        sums |= dict(zip(shared, np.asarray(gathered).astype(np.uint64).sum(axis=0), strict=True))
    for name, (first, second) in sums.items():
        results[name] = f"{int(first) & 0xFFFFFFFF:08x}{int(second) & 0xFFFFFFFF:08x}"
        _remember(arrays[name], results[name])
    return results


def _is_local(array: ArrayLike) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def _recall(array: ArrayLike) -> str | None:
    reference, value = _cache.get(id(array), (None, None))
    return value if reference is not None and reference() is array else None  # an id is reused after its array dies


def _remember(array: ArrayLike, value: str) -> None:
    if isinstance(array, jax.Array):
        key = id(array)
        _cache[key] = (weakref.ref(array, lambda _: _cache.pop(key, None)), value)


def _start(array: ArrayLike) -> list[ArrayLike]:
    """The sums of each shard of an array that this process answers for; devices may still be computing them."""
    if not isinstance(array, jax.Array):
        return [host_sums(np.asarray(array))]
    shards = array.addressable_shards
    # Each element is counted once: of the replicas of a shard the first one, on whichever process it is.
    shards = shards[:1] if array.is_fully_replicated else [shard for shard in shards if shard.replica_id == 0]
    return [_shard_sums(shard.data, shard.index, array.shape) for shard in shards] or [np.zeros(2, np.uint64)]


def _shard_sums(data: Array, index: Sequence[slice], shape: Sequence[int]) -> ArrayLike:
    strides = _strides(shape)
    offset = sum((part.start or 0) * stride for part, stride in zip(index, strides, strict=True))
    # XLA's CPU compiles for a second per shape, needs a temporary as large as the array, and is half as fast.
    if _bits(data.dtype) < 8 or next(iter(data.devices())).platform == "cpu":
        return host_sums(np.asarray(data), offset, strides)
    return device_sums(data, np.uint32(offset * _words_per_element(data.dtype) % 2**32), strides=tuple(strides))


def _strides(shape: Sequence[int]) -> list[int]:
    return [int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape))]  # Python integers: no overflow


def _bits(dtype: np.dtype) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 8 * dtype.itemsize


def _words_per_element(dtype: np.dtype) -> int:
    return max(1, dtype.itemsize // 4)


def _words(array: np.ndarray) -> np.ndarray:
    """The bits of ``array`` ``[*shape]`` as unsigned words ``[*shape, words per element]``, lowest word first."""
    array = np.ascontiguousarray(array).reshape(*array.shape, 1)
    # Little-endian whatever the machine, so that a digest means the same everywhere.
    words = array.view(f"<u{min(array.dtype.itemsize, 4)}")
    return words & np.uint8(2 ** _bits(array.dtype) - 1) if _bits(array.dtype) < 8 else words


def host_sums(array: np.ndarray, offset: int = 0, strides: Sequence[int] | None = None) -> np.ndarray:
    """The two sums of an array, or of a shard of one, that the host can see.

    Args:
        array: ``[*shape]``.
        offset: The flat position of its first element in the global array.
        strides: Elements from one to the next along each axis, in the global array.

    Returns:
        ``[2]`` uint64; only the low 32 bits mean something.
    """
    per_element = _words_per_element(array.dtype)
    strides = _strides(array.shape) if strides is None else strides
    words = _words(array)
    word_strides = [*(stride * per_element for stride in strides), 1]
    starts, length = _runs(words.shape, word_strides, offset * per_element)
    blocks = list(_blocks(words.reshape(len(starts), length), starts))
    workers = min(len(blocks) // 16 + 1, os.cpu_count() or 1)  # NumPy releases the GIL; few blocks are not worth it
    if workers == 1:
        return _sum_blocks(blocks)
    with ThreadPoolExecutor(workers) as pool:
        return np.sum(list(pool.map(_sum_blocks, (blocks[i::workers] for i in range(workers)))), axis=0)


def _runs(shape: Sequence[int], strides: Sequence[int], offset: int) -> tuple[np.ndarray, int]:
    """The longest runs of consecutive positions: where each starts ``[runs]``, and their length."""
    length, axis = 1, len(shape)
    while axis and (shape[axis - 1] == 1 or strides[axis - 1] == length):
        axis -= 1
        length *= shape[axis]
    starts = np.array([offset % 2**32], np.uint64)
    for size, stride in zip(shape[:axis], strides[:axis], strict=True):
        starts = (starts[:, None] + np.arange(size, dtype=np.uint64) * np.uint64(stride % 2**32)).reshape(-1)
    return starts.astype(np.uint32), length


def _blocks(words: np.ndarray, starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rows = max(1, _BLOCK // max(1, words.shape[1]))
    for row in range(0, words.shape[0], rows):
        for column in range(0, words.shape[1], _BLOCK):
            block = words[row : row + rows, column : column + _BLOCK]
            yield block, starts[row : row + rows] + np.uint32(column % 2**32)


def _sum_blocks(blocks: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    sums, line = np.zeros(2, np.uint64), np.arange(_BLOCK, dtype=np.uint32)
    buffers = [np.empty(_BLOCK, np.uint32) for _ in range(3)]  # reused: fresh ones would leave the cache
    for words, starts in blocks:
        k, h, shifted = (buffer[: words.size].reshape(words.shape) for buffer in buffers)
        # The position enters a word before it is mixed, so equal words in two places hash differently. The second sum
        # weighs each hash by its position: it changes where two words change places.
        np.add(starts[:, None], line[: words.shape[1]], out=k)
        np.multiply(k, np.uint32(_GOLDEN), out=h)
        np.add(h, words, out=h)
        for shift, factor in ((16, _MIX_1), (13, _MIX_2), (16, 1)):
            np.right_shift(h, np.uint32(shift), out=shifted)
            np.bitwise_xor(h, shifted, out=h)
            if factor != 1:
                np.multiply(h, np.uint32(factor), out=h)
        sums[0] += np.add.reduce(h, axis=None, dtype=np.uint32)
        np.multiply(h, k, out=h)
        sums[1] += np.add.reduce(h, axis=None, dtype=np.uint32)
    return sums


@partial(jax.jit, static_argnames="strides")
def device_sums(array: Array, offset: ArrayLike, *, strides: tuple[int, ...]) -> Array:
    """`host_sums` where the data is. ``offset`` counts words; returns ``[2]`` uint32."""
    per_element = _words_per_element(array.dtype)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)  # bitcast_convert_type takes neither bools nor complex numbers
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(array.dtype.itemsize, 4) * 8}")).astype(jnp.uint32)
    # An element of 64 bits became two words along a new last axis, lowest first, as `_words` has them.
    words = words.reshape(*words.shape[: len(strides)], per_element)
    k = jnp.uint32(offset)
    for axis, stride in enumerate([*(stride * per_element for stride in strides), 1]):
        k = k + lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
    h = words + k * jnp.uint32(_GOLDEN)
    h = (h ^ (h >> 16)) * jnp.uint32(_MIX_1)
    h = (h ^ (h >> 13)) * jnp.uint32(_MIX_2)
    h = h ^ (h >> 16)
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32), jnp.sum(h * k, dtype=jnp.uint32)])
