"""Claim: with an NF4 base a 70B model fits on one 80 GB GPU, and an 8B model on one 16 GB TPU chip.

The LoRA step of a Llama-shaped decoder (scanned layers, full rematerialization, float32 adapters, Adam, rank 16 on all
seven linear maps) is compiled ahead of time; neither device is needed. For the GPU: jax-cuda12-plugin and -pjrt,
installed without their dependencies; for the TPU: libtpu.

    XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/qlora_plan.py
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # there is no device to tune on
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh
from measure import table, write

import lojax
from lojax.planner.aot import topology_mesh
from lojax.planner.chips import parse_topology
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import open_config
from lojax.planner.train_step import StepProgram, lora_step

GB = 1e9
H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA has to know of an H100 SXM."""


def gpu_mesh() -> Mesh:
    """One H100."""
    device = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices
    return Mesh(np.asarray(device).reshape(1), ("fsdp",))


def program(model: str, mesh: Mesh, batch: int, kind: str | None, quantized: list[str]) -> StepProgram:
    """The step on shapes."""
    decoder = Decoder(open_config(model), mesh)
    wrapped = lojax.wrap(decoder.total_loss, TARGETS, rank=16, alpha=32, strict=True)
    return lora_step(
        wrapped, decoder, optax.adam(1e-4), batch=batch, seq=2048, quantized=kind, quantized_targets=quantized
    )


def compile_row(
    model: str, device: str, mesh: Mesh, batch: int, kind: str | None, quantized: list[str]
) -> dict[str, Any]:
    """Compiles one step; its memory in GB."""
    step = program(model, mesh, batch, kind, quantized)
    traced = jax.jit(step.step, out_shardings=step.out_shardings, donate_argnums=step.donate).trace(*step.args)
    platform = "cuda" if "H100" in device else "tpu"
    stats = traced.lower(lowering_platforms=(platform,)).compile().memory_analysis()
    arguments, temporaries = stats.argument_size_in_bytes / GB, stats.temp_size_in_bytes / GB
    return {
        "model": model,
        "device": device,
        "tokens": batch * 2048,
        "base": kind or "bfloat16",
        "quantized": "blocks" if len(quantized) == 1 else "blocks and embedding",
        "arguments GB": arguments,
        "temporaries GB": temporaries,
        "sum GB": arguments + temporaries,
        "peak GB": stats.peak_memory_in_bytes / GB,
    }


def main() -> None:
    """Compiles and writes."""
    rows = []
    both = [TARGETS, "embed_tokens/embedding"]
    cases = [
        ("70B", "one H100", 1, [TARGETS]),
        ("70B", "one H100", 1, both),
        ("8B", "one H100", 4, [TARGETS]),
        ("8B", "one v5e chip", 4, [TARGETS]),
    ]
    for model, device, batch, quantized in cases:
        mesh = gpu_mesh() if "H100" in device else topology_mesh(parse_topology("v5e:1x1"), {"fsdp": 1})
        rows.append(compile_row(model, device, mesh, batch, "nf4", quantized))
        print(rows[-1], flush=True)
    text = (
        "A LoRA step with Adam, rank 16 on all seven linear maps, full rematerialization. What is not "
        f"quantized stays bfloat16. Compiled for the device; nothing was run.\n\n{table(rows)}\n\n"
        "Results share the memory of the donated arguments. An H100 has 84.9 GB, a v5e chip 16.9 GB."
    )
    write("qlora_plan", "What QLoRA needs on one device", text, {"rows": rows})


if __name__ == "__main__":
    main()
