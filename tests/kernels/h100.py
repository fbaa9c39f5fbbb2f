"""An H100 that is not there, to compile for, and what a program compiled for it moves; see `test_compiled_for_gpus`."""

import importlib.util
import math
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {core}
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
FLOPS, BANDWIDTH = 990e12, 3.35e12
"""bfloat16 operations and bytes a second of an H100 SXM (its data sheet, without sparsity)."""
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


def has_compiler():
    return importlib.util.find_spec("jax_cuda12_plugin") is not None


def sharding(capability="9.0", shared_memory_kib=227, name="NVIDIA H100 80GB HBM3"):
    """Where arrays are on one such GPU."""
    from jax.experimental import topologies

    major, minor = capability.split(".")
    block = shared_memory_kib * 1024
    config = CONFIG.format(core=block + 1024, block=block, major=major, minor=minor, name=name)
    devices = topologies.get_topology_desc(name, "cuda", target_config=config, topology="1x1x1").devices
    return NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())


def compile_for(place, f, *shapes):
    """``f`` compiled for operands of these shapes and dtypes; nothing can be timed, so no product is tuned."""
    operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    lowered = jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",))
    return lowered.compile({"xla_gpu_autotune_level": 0})


def type_bytes(text):
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", text)
    )


def border_bytes(compiled):
    """``{kernel: bytes}``: what each kernel of a program without loops reads and writes, an operand counted once."""
    entry = compiled.as_text().split("ENTRY")[1]
    types, found = {}, {}
    pattern = r"^\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)"
    for name, result, opcode, operands in re.findall(pattern, entry, re.MULTILINE):
        types[name] = result
        if opcode not in ("parameter", "bitcast", "tuple", "get-tuple-element", "constant"):
            read = set(re.findall(r"%([\w.-]+)", operands))
            found[name] = type_bytes(result) + sum(type_bytes(types[operand]) for operand in read)
    return found
