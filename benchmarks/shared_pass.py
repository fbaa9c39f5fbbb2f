"""Question: should adapted weights with the same input (q, k and v; gate and up) share one pass over it?

Several products of one x, with the gradients of every A, every B and x: ``x A`` as one product a weight, or as one
product with the concatenated A's (``x [A_q | A_k | A_v]``) whose result is split. Both written by hand, beside lojax
and the frozen products. XLA's counts and a clock on this machine; only counts, ahead of time, for a TPU.

    python benchmarks/shared_pass.py                 # on this machine, float32
    python benchmarks/shared_pass.py --tpu v5e       # bfloat16; needs libtpu, no TPU
    python benchmarks/shared_pass.py --gpu h100      # bfloat16; needs jax-cuda12-plugin, no GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gpu_tables
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike
from measure import Array, PyTree, alternated, cost, ratio, table, topology, write

import lojax

SCALE, FLOOR = 2.0, "frozen (floor)"
Factors = Sequence[tuple[Any, Any]]


class Siblings(NamedTuple):
    """Weights ``[m, n_i]`` with one input x of T tokens, each with an update of rank r."""

    title: str
    tokens: int
    m: int
    n: tuple[int, ...]
    rank: int = 16


LARGE = [
    Siblings("q, k, v", 8192, 4096, (4096, 4096, 4096)),
    Siblings("q, k, v (8 of 32 heads)", 8192, 4096, (4096, 1024, 1024)),
    Siblings("gate, up", 8192, 4096, (14336, 14336)),
]
SMALL = [
    Siblings("q, k, v", 1024, 384, (384, 384, 384)),
    Siblings("q, k, v", 1024, 768, (768, 768, 768)),
    Siblings("gate, up", 1024, 768, (2048, 2048)),
]


def separate(weights: Sequence[Any], factors: Factors, x: Array) -> list[Any]:
    """One product ``x A`` for each weight."""
    return [x @ w + (SCALE * (x @ a)) @ b for w, (a, b) in zip(weights, factors, strict=True)]


def shared(weights: Sequence[Any], factors: Factors, x: Array) -> list[Any]:
    """One product with the concatenated A's, whose result is split."""
    ranks = [a.shape[1] for a, _ in factors]
    offsets = [sum(ranks[:i]) for i in range(1, len(ranks))]
    inner = jnp.split(SCALE * (x @ jnp.concatenate([a for a, _ in factors], axis=1)), offsets, axis=1)
    return [x @ w + u @ b for w, u, (_, b) in zip(weights, inner, factors, strict=True)]


def by_lojax(weights: Sequence[Any], factors: Factors, x: Array, *, execution: str) -> list[Any]:
    """``[x @ w for w in weights]`` through lojax."""
    apply = lojax.transform(lambda params, x: [x @ w for w in params], strict=True, execution=execution)
    return apply(list(weights), [lojax.Adapter(a=a, b=b, scale=SCALE, axes=("in", "out")) for a, b in factors], x)


METHODS: dict[str, Callable[..., list[Any]]] = {
    FLOOR: lambda weights, factors, x: [x @ w for w in weights],
    "separate passes": separate,
    "one shared pass": shared,
    "lojax auto": functools.partial(by_lojax, execution="auto"),
    "lojax factored": functools.partial(by_lojax, execution="factored"),
    "lojax fused": functools.partial(by_lojax, execution="fused"),
}


def gradient(name: str) -> Callable[..., Any]:
    """The gradients of every A, every B and x; of x alone for the floor."""

    def loss(factors: PyTree, x: Array, weights: PyTree) -> Any:
        return sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in METHODS[name](weights, factors, x)) / 2

    return jax.grad(loss, argnums=1 if name == FLOOR else (0, 1))


def shapes(siblings: Siblings, dtype: DTypeLike) -> tuple[Any, ...]:
    """The arguments of `gradient`."""
    shape = lambda *lengths: jax.ShapeDtypeStruct(lengths, dtype)
    factors = [(shape(siblings.m, siblings.rank), shape(siblings.rank, n)) for n in siblings.n]
    return factors, shape(siblings.tokens, siblings.m), [shape(siblings.m, n) for n in siblings.n]


