"""A digest follows its definition on every dtype, host, device and sharding, and any change changes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lojax.checkpoint import digest as module
from lojax.checkpoint.digest import device_sums, digest, digests, host_sums

_DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "uint8",
    "bool",
    "int32",
    "float64",
    "complex64",
    "int4",
    "float8_e5m2",
]


def _by_the_book(array: np.ndarray) -> str:
    """The definition in the docstring of `lojax.checkpoint.digest`, word by word in Python integers."""
    width = min(array.dtype.itemsize, 4)
    data = np.ascontiguousarray(array).tobytes()
    first = second = 0
    for k in range(len(data) // width):
        word = int.from_bytes(data[k * width : (k + 1) * width], "little")
        h = (word + k * 0x9E3779B1) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        h ^= h >> 16
        first, second = (first + h) % 2**32, (second + h * k) % 2**32
    return f"{first:08x}{second:08x}"


def _draw(shape, dtype, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return (bits[..., 0] > 99) if dtype == "bool" else bits.view(jnp.dtype(dtype))[..., 0]


@pytest.mark.parametrize("dtype", [dtype for dtype in _DTYPES if dtype != "int4"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (3, 1, 4), (0, 3)])
def test_digest_follows_its_definition(dtype, shape):
    array = _draw(shape, dtype)
    assert digest(array) == _by_the_book(array)


def test_digest_of_a_known_array_never_changes():
    assert digest(np.arange(100_000, dtype=np.float32)) == "e07a2862f68d47df"


@pytest.mark.parametrize("dtype", [dtype for dtype in _DTYPES if dtype not in ("float64", "int4")])
def test_host_and_device_agree(dtype):
    array = _draw((6, 10), dtype)
    on_device = device_sums(jnp.asarray(array), np.uint32(7), strides=(40, 2))
    on_host = host_sums(array, 7 // max(1, array.dtype.itemsize // 4) if dtype != "complex64" else 0, (40, 2))
    if dtype == "complex64":
        on_device = device_sums(jnp.asarray(array), np.uint32(0), strides=(40, 2))
    assert [int(x) % 2**32 for x in on_device] == [int(x) % 2**32 for x in on_host]


@pytest.mark.parametrize(
    "names", [("x",), (None, "x"), (("x", "y"),), ("y", "x"), (None, None, ("y", "x")), (None, "y"), ()]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_digest_does_not_depend_on_the_sharding(names, dtype):
    array = _draw((8, 16, 24), dtype)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))
    assert digest(spread) == digest(array)


def test_large_arrays_take_several_threads_and_blocks():
    array = np.random.default_rng(0).normal(size=(37, 70_001)).astype(np.float32)
    whole = digest(array)
    assert whole == digest(np.asfortranarray(array)) != digest(array.T)
    halves = host_sums(array[:, :33_333], 0, (70_001, 1)) + host_sums(array[:, 33_333:], 33_333, (70_001, 1))
    assert "".join(f"{int(x) % 2**32:08x}" for x in halves) == whole


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_small_change_changes_the_digest(data):
    array = np.random.default_rng(0).normal(size=64).astype(np.float32)
    places = data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True))
    changed = array.copy()
    kind = data.draw(st.sampled_from(["flip", "sign", "swap"]))
    if kind == "sign":
        changed[places] *= -1
    elif kind == "swap":
        changed[places] = np.roll(changed[places], 1)
    else:
        for place in places:
            changed.view(np.uint32)[place] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert (digest(changed) == digest(array)) == (changed.tobytes() == array.tobytes())


def test_an_array_is_read_once(monkeypatch):
    calls = []
    real = module.host_sums
    monkeypatch.setattr(module, "host_sums", lambda *args: calls.append(1) or real(*args))
    x, y = jnp.arange(10.0), np.arange(10.0)
    first = digests({"x": x, "y": y})
    assert len(calls) == 2
    y[3] = 9  # a NumPy array may change, so it is read again
    second = digests({"x": x, "y": y})
    assert len(calls) == 3 and first["x"] == second["x"] and first["y"] != second["y"]
    size = len(module._cache)
    del x
    assert len(module._cache) == size - 1
