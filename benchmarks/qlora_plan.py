"""Claim: with an NF4 base a 70B model fits on one 80 GB GPU, and an 8B model on one 16 GB TPU chip.

The LoRA step of a Llama-shaped decoder (scanned layers, full rematerialization, float32 adapters, Adam, rank 16 on all
seven linear maps) is compiled ahead of time; neither device is needed. For the GPU: jax-cuda12-plugin; for the TPU:
libtpu.

    python benchmarks/qlora_plan.py
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import optax
from jax.sharding import Mesh
from measure import table, write

import lojax
from lojax.planner.aot import topology_mesh
from lojax.planner.chips import parse_topology
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import open_config
from lojax.planner.gpu_aot import compiler_options, gpu_mesh
from lojax.planner.gpus import GPUS
from lojax.planner.train_step import StepProgram, lora_step

GB = 1e9


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
    stats = step.lower().compile(compiler_options() if "H100" in device else None).memory_analysis()
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
        mesh = (
            gpu_mesh(GPUS["h100"], {"fsdp": 1})
            if "H100" in device
            else topology_mesh(parse_topology("v5e:1x1"), {"fsdp": 1})
        )
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
