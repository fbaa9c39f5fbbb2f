"""The kernels compiled for TPUs that are not there: they fit, and read arrays as often as their tiles make them."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lojax.kernels.layer import layer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimized,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
MIB = 2**20


def adapted(x, w, a, b, g):
    y, pullback = jax.vjp(lambda x, a, b: layer(x, w, a, b, 2.0), x, a, b)
    return y, *pullback(g)


def of_factors(x, w, a, b, g):
    return jax.vjp(lambda a, b: layer(x, w, a, b, 2.0), a, b)[1](g)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """In which libtpu looks for no TPU."""
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@functools.cache
def one_chip(chip):
    from jax.experimental import topologies

    shape = "1x1x1" if chip == "v5p" else "1x1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_ACCELERATOR_TYPE", f"{chip}-1")
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:{shape}", chips_per_host_bounds=(1, 1, 1)
        )
    return Mesh(np.array(topology.devices[:1]), ("x",))


def compile_for(chip, f, shape, dtype=jnp.bfloat16):
    tokens, m, n, rank = shape
    mesh = one_chip(chip)
    # The mesh in use tells the kernels which TPU it is.
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec())
        sizes = [((tokens, m), dtype), ((m, n), dtype), ((m, rank), jnp.float32), ((rank, n), jnp.float32)]
        sizes.append(((tokens, n), dtype))
        operands = [jax.ShapeDtypeStruct(size, dtype, sharding=place) for size, dtype in sizes]
        return jax.jit(f).trace(*operands).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("shape", "most_mib"),
    [((8192, 4096, 4096, 16), 460), ((8192, 4096, 4096, 64), 470), ((8192, 4096, 14336, 16), 1560)],
    ids=str,
)
def test_bytes_of_a_layer(shape, most_mib, chip):
    """XLA moves 960 MiB (v5e) for the frozen layer where m and n are 4096, and 1,448 for LoRA written by hand."""
    cost = compile_for(chip, adapted, shape).cost_analysis()
    assert cost["bytes accessed"] <= most_mib * MIB
    tokens, m, n, rank = shape
    floor = 2 * tokens * (2 * m * n + 3 * rank * (m + n))
    assert cost["flops"] <= 1.01 * floor


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1000, 2000, 1000, 100), jnp.bfloat16),
        ((2048, 1024, 4096, 1), jnp.bfloat16),
        ((2048, 1024, 1024, 256), jnp.float32),
        ((77, 200, 300, 3), jnp.bfloat16),
    ],
    ids=str,
)
def test_ragged_shapes_ranks_and_dtypes_fit(shape, dtype, chip):
    compile_for(chip, adapted, shape, dtype)
    compile_for(chip, of_factors, shape, dtype)
