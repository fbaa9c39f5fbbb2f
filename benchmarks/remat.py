"""Claim: under remat, an adapted block saves what the frozen block saves, plus T·r elements.

One transformer block, bfloat16 with float32 adapters, LoRA on every weight or only on q and v: the bytes that `jax.vjp`
saves for the backward pass beyond parameters and input, for the usual policies of `jax.checkpoint`. The frozen block is
differentiated with respect to its input, the adapted one with respect to input and adapters.

``by hand`` is LoRA written into the block by hand, where a policy sees three products instead of one.

    python benchmarks/remat.py
    python benchmarks/remat.py --gpu h100       # what that costs on a GPU (needs jax-cuda12-plugin, no GPU)
"""

from __future__ import annotations

import argparse
import collections
import math
from collections.abc import Callable
from typing import Any

import gpu_tables
import jax
import jax.numpy as jnp
from measure import Array, PyTree, table, write

import lojax

T, D, F, HEADS, RANK = 2048, 1024, 4096, 8, 16
WEIGHTS = {**dict.fromkeys("qkvo", (D, D)), "up": (D, F), "down": (F, D)}
TARGETS = {"every weight": tuple(WEIGHTS), "q and v": ("q", "v")}
POLICIES: dict[str, Any] = {
    "no remat": None,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "lojax.remat.save_products()": lojax.remat.save_products(),
}


def linear(x: Array, w: Array | tuple[Array, Array, Array]) -> Array:
    """``x @ w``; a weight with LoRA written by hand is a tuple ``(w, a, b)``."""
    if not isinstance(w, tuple):
        return x @ w
    w, a, b = w
    return x @ w + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def block(params: PyTree, x: Array) -> Any:
    """A pre-norm block of attention and MLP, x ``[T, D]``."""

    def norm(x: Array) -> Any:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)

    def heads(x: Array) -> Any:
        return x.reshape(x.shape[0], HEADS, -1)

    h = norm(x)
    q, k, v = (heads(linear(h, params[name])) for name in "qkv")
    scores = jnp.einsum("thk,shk->hts", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(scores).astype(x.dtype), v)
    x = x + linear(mixed.reshape(x.shape), params["o"])
    return x + linear(jax.nn.gelu(linear(norm(x), params["up"])), params["down"])


def saved_bytes(f: Callable[..., Any], fixed: PyTree, *variables: PyTree) -> int:
    """Bytes that `jax.vjp` of ``f(fixed, *variables)`` with respect to ``variables`` saves, without the arguments."""

    def forward(fixed: PyTree, *variables: PyTree) -> Any:
        return jax.vjp(lambda *variables: f(fixed, *variables), *variables)[1]

    leaves = jax.tree.leaves(jax.eval_shape(forward, fixed, *variables))
    arguments = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves((fixed, variables)))
    residuals = collections.Counter((x.shape, x.dtype) for x in leaves) - arguments
    return sum(math.prod(shape) * dtype.itemsize * count for (shape, dtype), count in residuals.items())


Program = tuple[Callable[..., Any], PyTree, tuple[PyTree, ...]]
"""A function ``f(fixed, *variables)`` and its arguments."""


def blocks(targets: tuple[str, ...], policy: Any) -> dict[str, Program]:
    """The frozen block and the adapted ones, with what is differentiated as variables."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in WEIGHTS.items()}
    x = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
    net = block if policy is None else jax.checkpoint(block, policy=policy)
    factors = {n: lojax.init(jax.random.key(0), jnp.zeros(WEIGHTS[n]), "", rank=RANK)[1] for n in targets}
    pairs = jax.eval_shape(lambda: {n: (f.a, f.b) for n, f in factors.items()})

    def by_hand(params: PyTree, pairs: PyTree, x: Array) -> Any:
        return net({n: (w, *pairs[n]) if n in pairs else w for n, w in params.items()}, x)

    programs: dict[str, Program] = {"frozen block": (net, params, (x,)), "by hand": (by_hand, params, (pairs, x))}
    for execution in ("factored", "fused"):
        model = lojax.wrap(net, list(targets), rank=RANK, execution=execution, strict=True)
        frozen, lora = jax.eval_shape(model.init, jax.random.key(0), params, x)
        programs[f"lojax, {execution}"] = (model.apply, frozen, (lora, x))
    return programs


def count_rows() -> list[dict[str, Any]]:
    """One row for each choice of targets and policy; MiB."""
    rows = []
    for title, targets in TARGETS.items():
        for name, policy in POLICIES.items():
            saved = {
                method: saved_bytes(f, fixed, *variables) / 2**20
                for method, (f, fixed, variables) in blocks(targets, policy).items()
            }
            rows.append({"LoRA on": title, "policy": name, **saved})
    return rows


def count_for_gpu(name: str) -> None:
    """Compiles every block with every policy for a GPU, and writes."""
    gpu, rows, text = gpu_tables.find(name), [], []
    for title, targets in TARGETS.items():
        for policy_name, policy in POLICIES.items():
            print(f"counting {title}, {policy_name}", flush=True)
            programs = {}
            for method, (f, fixed, variables) in blocks(targets, policy).items():
                programs[method] = (
                    lambda fixed, g, *v, f=f: jax.vjp(lambda *v: f(fixed, *v), *v)[1](g),
                    (fixed, variables[-1], *variables),
                )
            rows += gpu_tables.rows_of(programs, gpu, targets=title, policy=policy_name)
    for heading, column, unit, digits in (
        ("MiB moved", "bytes", 2**20, 0),
        ("MiB of temporaries", "temporaries", 2**20, 1),
        ("Roofline time, ms", "seconds", 1e-3, 3),
    ):
        for gemms in gpu_tables.GEMMS:
            lines: dict[tuple[str, str], dict[str, Any]] = {}
            for row in (row for row in rows if row["gemms"] == gemms):
                line = {"LoRA on": row["targets"], "policy": row["policy"]}
                line = lines.setdefault((row["targets"], row["policy"]), line)
                line[row["method"]] = f"{row[column] / unit:,.{digits}f}"
            text.append(f"## {heading}, {gemms}\n\n{table(list(lines.values()))}")
    head = (
        f"T={T} tokens, D={D}, F={F}, {HEADS} heads, rank {RANK}, bfloat16, adapters float32: the gradients of x and "
        f"of what trains, for a given gradient of the result. {gpu_tables.NOTE}"
    )
    title = "What a block costs under remat on a GPU"
    write(f"remat_{name}", title, "\n\n".join([head, *text]), rows, device=gpu.title, clocks=False)


def main() -> None:
    """Counts and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    gpu_tables.add_argument(parser)
    options = parser.parse_args()
    if options.gpu:
        return count_for_gpu(options.gpu)
    rows = count_rows()
    text = (
        f"T={T} tokens, D={D}, F={F}, {HEADS} heads, rank {RANK}, bfloat16, adapters float32. MiB that one block saves "
        "for its backward pass, beyond its parameters and its input. Counted on shapes; nothing runs.\n\n"
        + table(rows)
        + "\n\n`dots_saveable` saves more for the adapted block than for the frozen one: dA of `o` needs the output of "
        "the attention, and a frozen `o` does not. `save_products()` saves only the products of adapted weights."
    )
    write("remat", "What a block saves under remat", text, rows, clocks=False)


if __name__ == "__main__":
    main()
