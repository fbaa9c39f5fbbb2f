"""Claim: an adapted layer costs the frozen layer plus its low-rank products, and no weight-sized memory.

One dense layer, every execution of lojax and every library in the same run, with the same scale, factors and dtype:
FLOPs, bytes and temporaries of value_and_grad as XLA counts them, and the step time on this device.

    python benchmarks/layer_cost.py                    # this device, with clocks
    python benchmarks/layer_cost.py --no-time          # counts only
    python benchmarks/layer_cost.py --tpu v5e          # compiled ahead of time for a TPU (needs libtpu, no TPU)
    python benchmarks/layer_cost.py --gpu h100         # for a GPU (needs jax-cuda12-plugin, no GPU)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gpu_tables
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from layer_methods import ON_DEVICES, OURS, PEERS, Method, available
from measure import Array, PyTree, alternated, bars, cost, ratio, table, topology, write

SCALE = 2.0
FLOOR = "frozen (floor)"
MIB = 2**20
COLUMNS = (("GFLOP", "flops", 1e9), ("MiB accessed", "bytes", MIB), ("MiB of temporaries", "temporaries", MIB))
"""The columns of the comparison: title, field of `measure.Cost`, unit."""


class Layer(NamedTuple):
    """T tokens, m in, n out, rank r."""

    tokens: int
    m: int
    n: int
    rank: int

    def __str__(self) -> str:
        return f"T={self.tokens} m={self.m} n={self.n} r={self.rank}"


COUNTED = [  # compiled only
    Layer(16, 4096, 4096, 16),
    Layer(512, 1024, 1024, 8),
    Layer(2048, 1024, 4096, 16),
    Layer(2048, 4096, 1024, 16),
    Layer(4096, 2048, 2048, 16),
    Layer(4096, 2048, 2048, 128),
    Layer(8192, 4096, 4096, 16),
]
FOR_GPU = [
    Layer(8192, 4096, 4096, 16),
    Layer(8192, 4096, 4096, 64),
    Layer(8192, 4096, 14336, 16),
    Layer(8192, 14336, 4096, 16),
    Layer(2048, 4096, 4096, 16),
    Layer(2048, 4096, 4096, 64),
    Layer(16, 4096, 4096, 16),
]
FOR_TPU = [COUNTED[0], COUNTED[2], COUNTED[4], COUNTED[6]]  # that compiler is slow
TIMED = [
    Layer(512, 1024, 1024, 8),
    Layer(1024, 768, 3072, 16),
    Layer(1024, 3072, 768, 16),
    Layer(2048, 1024, 1024, 16),
    Layer(2048, 1024, 1024, 64),
    Layer(1024, 2048, 2048, 16),
]


def gradient(method: Method, wrt: str) -> Callable[..., Any]:
    """value_and_grad of ``|y|² / 2`` with respect to the trained arrays, and to x where ``wrt`` says so."""

    def loss(trained: PyTree, x: Array, frozen: PyTree) -> Any:
        return jnp.sum(method.apply(trained, frozen, x).astype(jnp.float32) ** 2) / 2

    return jax.value_and_grad(loss, argnums=(0, 1) if wrt == "A, B, x" else 0)


def forward_and_backward(method: Method) -> Callable[..., Any]:
    """``y`` and the gradients of the trained arrays and x for a given gradient of y."""

    def step(trained: PyTree, x: Array, frozen: PyTree, g: Array) -> Any:
        y, pull_back = jax.vjp(lambda trained, x: method.apply(trained, frozen, x), trained, x)
        return y, pull_back(g)

    return step


def arguments(method: Method, layer: Layer, dtype: DTypeLike) -> tuple[Any, Any, Any]:
    """``(trained, x, frozen)`` as shapes."""
    shapes = (layer.m, layer.n), (layer.m, layer.rank), (layer.rank, layer.n), (layer.tokens, layer.m)
    w, a, b, x = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    trained, frozen = jax.eval_shape(functools.partial(method.build, scale=SCALE), w, a, b)
    return trained, x, frozen


def randomize(tree: PyTree) -> Any:
    """Random numbers of these shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0]), x.dtype), tree)


