"""Claim: a LoRA step of a whole net costs the frozen net with dx, plus the low-rank products, and little memory.

GPT-2-like and Llama-like nets of four layers, unrolled and scanned, with LoRA on every weight of the layers: each
execution of lojax, LoRA written into the net by hand, literal W0 + BA, full fine-tuning, and the floor (the frozen net,
forward and dx). FLOPs, bytes and temporaries are XLA's; it counts the body of a scan once, so compare scanned nets only
with each other. Libraries that adapt modules rather than functions are compared in minilm_step.py.

    python benchmarks/net_cost.py [--rounds 9] [--no-time]
    python benchmarks/net_cost.py --tpu v5e            # compiled ahead of time for a TPU (needs libtpu, no TPU)
    python benchmarks/net_cost.py --gpu h100           # for a GPU (needs jax-cuda12-plugin, no GPU)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import gpu_tables
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from layer_methods import EXECUTIONS
from measure import Array, alternated, bars, cost, ratio, table, topology, write
from nets import SCALE, Net, draw, insert_by_hand

import lojax

RANK = 16
FLOOR = "frozen (floor)"
GPT2 = Net("gpt2", heads=8, inner=2048)
LLAMA = Net("llama", heads=8, kv_heads=2, inner=1408)
NETS = {
    f"{net.kind}, {'scanned' if scanned else 'unrolled'}{', remat' if remat else ''}": dataclasses.replace(
        net, scanned=scanned, remat=remat
    )
    for net in (GPT2, LLAMA)
    for scanned, remat in ((False, False), (True, False), (True, True))
}
FOR_TPU = ("gpt2, unrolled", "llama, scanned, remat")  # that compiler is slow
BLOCKS = Net("llama", 8, 4096, 32, 14336, kv_heads=8, dtype=jnp.bfloat16)
"""Blocks of the size of an 8B model, all seven maps adapted."""
FOR_GPU = {
    "scanned, remat": dataclasses.replace(BLOCKS, scanned=True, remat=True),
    "scanned": dataclasses.replace(BLOCKS, scanned=True),
    "two, unrolled": dataclasses.replace(BLOCKS, layers=2),
}
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def targets(net: Net) -> list[str]:
    """Every weight of the layers of this net."""
    names = ("qkv", "out", "up", "down") if net.kind == "gpt2" else ("q", "k", "v", "o", "gate", "up", "down")
    return [f"layers/**/{name}" for name in names]


def inputs(net: Net, rows: int = 2, tokens: int = 256) -> tuple[Any, Any]:
    """The shapes of embedded tokens and labels."""
    return (
        jax.ShapeDtypeStruct((rows, tokens, net.width), net.dtype),
        jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
    )


def programs(net: Net, x: Array, labels: Array, rank: int = RANK) -> dict[str, Program]:
    """value_and_grad of every method, with the shapes of its arguments, the trained ones first."""
    params = net.shapes()
    models = {
        f"lojax {execution}": lojax.wrap(
            net.loss,
            targets(net),
            rank=rank,
            alpha=SCALE * rank,
            strict=execution != "materialize",
            execution=execution,
        )
        for execution in EXECUTIONS
    }
    frozen, lora = jax.eval_shape(models["lojax auto"].init, jax.random.key(0), params, x, labels)
    losses: dict[str, tuple[Callable[..., Any], Any, Any]] = {
        FLOOR: (lambda x, params, labels: net.loss(params, x, labels), x, (params, labels)),
        **{
            name: (lambda t, f, x, labels, apply=model.apply: apply(f, t, x, labels), lora, (frozen, x, labels))
            for name, model in models.items()
        },
        "by hand": (lambda t, f, x, labels: net.loss(insert_by_hand(f, t), x, labels), lora, (frozen, x, labels)),
        "literal W0+BA": (
            lambda t, f, x, labels: net.loss(insert_by_hand(f, t, materialized=True), x, labels),
            lora,
            (frozen, x, labels),
        ),
        "merge, then apply": (
            lambda t, f, x, labels: net.loss(lojax.merge(f, t), x, labels), lora, (frozen, x, labels),
        ),
        "full fine-tuning": (net.loss, params, (x, labels)),
    }  # fmt: skip
    return {name: (jax.value_and_grad(loss), (trained, *rest)) for name, (loss, trained, rest) in losses.items()}


def products(net: Net, x: Array, rank: int = RANK) -> tuple[int, int]:
    """FLOPs of ``(the frozen products forward and dx, the low-rank products forward and backward)``, by hand."""
    tokens = x.shape[0] * x.shape[1]
    one = dataclasses.replace(net, layers=1, scanned=False).shapes()
    weights = [w.shape for w in one["layers"]["layer_0"].values() if len(w.shape) == 2]
    frozen = net.layers * sum(m * n for m, n in weights) + net.width * net.vocabulary
    return 4 * tokens * frozen, 6 * tokens * rank * net.layers * sum(m + n for m, n in weights)


def measure_net(
    title: str, net: Net, rounds: int, sharding: Sharding | None = None
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """One row for each method, the claims that apply, and the raw numbers."""
    x, labels = inputs(net)
    steps = programs(net, x, labels)
    counts = {name: cost(f, *args, sharding=sharding) for name, (f, args) in steps.items()}
    seconds: dict[str, list[float]] = {}
    if rounds:
        ready = {name: functools.partial(jax.jit(f), *draw(args)) for name, (f, args) in steps.items()}
        seconds = alternated(ready, rounds=rounds)
    rows = []
    for name, count in counts.items():
        row: dict[str, Any] = {"net": title, "method": name, "GFLOP": count.flops / 1e9}
        row |= {"/ floor": count.flops / counts[FLOOR].flops, "MiB accessed": count.bytes / 2**20}
        row |= {"MiB temporaries": count.temporaries / 2**20, "MiB gradients": count.outputs / 2**20}
        if rounds:
            row |= {"ms": 1e3 * statistics.median(seconds[name]), "time / floor": ratio(seconds, name, FLOOR)}
        rows.append(row)
    lines = []
    if not net.scanned:
        _, low_rank = products(net, x)
        bound = counts[FLOOR].flops + low_rank
        ratios = (f"{name} {counts[name].flops / bound:.4f}" for name in counts if name.startswith("lojax"))
        lines.append(f"- {title}: FLOPs over the floor plus the low-rank products: {', '.join(ratios)}.")
    return rows, lines, {"counts": {name: dataclasses.asdict(c) for name, c in counts.items()}, "seconds": seconds}


def count_for_gpu(name: str) -> None:
    """Counts Llama blocks for a GPU, and writes."""
    gpu, rows, text, panels = gpu_tables.find(name), [], [], {}
    for title, net in FOR_GPU.items():
        print(f"counting {title}", flush=True)
        steps = programs(net, *inputs(net, rows=1, tokens=4096))
        of_net = gpu_tables.rows_of(steps, gpu, scope="attention", net=title)
        rows += of_net
        text.append(f"## {title}\n\n{gpu_tables.counts_table(of_net, FLOOR)}\n\n{outside_attention(of_net)}")
        for column, unit in (("bytes outside", "bytes outside of attention"), ("seconds", "roofline time")):
            panels[f"{unit}\n{title}"] = gpu_tables.over_floor(of_net, FLOOR, column, "Triton")
    head = (
        f"Eight Llama blocks of an 8B model (width {BLOCKS.width}, inner {BLOCKS.inner}, {BLOCKS.heads} heads, "
        f"{BLOCKS.kv_heads} of keys and values), a small head, 1 × 4096 tokens, bfloat16, rank {RANK} on all seven "
        "maps, value_and_grad. " + gpu_tables.NOTE
    )
    title = "What a LoRA step of Llama blocks costs on a GPU"
    write(f"net_cost_{name}", title, "\n\n".join([head, *text]), {"counts": rows}, device=gpu.title, clocks=False)
    bars(f"net_cost_{name}", panels, label="over the frozen net with dx (the red line), products in Triton")


def outside_attention(rows: list[dict[str, Any]]) -> str:
    """Bytes outside of the kernels of attention, over those of LoRA by hand; adds them to the rows."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        row["bytes outside"] = row["bytes"] - row["bytes in attention"]
    for row in rows:
        (by_hand,) = [r for r in rows if (r["method"], r["gemms"]) == ("by hand", row["gemms"])]
        line = lines.setdefault(row["method"], {"method": row["method"]})
        for column in ("bytes", "bytes outside"):
            line[f"{row['gemms']}: {column}, MiB"] = round(row[column] / 2**20)
            line[f"{row['gemms']}: {column} / by hand"] = f"{row[column] / by_hand[column]:.3f}"
    note = (
        "Attention written in JAX moves its scores through memory; a fused kernel (cuDNN) would not. So, outside of it:"
    )
    return f"{note}\n\n{table(list(lines.values()))}"


