"""Claim: a LoRA step of a whole net costs the frozen net with dx, plus the low-rank products, and little memory.

GPT-2-like and Llama-like nets of four layers, unrolled and scanned, LoRA on every weight of the layers: lojax,
LoRA written by hand into the net, literal W0 + BA, full fine-tuning, and the floor (the frozen net, forward
and dx). FLOPs, bytes and temporaries are XLA's; the bodies of a scan count once, so there FLOPs compare only
with each other. Libraries that adapt modules and not functions are compared in minilm_step.py.

    python benchmarks/net_cost.py [--rounds 9] [--no-time]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from measure import alternated, bars, cost, ratio, table, write
from nets import SCALE, Net, drawn, written

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


def programs(net: Net, x: Any, labels: Any, rank: int = RANK) -> dict[str, Program]:
    """value_and_grad of every way, with the shapes of its arguments; what trains comes first."""
    params = net.shapes()
    model = lojax.wrap(net.loss, targets(net), rank=rank, alpha=SCALE * rank, strict=True)
    frozen, lora = jax.eval_shape(model.init, jax.random.key(0), params, x, labels)
    by_hand = functools.partial(written, formed=False), functools.partial(written, formed=True)
    losses: dict[str, tuple[Callable[..., Any], Any, Any]] = {
        FLOOR: (lambda x, params, labels: net.loss(params, x, labels), x, (params, labels)),
        "lojax": (lambda t, frozen, x, labels: model.apply(frozen, t, x, labels), lora, (frozen, x, labels)),
        "by hand": (lambda t, f, x, labels: net.loss(by_hand[0](f, t), x, labels), lora, (frozen, x, labels)),
        "literal W0+BA": (lambda t, f, x, labels: net.loss(by_hand[1](f, t), x, labels), lora, (frozen, x, labels)),
        "merge, then apply": (
            lambda t, f, x, labels: net.loss(lojax.merge(f, t), x, labels), lora, (frozen, x, labels),
        ),
        "full fine-tuning": (net.loss, params, (x, labels)),
    }  # fmt: skip
    return {name: (jax.value_and_grad(loss), (trained, *rest)) for name, (loss, trained, rest) in losses.items()}


def products(net: Net, x: Any, rank: int = RANK) -> tuple[int, int]:
    """FLOPs of ``(the frozen products forward and dx, the low-rank products forward and backward)``, by hand."""
    tokens = x.shape[0] * x.shape[1]
    one = dataclasses.replace(net, layers=1, scanned=False).shapes()
    weights = [w.shape for w in one["layers"]["layer_0"].values() if len(w.shape) == 2]
    frozen = net.layers * sum(m * n for m, n in weights) + net.width * net.vocabulary
    return 4 * tokens * frozen, 6 * tokens * rank * net.layers * sum(m + n for m, n in weights)


def measured(title: str, net: Net, rounds: int) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """One row for each way, the claims that can be judged, and the raw numbers."""
    x, labels = inputs(net)
    found = programs(net, x, labels)
    counts = {name: cost(f, *args) for name, (f, args) in found.items()}
    seconds: dict[str, list[float]] = {}
    if rounds:
        ready = {name: functools.partial(jax.jit(f), *drawn(args)) for name, (f, args) in found.items()}
        seconds = alternated(ready, rounds=rounds)
    rows = []
    for name, count in counts.items():
        row: dict[str, Any] = {"net": title, "way": name, "GFLOP": count.flops / 1e9}
        row |= {"/ floor": count.flops / counts[FLOOR].flops, "MiB accessed": count.bytes / 2**20}
        row |= {"MiB temporaries": count.temporaries / 2**20, "MiB gradients": count.outputs / 2**20}
        if rounds:
            row |= {"ms": 1e3 * statistics.median(seconds[name]), "time / floor": ratio(seconds, name, FLOOR)}
        rows.append(row)
    lines = []
    if not net.scanned:
        _, low_rank = products(net, x)
        bound = counts[FLOOR].flops + low_rank
        lines.append(f"- {title}: FLOPs over the floor and the low-rank products {counts['lojax'].flops / bound:.4f}.")
    return rows, lines, {"counts": {name: dataclasses.asdict(c) for name, c in counts.items()}, "seconds": seconds}


def main() -> None:
    """Measures every net."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-time", action="store_true")
    options = parser.parse_args()
    rounds = 0 if options.no_time else options.rounds
    rows, lines, data = [], [], {}
    for title, net in NETS.items():
        more, judged, data[title] = measured(title, net, rounds)
        rows += more
        lines += judged
    sizes = f"D={GPT2.width}, 4 layers, 2 rows of 256 tokens, rank {RANK} on every weight of the layers, float32."
    claims = "## The claim (at most 1.02)\n\n" + "\n".join(lines)
    name = f"net_cost_{jax.default_backend()}"
    write(name, "What a LoRA step of a whole net costs", "\n\n".join([sizes, claims, table(rows)]), data)
    column = "time / floor" if rounds else "/ floor"
    panels = {title: {row["way"]: row[column] for row in rows if row["net"] == title} for title in NETS}
    bars(name, {title: panel for title, panel in panels.items() if "remat" not in title}, label=column)


if __name__ == "__main__":
    main()
