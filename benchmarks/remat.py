"""Claim: under remat, an adapted block saves what the frozen block saves, plus T·r elements.

One transformer block, bfloat16 with float32 adapters, LoRA on every weight or only on q and v: the bytes that `jax.vjp`
saves for the backward pass beyond parameters and input, for the usual policies of `jax.checkpoint`. The frozen block is
differentiated with respect to its input, the adapted one with respect to input and adapters.

``by hand`` is LoRA written into the block by hand, where a policy sees three products instead of one.

    python benchmarks/remat.py
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

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


def count_rows() -> list[dict[str, Any]]:
    """One row for each choice of targets and policy; MiB."""
    rows = []
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in WEIGHTS.items()}
    x = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
    for title, targets in TARGETS.items():
        for name, policy in POLICIES.items():
            net = block if policy is None else jax.checkpoint(block, policy=policy)
            row: dict[str, Any] = {"LoRA on": title, "policy": name}
            row["frozen block"] = saved_bytes(net, params, x) / 2**20
            factors = {n: lojax.init(jax.random.key(0), jnp.zeros(WEIGHTS[n]), "", rank=RANK)[1] for n in targets}
            pairs = jax.eval_shape(lambda factors=factors: {n: (f.a, f.b) for n, f in factors.items()})

            def by_hand(params: PyTree, pairs: PyTree, x: Array, net: Any = net) -> Any:
                return net({n: (w, *pairs[n]) if n in pairs else w for n, w in params.items()}, x)

            row["by hand"] = saved_bytes(by_hand, params, pairs, x) / 2**20
            for execution in ("factored", "fused"):
                model = lojax.wrap(net, list(targets), rank=RANK, execution=execution, strict=True)
                frozen, lora = jax.eval_shape(model.init, jax.random.key(0), params, x)
                row[f"lojax, {execution}"] = saved_bytes(model.apply, frozen, lora, x) / 2**20
            rows.append(row)
    return rows


def main() -> None:
    """Counts and writes."""
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
