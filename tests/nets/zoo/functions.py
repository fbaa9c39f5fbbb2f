"""Plain functions of a parameter tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.nets.zoo.case import Case, Example, normal, tokens


def example(f: Any, params: Any, *args: Any) -> Example:
    return Example(f, params, lambda p: f(p, *args), args)


def mlp() -> Example:
    def f(params: Any, x: Any) -> Any:
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x

    return example(f, [{"w": normal(i, 64, 64, scale=0.1), "b": normal(i, 64)} for i in range(3)], normal(9, 32, 64))


def attention(params: Any, x: Any) -> Any:
    """Heads in the kernels: ``[D, H, K]`` in, ``[H, K, D]`` out."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2)
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, params["o"])


def heads() -> Example:
    params = {name: normal(i, 16, 2, 8, scale=0.3) for i, name in enumerate("qkv")}
    return example(attention, params | {"o": normal(3, 2, 8, 16, scale=0.3)}, normal(4, 2, 5, 16))


def fused_qkv() -> Example:
    def f(params: Any, x: Any) -> Any:
        q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
        return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v @ params["out"]

    params = {"qkv": normal(0, 16, 48, scale=0.3), "out": normal(1, 16, 16, scale=0.3)}
    return example(f, params, normal(2, 2, 5, 16))


def scanned() -> Example:
    def f(params: Any, x: Any) -> Any:
        @jax.checkpoint
        def block(x: Any, layer: Any) -> Any:
            x = x + attention(layer, x)
            return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

        return jax.lax.scan(block, x, params)[0]

    params = {name: normal(i, 3, 16, 2, 8, scale=0.2) for i, name in enumerate("qkv")}
    params |= {"o": normal(3, 3, 2, 8, 16, scale=0.2)}
    params |= {"up": normal(4, 3, 16, 32, scale=0.2), "down": normal(5, 3, 32, 16, scale=0.2)}
    return example(f, params, normal(6, 2, 5, 16))


def picked_layers() -> Example:
    """A stack whose layers a loop picks by a traced index."""

    def f(params: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"][i]), x)

    return example(f, {"w": normal(0, 3, 16, 16, scale=0.3)}, normal(1, 4, 16))


def tied() -> Example:
    def f(params: Any, ids: Any) -> Any:
        x = jnp.take(params["embedding"], ids, axis=0)
        return jax.nn.relu(x @ params["w"]) @ params["embedding"].T

    return example(f, {"embedding": normal(0, 24, 16), "w": normal(1, 16, 16, scale=0.3)}, tokens(2, 24, 2, 5))


def experts() -> Example:
    """A mixture of experts, every token to every expert."""

    def f(params: Any, x: Any) -> Any:
        gate = jax.nn.softmax(x @ params["router"])
        hidden = jax.nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
        return jnp.einsum("te,etf,efd->td", gate, hidden, params["down"])

    params = {
        "router": normal(0, 16, 4),
        "up": normal(1, 4, 16, 32, scale=0.3),
        "down": normal(2, 4, 32, 16, scale=0.3),
    }
    return example(f, params, normal(3, 6, 16))


def ragged_experts() -> Example:
    """A mixture of experts by `jax.lax.ragged_dot`, tokens sorted by expert."""

    def f(params: Any, x: Any, sizes: Any) -> Any:
        return jax.lax.ragged_dot(jax.nn.relu(jax.lax.ragged_dot(x, params["up"], sizes)), params["down"], sizes)

    params = {"up": normal(0, 3, 16, 32, scale=0.3), "down": normal(1, 3, 32, 16, scale=0.3)}
    return example(f, params, normal(2, 10, 16), jnp.asarray([4, 1, 5], jnp.int32))


def weight_norm() -> Example:
    """A weight that is normalised before it is used: its norm is no function of A and B alone."""

    def f(params: Any, x: Any) -> Any:
        w = params["normed"]
        return jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0))) @ params["plain"]

    return example(f, {"normed": normal(0, 16, 16), "plain": normal(1, 16, 8)}, normal(2, 4, 16))


NORMED = {"normed": "an elementwise product of two adapted weights"}
CASES = (
    Case("mlp", "functions", mlp, "**/w", 3, flops=0.75),
    Case("attention_heads", "functions", heads, "*", 4),
    Case("fused_qkv", "functions", fused_qkv, "*", 2),
    Case("scan_remat_transformer", "functions", scanned, "*", 6),
    Case("layers_by_traced_index", "functions", picked_layers, "w", 1),
    Case("tied_embedding", "functions", tied, "*", 2),
    Case("moe_einsum", "functions", experts, "*", 3),
    Case("moe_ragged_dot", "functions", ragged_experts, "*", 2, rows=False),
    Case("weight_norm", "functions", weight_norm, "*", 2, materialized=NORMED),
)