def count(
    makers: Mapping[str, Callable[..., Method]], layers: Sequence[Layer], dtype: DTypeLike, sharding: Sharding | None
) -> list[dict[str, Any]]:
    """What XLA counts, one row for each layer, gradient and method."""
    rows = []
    for layer in layers:
        print(f"counting {layer}", flush=True)
        for wrt in ("A, B, x", "A, B"):
            for name, make in makers.items():
                method = make(layer.m, layer.n, layer.rank, SCALE)
                counts = cost(gradient(method, wrt), *arguments(method, layer, dtype), sharding=sharding)
                rows.append({"layer": layer, "wrt": wrt, "method": name, **dataclasses.asdict(counts)})
    return rows


def count_for_gpu(makers: Mapping[str, Callable[..., Method]], name: str) -> None:
    """Counts for a GPU, in bfloat16, and writes."""
    gpu, rows, text, panels = gpu_tables.find(name), [], [], {}
    if "keras" in makers:  # which takes the dtype of its computation from nowhere else
        import keras

        keras.config.set_dtype_policy("bfloat16")
    for layer in FOR_GPU:
        print(f"counting {layer}", flush=True)
        programs = {}
        for method_name, make in {**makers, **ON_DEVICES}.items():
            method = make(layer.m, layer.n, layer.rank, SCALE)
            g = jax.ShapeDtypeStruct((layer.tokens, layer.n), jnp.bfloat16)
            programs[method_name] = forward_and_backward(method), (*arguments(method, layer, jnp.bfloat16), g)
        of_layer = gpu_tables.rows_of(programs, gpu, layer=layer)
        rows += of_layer
        text.append(f"## {layer}\n\n{gpu_tables.counts_table(of_layer, FLOOR)}")
        if layer in FOR_GPU[:3]:
            for column, unit in (("bytes", "bytes"), ("seconds", "roofline time")):
                panels[f"{unit}\n{layer}"] = gpu_tables.over_floor(of_layer, FLOOR, column, "Triton")
    head = "One dense layer, bfloat16: y and the gradients of A, B and x, for a given gradient of y. " + gpu_tables.NOTE
    title = "What one adapted dense layer costs on a GPU"
    write(f"layer_cost_{name}", title, "\n\n".join([head, *text]), {"counts": rows}, device=gpu.title, clocks=False)
    bars(f"layer_cost_{name}", panels, label="over the frozen layer (the red line), products in Triton")


def counts_table(rows: Sequence[Mapping[str, Any]], wrt: str) -> str:
    """The counts of one gradient as a table, with FLOPs and bytes relative to the floor."""
    lines = []
    for row in (row for row in rows if row["wrt"] == wrt):
        (floor,) = [r for r in rows if (r["layer"], r["wrt"], r["method"]) == (row["layer"], wrt, FLOOR)]
        lines.append(
            {
                "layer": str(row["layer"]),
                "method": row["method"],
                "GFLOP": row["flops"] / 1e9,
                "/ floor": row["flops"] / floor["flops"],
                "MiB accessed": row["bytes"] / MIB,
                "bytes / floor": row["bytes"] / floor["bytes"],
                "MiB temporaries": row["temporaries"] / MIB,
                "kernels": row["kernels"],
            }
        )
    return table(lines)


def judge_claims(rows: Sequence[Mapping[str, Any]], ours: str) -> str:
    """The claims for one execution of lojax, each with the rows that violate it."""

    def compare_with_peers(column: str, slack: float = 1.0) -> str:
        excess: dict[str, list[float]] = {}
        for mine in (row for row in rows if row["method"] == ours):
            for other in (row for row in rows if row["method"] in (*PEERS, "LoRA by hand", "literal W0+BA")):
                same = (other["layer"], other["wrt"]) == (mine["layer"], mine["wrt"])
                if same and mine[column] > slack * other[column]:
                    ratio_to_peer = mine[column] / other[column] if other[column] else float("inf")
                    excess.setdefault(other["method"], []).append(ratio_to_peer)
        violations = (
            f"above {method} on {len(ratios)} of {count} rows, by up to {max(ratios):.3f}"
            for method, ratios in excess.items()
        )
        return "; ".join(violations) or "yes, on every row"

    count = sum(row["method"] == ours for row in rows)
    worst = max(
        row["flops"] / (4 * t * m * n + 6 * t * r * (m + n))
        for row in rows
        if (row["method"], row["wrt"]) == (ours, "A, B, x")
        for t, m, n, r in [row["layer"]]
    )
    return "\n".join(
        [
            f"- FLOPs over 4Tmn + 6Tr(m+n), the worst row: {worst:.4f} (the bound is 1.02).",
            f"- FLOPs at most those of every peer (+0.1 %): {compare_with_peers('flops', 1.001)}.",
            f"- Temporaries at most those of every peer: {compare_with_peers('temporaries')}.",
            f"- Bytes accessed at most those of every peer: {compare_with_peers('bytes')}.",
        ]
    )


