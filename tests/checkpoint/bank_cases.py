"""Banks to save: every kind of leaf that a bank can hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from helpers import trained

import lojax


def plain(seed: int = 0) -> tuple[Any, lojax.Bank]:
    """``(frozen, bank)``: three adapters of other ranks, scales, targets, with names that no file system likes."""
    rng = np.random.default_rng(seed)
    params = {
        "head": {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "bias": jnp.zeros(3)},
        "blocks": [jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.bfloat16), jnp.ones((8, 6))],
        "norm": jnp.ones(8),
    }
    stack = lojax.Rule("blocks/0", axes=("stack", "in", "out"))
    loras = []
    for i, (targets, settings) in enumerate(
        [
            ([stack], {"rank": 2, "alpha": 4}),
            ([stack, "blocks/1"], {"rank": 4, "alpha": 1}),
            (["blocks/1"], {"rank": 1}),
        ]
    ):
        _, lora = lojax.init(jax.random.key(i), params, targets, dropout=0.1 * i, **settings)
        loras.append(trained(lora, i))
    return params, lojax.stack(loras, names=["a/b", "../é", "A/B"])


def dora(seed: int = 0) -> tuple[Any, lojax.Bank]:
    """DoRA beside a head that is trained in full."""
    params = {"w": jax.random.normal(jax.random.key(seed), (6, 4)), "head": jnp.ones((4, 3), jnp.bfloat16)}
    pairs = [
        lojax.init(jax.random.key(i), params, "w", rank=i + 1, alpha=3, variant="dora", train="head") for i in range(3)
    ]
    loras = [trained(lora, i) for i, (_, lora) in enumerate(pairs)]
    loras = [{**lora, "head": lora["head"] * (i + 1)} for i, lora in enumerate(loras)]
    return pairs[0][0], lojax.stack(loras)


def tokens(seed: int = 0) -> tuple[Any, lojax.Bank]:
    """Rows of an embedding, with room for a larger rank elsewhere."""
    params = {"embed": jax.random.normal(jax.random.key(seed), (10, 4)), "w": jnp.ones((4, 4))}
    rules = [lojax.Rule("embed", train="tokens", tokens=(7, 2)), lojax.Rule("w", rank=2)]
    loras = [lojax.init(jax.random.key(i), params, rules)[1] for i in range(2)]
    loras = [
        {**x, "embed": dataclasses.replace(x["embed"], rows=jnp.full((2, 4), i + 1.0))} for i, x in enumerate(loras)
    ]
    return params, lojax.stack(loras, rank=4)


def boxed(seed: int = 0) -> tuple[Any, lojax.Bank]:
    """Weights in boxes with logical axis names, a rank for each entry of a stack, LoRA-FA."""
    kernel = jax.random.normal(jax.random.key(seed), (6, 4))
    params = {"w": nn.LogicallyPartitioned(kernel, ("embed", "mlp")), "v": nn.Partitioned(kernel, ("x", None))}
    rules = [lojax.Rule("w", variant="lora-fa", rank=2), lojax.Rule("v", rank=3)]
    return params, lojax.stack([trained(lojax.init(jax.random.key(i), params, rules)[1], i) for i in range(2)])


def ragged(seed: int = 0) -> tuple[Any, lojax.Bank]:
    """A scale and a rank for each entry of a stack, as EVA and PEFT give them."""
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)}

    def adapter(ranks: tuple[int, int], scale: tuple[float, float]) -> lojax.Adapter:
        r = max(ranks)
        a, b = rng.normal(size=(2, 5, r)), rng.normal(size=(2, r, 4))
        a *= np.arange(r) < np.array(ranks)[:, None, None]
        return lojax.Adapter(
            jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale, ("stack", "in", "out"), ranks=ranks
        )

    return params, lojax.stack([{"w": adapter((1, 3), (0.5, 2.0))}, {"w": adapter((2, 2), (1.0, 1.0))}])


CASES = {f.__name__: f for f in (plain, dora, tokens, boxed, ragged)}


def at_step(step: int) -> lojax.Bank:
    """A bank whose every value tells the step at which it was saved."""
    rng = np.random.default_rng(step)

    def adapter(rank: int) -> lojax.Adapter:
        a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((32, rank), (rank, 8)))
        return lojax.Adapter(a, b, float(rank), ("in", "out"))

    trees = [{"query": adapter(r), "step": jnp.full(3, step, jnp.int32)} for r in (1, 3, 2)]
    return lojax.stack(trees, names=["one", "two", "three"])
