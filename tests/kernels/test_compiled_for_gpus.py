"""The kernels compiled for GPUs that are not there: they fit, and move as little as they promise."""

import jax
import jax.numpy as jnp
import pytest

from lojax.kernels import tiles
from lojax.kernels.layer import layer
from tests.kernels.h100 import BANDWIDTH, FLOPS, border_bytes, compile_for, has_compiler, sharding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimized,
    pytest.mark.skipif(not has_compiler(), reason="JAX's CUDA plugin is not installed"),
]
MIB = 2**20


def frozen(x, w, g):
    y, pullback = jax.vjp(lambda x: x @ w, x)
    return y, *pullback(g)


def adapted(x, w, a, b, g):
    y, pullback = jax.vjp(lambda x, a, b: layer(x, w, a, b, 2.0), x, a, b)
    return y, *pullback(g)


def shapes(tokens, m, n, rank, dtype=jnp.bfloat16):
    large = [((tokens, m), dtype), ((m, n), dtype)]
    return large, [((m, rank), jnp.float32), ((rank, n), jnp.float32)], [((tokens, n), dtype)]


@pytest.fixture(scope="module")
def h100():
    return sharding()


@pytest.mark.parametrize(
    ("shape", "most_mib"),
    [
        *(((8192, 4096, 4096, 16), 517), ((8192, 4096, 4096, 64), 530), ((8192, 4096, 14336, 16), 1165)),
        *(((8192, 4096, 14336, 64), 1190), ((8192, 14336, 4096, 16), 1320), ((8192, 14336, 4096, 64), 1340)),
    ],
    ids=str,
)
def test_bytes_and_roofline_time_of_a_layer(shape, most_mib, h100):
    """The frozen layer moves 320 MiB where m and n are 4096, and 800 where one is 14336."""
    tokens, m, n, rank = shape
    large, factors, cotangent = shapes(*shape)
    moved = border_bytes(compile_for(h100, adapted, *large, *factors, *cotangent))
    assert sum(moved.values()) <= most_mib * MIB
    # Both large products are bound by their operations, everything else by its bytes. The kernel of the gradients
    # reads g a second time for dB, from memory or from the cache, while it waits for the tensor cores.
    base = 2 * tokens * m * n / FLOPS
    thin = 2 * tokens * rank / FLOPS
    by_size = sorted(moved.values())
    seconds = 2 * base + thin * (n + 2 * m + n) + sum(by_size[:-2]) / BANDWIDTH
    assert max(by_size[-2:]) / BANDWIDTH < base
    assert seconds <= 1.12 * 2 * base


def test_a_frozen_layer_as_it_is_counted_here(h100):
    large, _, cotangent = shapes(8192, 4096, 4096, 16)
    assert sum(border_bytes(compile_for(h100, frozen, *large, *cotangent)).values()) == 320 * MIB


@pytest.mark.parametrize(
    ("size", "rank", "dtype"),
    [
        *(((4096, 1024, 4096), rank, jnp.bfloat16) for rank in (1, 16, 100, 256)),
        ((1000, 2000, 1000), 16, jnp.bfloat16),
        ((2048, 14336, 264), 100, jnp.bfloat16),
        ((1000, 2000, 1000), 16, jnp.float32),
        ((4096, 1024, 4096), 256, jnp.float32),
    ],
    ids=str,
)
def test_ragged_shapes_ranks_and_dtypes_fit(size, rank, dtype, h100):
    large, factors, cotangent = shapes(*size, rank, dtype)
    compile_for(h100, adapted, *large, *factors, *cotangent)
    # Without dx, and so by other kernels.
    of_factors = lambda x, w, a, b, g: jax.vjp(lambda a, b: layer(x, w, a, b, 2.0), a, b)[1](g)
    compile_for(h100, of_factors, *large, *factors, *cotangent)


@pytest.mark.parametrize(
    "gpu", [("8.0", 163, "NVIDIA A100-SXM4-80GB"), ("8.9", 99, "NVIDIA L40S"), ("10.0", 227, "NVIDIA B200")], ids=str
)
@pytest.mark.parametrize("rank", [16, 100])
def test_other_gpus(gpu, rank, monkeypatch):
    monkeypatch.setattr(tiles, "device_shared_memory", lambda: gpu[1] * 1024)
    large, factors, cotangent = shapes(4096, 4096, 4096, rank)
    compile_for(sharding(*gpu), adapted, *large, *factors, *cotangent)


def test_a_bank_of_adapters(h100):
    """Under vmap the kernels get a further axis of their grid, and w is not copied."""
    large, factors, cotangent = shapes(1024, 1024, 1024, 8)
    banks = [((4, *shape), dtype) for shape, dtype in factors]
    mapped = jax.vmap(adapted, (None, None, 0, 0, None))
    compiled = compile_for(h100, mapped, *large, *banks, *cotangent)
    assert compiled.as_text().count("__gpu$xla.gpu.triton") == 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * MIB
