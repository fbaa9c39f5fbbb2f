"""Claim: on a GPU a LoRA step runs at the speed of the frozen net with dx, and well above full fine-tuning.

The only script for a GPU. Everything is measured in one run, all methods in turn:

1. one dense layer, gradient of A, B and x, over sizes x tokens x ranks, bfloat16 and float32;
2. a stack of layers with the shapes of an 8B Llama, LoRA on all seven weights of each, block remat and scan;
3. the same stack in torch with PEFT, eager and compiled, where torch finds a CUDA device.

    python benchmarks/gpu.py                     # everything, some minutes
    python benchmarks/gpu.py --quick             # only the shapes of the claims
    python benchmarks/gpu.py --smoke             # tiny shapes, to check on a CPU that everything runs
    python benchmarks/gpu.py --peak 989          # peak dense bfloat16 TFLOP/s of the device, for MFU
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room beside JAX

import jax
import jax.numpy as jnp
from layer_cost import FLOOR, SCALE, Layer, arguments, gradient, randomize
from layer_methods import METHODS, OURS, frozen_method, full_method, literal_method
from measure import PyTree, alternated, compiled_cost, ratio, table, write
from net_cost import products, programs
from nets import Net, draw

LAYER_METHODS = {
    FLOOR: frozen_method,
    **{name: METHODS[name] for name in OURS[:3]},
    "literal W0+BA": literal_method,
    "full fine-tuning": full_method,
}
STACK_METHODS = (FLOOR, *OURS[:3], "by hand", "full fine-tuning")
LLAMA_8B = Net("llama", width=4096, heads=32, kv_heads=8, inner=14336, vocabulary=32768, remat=True, dtype=jnp.bfloat16)


class Sizes(NamedTuple):
    """What one run measures."""

    layers: Sequence[Layer]
    stacks: Sequence[tuple[Net, int, int, int]]
    """``(net, rows, tokens, rank)``."""
    rounds: int
    repeat: int
    dtypes: Sequence[Any] = (jnp.bfloat16, jnp.float32)


def full_sizes() -> Sizes:
    """The grid of the claims."""
    grid = [Layer(t, d, d, 16) for d in (1024, 2048, 4096, 8192) for t in (512, 2048, 8192, 16384)]
    ranks = [Layer(8192, 4096, 4096, r) for r in (8, 32, 64, 128)]
    uneven = [Layer(8192, 4096, 14336, 16), Layer(8192, 14336, 4096, 16)]
    stack = dataclasses.replace(LLAMA_8B, layers=8, scanned=True)
    unrolled = dataclasses.replace(LLAMA_8B, layers=4)
    return Sizes([*grid, *ranks, *uneven], [(stack, 4, 2048, 16), (unrolled, 4, 2048, 16)], rounds=7, repeat=5)


def quick_sizes() -> Sizes:
    """The shapes of the claims."""
    stack = dataclasses.replace(LLAMA_8B, layers=8, scanned=True)
    return Sizes([Layer(8192, 4096, 4096, 16), Layer(2048, 1024, 1024, 16)], [(stack, 4, 2048, 16)], 7, 5)


def smoke_sizes() -> Sizes:
    """Tiny shapes."""
    small = dataclasses.replace(LLAMA_8B, layers=2, width=64, heads=4, kv_heads=2, inner=96, vocabulary=128)
    return Sizes([Layer(64, 32, 48, 4)], [(dataclasses.replace(small, scanned=True), 2, 16, 4)], rounds=3, repeat=2)


def repeat_call(f: Callable[..., Any], args: tuple[Any, ...], times: int) -> Any:
    """The result of the last of several calls, dispatched without waiting in between."""
    for _ in range(times):
        out = f(*args)
    return out


def layer_rows(sizes: Sizes, peak: float | None) -> tuple[list[dict[str, Any]], Any]:
    """A row for each layer and dtype: milliseconds of the floor, and every method relative to it."""
    rows, raw = [], []
    for dtype in sizes.dtypes:
        for layer in sizes.layers:
            ready = {}
            for name, make in LAYER_METHODS.items():
                method = make(layer.m, layer.n, layer.rank, SCALE)
                args = randomize(arguments(method, layer, dtype))
                step = jax.jit(gradient(method, "A, B, x"))
                ready[name] = functools.partial(repeat_call, step, args, sizes.repeat)
            seconds = alternated(ready, rounds=sizes.rounds, warm=2)
            floor = statistics.median(seconds[FLOOR]) / sizes.repeat
            row: dict[str, Any] = {"layer": str(layer), "dtype": str(jnp.dtype(dtype)), "floor ms": 1e3 * floor}
            row |= {name: ratio(seconds, name, FLOOR) for name in ready if name != FLOOR}
            row["lojax auto, times full's speed"] = 1 / ratio(seconds, "lojax auto", "full fine-tuning")
            row["floor TFLOP/s"] = 4 * layer.tokens * layer.m * layer.n / floor / 1e12
            if peak:
                row["floor of peak"] = row["floor TFLOP/s"] / peak
            rows.append(row)
            raw.append({"layer": layer, "dtype": row["dtype"], "seconds": seconds})
            print(row, flush=True)
    return rows, raw


def stack_rows(sizes: Sizes, peak: float | None) -> tuple[list[dict[str, Any]], Any]:
    """A row for each stack and method: tokens a second, MFU, memory."""
    rows, raw = [], []
    for net, lines, tokens, rank in sizes.stacks:
        x = jax.ShapeDtypeStruct((lines, tokens, net.width), net.dtype)
        labels = jax.ShapeDtypeStruct((lines, tokens), jnp.int32)
        steps = {name: step for name, step in programs(net, x, labels, rank).items() if name in STACK_METHODS}
        frozen_flops, low_rank_flops = products(net, x, rank)
        ready, memory = {}, {}
        for name, (f, args) in steps.items():
            compiled = jax.jit(f).lower(*args).compile()
            usage = compiled.memory_analysis()
            memory[name] = usage.temp_size_in_bytes + usage.output_size_in_bytes + usage.argument_size_in_bytes
            ready[name] = functools.partial(repeat_call, compiled, draw(args), 1), compiled_cost(compiled)
        seconds = alternated({name: run for name, (run, _) in ready.items()}, rounds=sizes.rounds)
        for name in ready:
            second = statistics.median(seconds[name])
            useful = frozen_flops * 1.5 if name == "full fine-tuning" else frozen_flops
            useful += low_rank_flops if name in (*OURS, "by hand") else 0
            row: dict[str, Any] = {"stack": _describe(net, lines, tokens, rank), "method": name, "ms": 1e3 * second}
            row |= {"/ floor": ratio(seconds, name, FLOOR), "tokens/s": lines * tokens / second}
            row |= {"times full's speed": 1 / ratio(seconds, name, "full fine-tuning")}
            row |= {"product TFLOP/s": useful / second / 1e12, "GiB": memory[name] / 2**30}
            row["kernels"] = ready[name][1].kernels
            if peak:
                row["MFU"] = row["product TFLOP/s"] / peak
            rows.append(row)
            print(row, flush=True)
        raw.append({"stack": _describe(net, lines, tokens, rank), "seconds": seconds})
    return rows, raw


def _describe(net: Net, rows: int, tokens: int, rank: int) -> str:
    return f"{net.layers} layers {'scanned' if net.scanned else 'unrolled'}, {rows}x{tokens}, r={rank}"


def torch_rows(sizes: Sizes, *, anywhere: bool) -> list[dict[str, Any]]:
    """The same stacks as transformers' Llama under PEFT, eager and compiled."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (torch.cuda.is_available() or anywhere):
        raise ImportError("a torch with CUDA", name="torch with CUDA")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for net, lines, tokens, rank in sizes.stacks:
        config = LlamaConfig(
            hidden_size=net.width, num_hidden_layers=net.layers, num_attention_heads=net.heads,
            num_key_value_heads=net.kv, intermediate_size=net.inner, vocab_size=net.vocabulary, use_cache=False,
        )  # fmt: skip
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = LlamaForCausalLM(config).to(device, torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names)).train()
        if net.remat:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        data = torch.randint(0, net.vocabulary, (lines, tokens), device=device)
        for compiled in (False, True) if device == "cuda" else (False,):
            run = torch.compile(model) if compiled else model
            second = _torch_seconds(run, data, sizes.rounds, device)
            method = "PEFT + torch.compile" if compiled else "PEFT + torch"
            row = {"stack": _describe(net, lines, tokens, rank), "method": method, "ms": 1e3 * second}
            rows.append(row | {"tokens/s": lines * tokens / second})
            print(rows[-1], flush=True)
        del model, run
        torch.cuda.empty_cache()
    return rows


