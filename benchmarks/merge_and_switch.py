"""Claims: merging runs at the speed of memory, and switching adapters compiles nothing.

Merge: all weights of a stack at once, against copying the same bytes (a jitted negation). A merge must read and write
every weight, so the copy is the floor. Switch: one jitted forward pass and one jitted step get other adapters of the
same shapes, and the compilations that JAX reports are counted.

    python benchmarks/merge_and_switch.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from measure import alternated, cost, ratio, table, write
from nets import SCALE, Net, draw

import lojax
from lojax.adapters.adapter import is_adapter
from lojax.adapters.paths import flatten

RANK = 16


def make_model(net: Net, seed: int = 0) -> tuple[Any, Any, Any]:
    """``(model, frozen, lora)`` with every weight of the layers adapted and B not zero."""
    params = draw(net.shapes(), seed)
    axes = ("stack",) * net.scanned + ("in", "out")
    weights = lambda path, leaf: path.startswith("layers") and leaf.ndim == len(axes) and "norm" not in path
    model = lojax.wrap(net.loss, weights, rank=RANK, alpha=SCALE * RANK, axes=axes)
    frozen, lora = model.init(jax.random.key(seed), params)
    return model, frozen, jax.tree.map(lambda x: x + 0.01, lora)


def measure_merge(title: str, net: Net, rounds: int) -> tuple[dict[str, Any], Any]:
    """One row: the time of a merge relative to that of a copy."""
    model, frozen, lora = make_model(net)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree))
    adapters = {path: t for path, t in flatten(lora).items() if is_adapter(t)}
    product = jax.jit(jnp.matmul)
    programs = {
        "copy": lambda: copy(frozen),
        "merge": lambda: model.merge(frozen, lora),
        "A B alone": lambda: [product(t.a, t.b) for t in adapters.values()],
    }
    seconds = alternated(programs, rounds=rounds, warm=2)
    size = sum(x.nbytes for x in jax.tree.leaves(frozen))
    weights = flatten(frozen)
    counts = [cost(lojax.merge, {"w": weights[path]}, {"w": adapter}) for path, adapter in adapters.items()]
    row = {
        "net": title,
        "MiB of weights": size / 2**20,
        "copy GB/s": 2 * size / statistics.median(seconds["copy"]) / 1e9,
        "merge GB/s": 2 * size / statistics.median(seconds["merge"]) / 1e9,
        "of copy": 1 / ratio(seconds, "merge", "copy"),
        "A B alone, of copy": 1 / ratio(seconds, "A B alone", "copy"),
        "of copy, best rounds": min(seconds["copy"]) / min(seconds["merge"]),
        "MiB temporaries": max(count.temporaries for count in counts) / 2**20,
        "GFLOP": sum(count.flops for count in counts) / 1e9,
    }
    return row, seconds


def count_compilations(net: Net) -> list[dict[str, Any]]:
    """One row for each jitted program: compilations for the first adapter and for three others."""
    model, frozen, lora = make_model(net)
    x, labels = jnp.ones((1, 16, net.width), net.dtype), jnp.zeros((1, 16), jnp.int32)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    rows = []
    for title, program in {
        "forward": jax.jit(model.apply),
        "step": jax.jit(lambda f, t, x, y: jax.value_and_grad(lambda t: model.apply(f, t, x, y))(t)),
    }.items():
        others = [jax.tree.map(lambda leaf, i=i: leaf * (i + 2), lora) for i in range(3)]
        compiled.clear()
        jax.block_until_ready(program(frozen, lora, x, labels))
        first = len(compiled)
        compiled.clear()
        jax.block_until_ready([program(frozen, other, x, labels) for other in others])
        rows.append({"program": title, "compilations, first adapter": first, "three others": len(compiled)})
        assert first > 0, "this JAX reports compilations under another name, so nothing was counted"
    return rows


def main() -> None:
    """Measures both claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    nets = {
        f"{kind}, {'scanned' if scanned else 'unrolled'}, {jnp.dtype(dtype)}, width {width}": Net(
            kind, width=width, inner=4 * width, layers=layers, scanned=scanned, dtype=dtype
        )
        for kind, scanned, dtype, width, layers in (
            ("gpt2", False, jnp.float32, 1024, 4),
            ("gpt2", True, jnp.float32, 1024, 4),
            ("llama", False, jnp.bfloat16, 1024, 4),
            ("llama", False, jnp.bfloat16, 4096, 1),
        )
    }
    rows, data = [], {}
    for title, net in nets.items():
        row, data[title] = measure_merge(title, net, options.rounds)
        rows.append(row)
    switches = count_compilations(Net("gpt2", layers=2, width=64, heads=4, inner=128, vocabulary=64))
    text = (
        f"Rank {RANK} on every weight of the layers. Goal: a merge at 0.5 of a copy or better.\n\n{table(rows)}\n\n"
        "`A B alone` is the float32 product of the factors, without the weight. XLA writes it (4 bytes an element) and "
        "reads it again for the sum, where a copy of bfloat16 moves 4 bytes an element in all. Summing blocks of rows "
        "that fit into the cache (`lax.map`, `fori_loop`), or 16 fused outer products, was slower still.\n\n"
        f"## Switching the adapter of a jitted program\n\n{table(switches)}"
    )
    name = f"merge_and_switch_{jax.default_backend()}"
    write(
        name, "Merging at the speed of memory, switching without compiling", text, {"merge": data, "switch": switches}
    )


if __name__ == "__main__":
    main()