def count(siblings: Siblings, dtype: DTypeLike, sharding: Sharding | None) -> list[dict[str, Any]]:
    """A row for each method."""
    rows = []
    for name in METHODS:
        print(f"counting {siblings.title}, {name}", flush=True)
        counts = cost(gradient(name), *shapes(siblings, dtype), sharding=sharding)
        rows.append({"siblings": siblings, "method": name, **dataclasses.asdict(counts)})
    return rows


def measure_times(siblings: Siblings, rounds: int) -> dict[str, list[float]]:
    """Seconds of every method in every round."""
    keys = iter(jax.random.split(jax.random.key(0), 20))
    args = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape) / 32, shapes(siblings, jnp.float32))
    programs = {name: functools.partial(jax.jit(gradient(name)), *args) for name in METHODS}
    return alternated(programs, rounds=rounds, warm=2)


def relative_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table, relative to the floor of the same siblings."""
    lines = []
    for row in rows:
        floor = next(r for r in rows if r["siblings"] == row["siblings"] and r["method"] == FLOOR)
        line = {
            "siblings": f"{row['siblings'].title}, {row['siblings'].m}",
            "method": row["method"],
            "GFLOP": row["flops"] / 1e9,
            "/ floor": row["flops"] / floor["flops"],
            "GB accessed": row["bytes"] / 1e9,
            "bytes / floor": row["bytes"] / floor["bytes"],
            "MiB temporaries": row["temporaries"] / 2**20,
            "kernels": row["kernels"],
        }
        lines.append(line | ({"time / separate": row["time / separate"]} if "time / separate" in row else {}))
    return lines


def forward_and_backward(name: str) -> Callable[..., Any]:
    """Every y, and the gradients of every A, every B and x (of x alone for the floor) for given gradients of y."""

    def step(factors: PyTree, x: Array, weights: PyTree, g: Sequence[Array]) -> Any:
        apply = METHODS[name]
        if name == FLOOR:
            ys, pull_back = jax.vjp(lambda x: apply(weights, factors, x), x)
        else:
            ys, pull_back = jax.vjp(lambda factors, x: apply(weights, factors, x), factors, x)
        return ys, pull_back(list(g))

    return step


def count_for_gpu(name: str) -> None:
    """Counts for a GPU, in bfloat16, and writes."""
    gpu, rows, text = gpu_tables.find(name), [], []
    for siblings in LARGE:
        print(f"counting {siblings.title}", flush=True)
        g = [jax.ShapeDtypeStruct((siblings.tokens, n), jnp.bfloat16) for n in siblings.n]
        args = (*shapes(siblings, jnp.bfloat16), g)
        counts = gpu_tables.rows_of({n: (forward_and_backward(n), args) for n in METHODS}, gpu, siblings=siblings)
        rows += counts
        text.append(f"## {siblings.title}, {siblings.m} to {siblings.n}\n\n{gpu_tables.counts_table(counts, FLOOR)}")
    head = f"{LARGE[0].tokens} tokens, rank {LARGE[0].rank}, bfloat16; every y and every gradient. {gpu_tables.NOTE}"
    title = "One pass over an activation for all weights that read it, on a GPU"
    write(f"shared_pass_{name}", title, "\n\n".join([head, *text]), rows, device=gpu.title, clocks=False)


def main() -> None:
    """Counts, measures times unless compiling for a TPU, and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tpu", choices=["v5e", "v6e"], help="compile ahead of time for this chip instead")
    parser.add_argument("--rounds", type=int, default=25)
    gpu_tables.add_argument(parser)
    options = parser.parse_args()
    if options.gpu:
        return count_for_gpu(options.gpu)
    device, sharding = topology(f"{options.tpu}:2x2") if options.tpu else (None, None)
    dtype, cases = (jnp.bfloat16, LARGE) if options.tpu else (jnp.float32, SMALL)
    rows = []
    for siblings in cases:
        counts = count(siblings, dtype, sharding)
        if not options.tpu:
            seconds = measure_times(siblings, options.rounds)
            counts = [row | {"time / separate": ratio(seconds, row["method"], "separate passes")} for row in counts]
        rows += counts
    name = f"shared_pass_{options.tpu or 'cpu'}"
    head = f"{cases[0].tokens} tokens, rank {cases[0].rank}, {jnp.dtype(dtype).name}."
    title = "One pass over an activation for all weights that read it"
    write(name, title, f"{head}\n\n{table(relative_rows(rows))}", rows, device=device, clocks=not options.tpu)


if __name__ == "__main__":
    main()