def comparison_table(rows: Sequence[Mapping[str, Any]], wrt: str, column: str, unit: float) -> str:
    """One count as a table: a row for each layer, a column for each method."""
    lines: dict[Layer, dict[str, Any]] = {}
    for row in (row for row in rows if row["wrt"] == wrt):
        lines.setdefault(row["layer"], {"layer": str(row["layer"])})[row["method"]] = row[column] / unit
    return table(list(lines.values()))


def measure_times(makers: Mapping[str, Callable[..., Method]], rounds: int) -> tuple[str, Any]:
    """Step times of ``A, B, x`` relative to the floor, as a table, and the raw seconds."""
    rows, raw = [], []
    for layer in TIMED:
        programs = {}
        for name, make in makers.items():
            method = make(layer.m, layer.n, layer.rank, SCALE)
            step = jax.jit(gradient(method, "A, B, x"))
            programs[name] = functools.partial(step, *randomize(arguments(method, layer, jnp.float32)))
        seconds = alternated(programs, rounds=rounds, warm=2)
        raw.append({"layer": layer, "seconds": seconds})
        floor = f"{1e3 * statistics.median(seconds[FLOOR]):.1f} ms"
        rows.append({"layer": str(layer), "floor": floor, **{name: ratio(seconds, name, FLOOR) for name in programs}})
    lines = []
    for other in [name for name in makers if name not in (FLOOR, *OURS)]:
        means = [
            f"{statistics.geometric_mean(ratio(e['seconds'], name, other) for e in raw):.3f} {name}" for name in OURS
        ]
        lines.append(f"- over {other}, geometric mean over the layers: {', '.join(means)}")
    return table(rows) + "\n\n" + "\n".join(lines), raw


def main() -> None:
    """Counts, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tpu", choices=["v5e", "v6e"], help="compile ahead of time for this chip instead")
    gpu_tables.add_argument(parser)
    parser.add_argument("--no-time", action="store_true", help="no clocks")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of alternated runs")
    options = parser.parse_args()
    makers, missing = available()
    if options.gpu:
        print("\n".join(missing))
        return count_for_gpu(makers, options.gpu)
    device, sharding = topology(f"{options.tpu}:2x2") if options.tpu else (None, None)
    dtype = jnp.bfloat16 if options.tpu else jnp.float32

    layers = FOR_TPU if options.tpu else COUNTED
    rows = count(makers, layers, dtype, sharding)
    name = f"layer_cost_{options.tpu or jax.default_backend()}"
    text = [
        f"One dense layer, {jnp.dtype(dtype)}, scale {SCALE}; value_and_grad of |y|²/2. The floor is the frozen layer.",
        *missing,
        "## The claims\n\n" + "\n\n".join(f"{name}:\n\n{judge_claims(rows, name)}" for name in OURS[:3]),
        "## Gradient of A, B and x (a layer inside a net)",
        *(f"{title}\n\n{comparison_table(rows, 'A, B, x', column, unit)}" for title, column, unit in COLUMNS),
        "## All counts, gradient of A, B and x\n\n" + counts_table(rows, "A, B, x"),
        "## All counts, gradient of A and B alone (the first layer of a net)\n\n" + counts_table(rows, "A, B"),
    ]
    data: dict[str, Any] = {"counts": rows}
    if not (options.tpu or options.no_time):
        times, data["seconds"] = measure_times(makers, options.rounds)
        text.insert(-2, "## Step time over the floor's (gradient of A, B and x)\n\n" + times)
    write(name, "What one adapted dense layer costs", "\n\n".join(text), data, device=device, clocks="seconds" in data)
    plotted = [layer for layer in layers if layer.rank == 16 and layer.tokens >= 2048][-2:]
    panels = {}
    for column, unit in (("flops", "FLOPs"), ("bytes", "bytes accessed")):
        for layer in plotted:
            values = {row["method"]: row[column] for row in rows if (row["layer"], row["wrt"]) == (layer, "A, B, x")}
            panels[f"{unit}\n{layer}"] = {method: value / values[FLOOR] for method, value in values.items()}
    bars(name, panels, label="over the frozen layer with dx (the red line)")


if __name__ == "__main__":
    main()