def main() -> None:
    """Measures every net."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--tpu", choices=["v5e", "v6e"], help="compile ahead of time for this chip instead; bfloat16")
    gpu_tables.add_argument(parser)
    options = parser.parse_args()
    if options.gpu:
        return count_for_gpu(options.gpu)
    device, sharding = topology(f"{options.tpu}:2x2") if options.tpu else (None, None)
    rounds = 0 if options.no_time or options.tpu else options.rounds
    nets, dtype = NETS, jnp.dtype(jnp.float32)
    if options.tpu:
        dtype = jnp.dtype(jnp.bfloat16)
        nets = {title: dataclasses.replace(NETS[title], dtype=dtype) for title in FOR_TPU}
    rows, lines, data = [], [], {}
    for title, net in nets.items():
        print(f"counting {title}", flush=True)
        net_rows, claims_of_net, data[title] = measure_net(title, net, rounds, sharding)
        rows += net_rows
        lines += claims_of_net
    sizes = f"D={GPT2.width}, 4 layers, 2 rows of 256 tokens, rank {RANK} on every weight of the layers, {dtype}."
    claims = "## The claim (at most 1.02)\n\n" + "\n".join(lines)
    name, title = f"net_cost_{options.tpu or jax.default_backend()}", "What a LoRA step of a whole net costs"
    write(name, title, "\n\n".join([sizes, claims, table(rows)]), data, device=device, clocks=bool(rounds))
    column = "time / floor" if rounds else "/ floor"
    panels = {title: {row["method"]: row[column] for row in rows if row["net"] == title} for title in nets}
    panels = {title: panel for title, panel in panels.items() if options.tpu or "remat" not in title}
    bars(name, panels, label=f"{'time' if rounds else 'FLOPs'} over the frozen net with dx (the red line)")


if __name__ == "__main__":
    main()
