"""What one adapted layer moves on a GPU must not grow. Compiled for an H100; nothing runs."""

import functools

import jax
import jax.numpy as jnp
import pytest

import lojax
from lojax.planner.gpu_aot import compiler_options, gpu_sharding, has_gpu_compiler
from lojax.planner.gpus import GPUS
from lojax.planner.kernels import gpu_cost

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimized,
    pytest.mark.skipif(not has_gpu_compiler(), reason="JAX's CUDA plugin is not installed"),
]
MIB, SCALE = 2**20, 2.0


def frozen(w, a, b, x):
    return x @ w


def by_hand(w, a, b, x):
    return x @ w + SCALE * ((x @ a) @ b)


def adapted(w, a, b, x):
    model = lojax.wrap(lambda w, x: x @ w, "", rank=a.shape[1], alpha=SCALE * a.shape[1], strict=True)
    return model.apply(w, lojax.Adapter(a=a, b=b, scale=SCALE, axes=("in", "out")), x)


@functools.cache
def cost(layer, f, triton):
    """y and the gradients of A, B and x of a bfloat16 layer, for a given gradient of y."""
    t, m, n, r = layer
    sharding = gpu_sharding(GPUS["h100"])
    sizes = ((m, n), (m, r), (r, n), (t, m), (t, n))
    shapes = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=sharding) for size in sizes]

    def step(w, a, b, x, g):
        if f is frozen:
            y, pull_back = jax.vjp(lambda x: f(w, a, b, x), x)
        else:
            y, pull_back = jax.vjp(lambda a, b, x: f(w, a, b, x), a, b, x)
        return y, pull_back(g)

    return gpu_cost(jax.jit(step).lower(*shapes).compile(compiler_options(triton=triton)), GPUS["h100"])


LAYER = (8192, 4096, 4096, 16)
# Of jaxlib 0.10.2; (MiB without workspaces, MiB of temporaries without workspaces) with Triton and with cuBLAS.
MOST = {True: (1107, 65), False: (836, 1)}


@pytest.mark.parametrize("triton", (True, False))
def test_the_bytes_of_the_layer(triton):
    found, floor = (cost(LAYER, f, triton) for f in (adapted, frozen))
    moved, temporaries = MOST[triton]
    assert (found.bytes - found.workspace) / MIB <= moved
    assert (found.temporaries - floor.temporaries) / MIB <= temporaries
    assert (floor.bytes - floor.workspace) / MIB == 320
    assert found.flops <= 1.0001 * (floor.flops + 6 * 8192 * 16 * (4096 + 4096))


@pytest.mark.parametrize("triton", (True, False))
@pytest.mark.parametrize("layer", [LAYER, (8192, 4096, 14336, 16), (8192, 4096, 4096, 64)], ids=str)
def test_no_more_than_lora_by_hand(layer, triton):
    ours, theirs = (cost(layer, f, triton) for f in (adapted, by_hand))
    assert ours.bytes <= 1.001 * theirs.bytes
    assert ours.seconds <= 1.001 * theirs.seconds
