"""The table of GPUs, and compiling for one that is not there."""

import re

import jax
import jax.numpy as jnp
import pytest

from lojax.planner import gpu_aot
from lojax.planner.gpu_aot import compiler_options, gpu_mesh, gpu_sharding, has_gpu_compiler, lower_for_gpu
from lojax.planner.gpus import GPUS, find_gpu, target_config

compiles = pytest.mark.skipif(not has_gpu_compiler(), reason="JAX's CUDA plugin is not installed")


def test_every_size_of_card_is_there():
    assert {16, 24, 40, 48, 80, 141, 180} <= {gpu.gigabytes for gpu in GPUS.values()}


@pytest.mark.parametrize("name", GPUS)
def test_the_numbers_of_a_card_agree_with_each_other(name):
    """What a chip computes outside of its tensor cores follows from its cores and its clock."""
    gpu = GPUS[name]
    fields = dict(re.findall(r"(\w+): ([\d.]+)", target_config(gpu)))
    units = int(fields["fpus_per_core"])
    assert 0.8 < 2 * units * gpu.cores * gpu.clock * 1e9 / gpu.vector_flops < 1.1  # a multiplication and an addition
    assert 1.7 < gpu.flops / gpu.vector_flops < 32
    assert gpu.usable_memory < gpu.memory < gpu.gigabytes * 1.08e9
    assert gpu.link < gpu.bandwidth and gpu.network < gpu.link


def test_a_card_that_is_not_known_lists_those_that_are():
    with pytest.raises(ValueError, match=r"gpu='h10' is not a known card; expected one of .*h100 \(80 GB\).*h100'"):
        find_gpu("h10")


def test_without_the_plugin_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(gpu_aot, "has_gpu_compiler", lambda: False)
    with pytest.raises(RuntimeError, match=r'pip install "lojax\[gpu-plan\]"'):
        gpu_sharding(GPUS["h100"])


@compiles
def test_a_program_is_compiled_for_the_card():
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=gpu_sharding(GPUS["h100"]))
    compiled = lower_for_gpu(jax.jit(lambda x: x @ x), x).compile(compiler_options())
    (device,) = jax.tree.leaves(compiled.output_shardings)[0].device_set
    assert device.device_kind == "NVIDIA H100 80GB HBM3"


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("name", GPUS)
def test_every_card_compiles(name):
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=gpu_sharding(GPUS[name]))
    assert lower_for_gpu(jax.jit(lambda x: x @ x), x).compile(compiler_options()).memory_analysis()


@compiles
def test_a_mesh_of_hosts_keeps_its_last_axis_in_a_host():
    mesh = gpu_mesh(GPUS["a100"], {"data": 2, "fsdp": 4}, hosts=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len({device.process_index for device in row}) for row in mesh.devices] == [1, 1]
    assert len({device.process_index for device in mesh.devices.flat}) == 2