def _torch_seconds(run: Any, data: PyTree, rounds: int, device: str) -> float:
    """The median of forward and backward, from the third call on."""
    import time

    import torch

    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run(input_ids=data, labels=data).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    """Measures and writes ``gpu_DEVICE``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; writes nothing")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", type=float, help="peak dense bfloat16 TFLOP/s of the device")
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    if jax.default_backend() != "gpu" and not options.smoke:
        parser.error(f"JAX runs on {jax.default_backend()}, not on a GPU. Use --smoke to run tiny shapes anywhere.")
    sizes = smoke_sizes() if options.smoke else quick_sizes() if options.quick else full_sizes()

    notes, torch_results = "torch was skipped.", []
    if not options.no_torch:  # first, before JAX allocates memory
        try:
            torch_results = torch_rows(sizes, anywhere=options.smoke)
            notes = "torch also stores its token embedding, and ran before JAX."
        except ImportError as error:
            notes = f"No torch comparison: no {error.name} here."
    stacks, raw_stacks = stack_rows(sizes, options.peak)
    layers, raw_layers = layer_rows(sizes, options.peak)
    stacks += torch_results
    text = "\n\n".join(
        [
            "The floor is the frozen program, forward and dx; other columns are relative to it, medians within rounds.",
            f"## Stacks of an 8B Llama's shapes\n\nForward and backward, no optimizer. {notes}\n\n{table(stacks)}",
            f"## One dense layer, gradient of A, B and x\n\n{table(layers)}",
        ]
    )
    if options.smoke:
        print(text)
        return
    kind = jax.devices()[0].device_kind.replace(" ", "_").lower()
    write(f"gpu_{kind}", "LoRA steps on a GPU", text, {"stacks": raw_stacks, "layers": raw_layers, "rows": stacks})


if __name__ == "__main__":
    main()
