"""Digests of arrays: 64 bits that depend on every element and its place, and on nothing else.

The digest of an array is a pair of sums over its words ``w`` at flat position ``k``::

    h = mix(w + k * G)        s1 = sum(h)        s2 = sum(h * k)        (all modulo 2**32)

``mix`` is MurmurHash3's 32-bit finalizer. Sums do not care who adds what: each device adds up its own
shard, so the result is the same for every sharding and process count, an array is never gathered, and
one that lives on an accelerator is never brought to the host. On the host the sums run in blocks that
fit a core's cache. This tells arrays apart; it is no defence against someone who forges one on purpose.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_BLOCK = 1 << 16  # words: 256 KiB, and two more buffers of it, stay in a core's second-level cache
_seen: dict[int, tuple[weakref.ref, str]] = {}  # jax arrays never change, so each is read once


def digest(array: Any) -> str:
    """The digest of one array, as 16 hexadecimal digits.

    >>> digest(np.arange(6, dtype=np.float32))
    'a12f6f73bfe09ac4'
    """
    return digests({"": array})[""]


def digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The digests of several arrays by name. Devices work at the same time.

    Args:
        arrays: NumPy or JAX arrays of any shape, dtype and sharding. Where several processes share an
            array, every process must call this with the same names.
    """
    found = {name: known for name, array in arrays.items() if (known := _recall(array))}
    started = {name: _start(array) for name, array in arrays.items() if name not in found}
    sums = {name: np.sum(np.asarray(jax.device_get(parts)), axis=0) for name, parts in started.items()}
    shared = [name for name in sums if not _is_local(arrays[name])]
    if shared:  # each process has added up the shards that it holds
        gathered = multihost_utils.process_allgather(np.stack([sums[name] for name in shared]).astype(np.uint32))
        sums |= dict(zip(shared, np.asarray(gathered).astype(np.uint64).sum(axis=0), strict=True))
    for name, (first, second) in sums.items():
        found[name] = f"{int(first) & 0xFFFFFFFF:08x}{int(second) & 0xFFFFFFFF:08x}"
        _remember(arrays[name], found[name])
    return found


def _is_local(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def _recall(array: Any) -> str | None:
    reference, value = _seen.get(id(array), (None, None))
    return value if reference is not None and reference() is array else None


def _remember(array: Any, value: str) -> None:
    if isinstance(array, jax.Array):
        name = id(array)
        _seen[name] = (weakref.ref(array, lambda _: _seen.pop(name, None)), value)


def _start(array: Any) -> list[Any]:
    """The sums of each part of an array that this process answers for, perhaps still being computed."""
    if not isinstance(array, jax.Array):
        return [host_sums(np.asarray(array))]
    if array.is_fully_replicated:
        shards = array.addressable_shards[:1]
    else:
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    parts: list[Any] = [_shard_sums(shard.data, shard.index, array.shape) for shard in shards]
    return parts or [np.zeros(2, np.uint64)]


def _shard_sums(data: jax.Array, index: Sequence[slice], shape: Sequence[int]) -> Any:
    strides = [int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape))]
    offset = sum((part.start or 0) * stride for part, stride in zip(index, strides, strict=True))
    if _bits(data.dtype) < 8 or next(iter(data.devices())).platform == "cpu":
        return host_sums(np.asarray(data), offset, strides)
    return device_sums(data, np.uint32(offset * _per_element(data.dtype) % 2**32), strides=tuple(strides))


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 8 * dtype.itemsize


def _per_element(dtype: Any) -> int:
    return max(1, dtype.itemsize // 4)


def _words(array: np.ndarray) -> np.ndarray:
    """The bits of ``array`` ``[*shape]`` as unsigned words ``[*shape, words per element]``, lowest word first."""
    array = np.ascontiguousarray(array).reshape(*array.shape, 1)
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
    per = _per_element(array.dtype)
    if strides is None:
        strides = [int(np.prod(array.shape[axis + 1 :], dtype=object)) for axis in range(array.ndim)]
    words = _words(array)
    starts, columns = _runs(words.shape, [*(stride * per for stride in strides), 1], offset * per)
    tasks = list(_blocks(words.reshape(len(starts), columns), starts))
    workers = min(len(tasks) // 16 + 1, os.cpu_count() or 1)
    if workers == 1:
        return _sum_blocks(tasks)
    with ThreadPoolExecutor(workers) as pool:
        return np.sum(list(pool.map(_sum_blocks, (tasks[i::workers] for i in range(workers)))), axis=0)


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
            part = words[row : row + rows, column : column + _BLOCK]
            yield part, starts[row : row + rows] + np.uint32(column % 2**32)


def _sum_blocks(tasks: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    sums, line = np.zeros(2, np.uint64), np.arange(_BLOCK, dtype=np.uint32)
    place, mixed, spare = (np.empty(_BLOCK, np.uint32) for _ in range(3))
    for words, starts in tasks:
        k, h, t = (buffer[: words.size].reshape(words.shape) for buffer in (place, mixed, spare))
        np.add(starts[:, None], line[: words.shape[1]], out=k)
        np.multiply(k, np.uint32(_GOLDEN), out=h)
        np.add(h, words, out=h)
        for shift, factor in ((16, _MIX_1), (13, _MIX_2), (16, None)):
            np.right_shift(h, np.uint32(shift), out=t)
            np.bitwise_xor(h, t, out=h)
            if factor is not None:
                np.multiply(h, np.uint32(factor), out=h)
        sums[0] += np.add.reduce(h, axis=None, dtype=np.uint32)
        np.multiply(h, k, out=h)
        sums[1] += np.add.reduce(h, axis=None, dtype=np.uint32)
    return sums


@partial(jax.jit, static_argnames="strides")
def device_sums(array: jax.Array, offset: Any, *, strides: tuple[int, ...]) -> jax.Array:
    """`host_sums` where the data is. ``offset`` counts words; returns ``[2]`` uint32."""
    per = _per_element(array.dtype)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(array.dtype.itemsize, 4) * 8}")).astype(jnp.uint32)
    words = words.reshape(*words.shape[: len(strides)], per)
    k = jnp.uint32(offset)
    for axis, stride in enumerate([*(stride * per for stride in strides), 1]):
        k = k + lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
    h = words + k * jnp.uint32(_GOLDEN)
    h = (h ^ (h >> 16)) * jnp.uint32(_MIX_1)
    h = (h ^ (h >> 13)) * jnp.uint32(_MIX_2)
    h = h ^ (h >> 16)
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32), jnp.sum(h * k, dtype=jnp.uint32)])
