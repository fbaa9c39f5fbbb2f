"""Haiku functions. Every one imports Haiku itself, so that the table stands where Haiku is not installed."""

from __future__ import annotations

from typing import Any

import jax

from tests.nets.zoo.case import Case, Example, fill, normal, tokens


def example(f: Any, *args: Any) -> Example:
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(f))
    params = fill(jax.eval_shape(net.init, jax.random.key(0), *args))
    return Example(net, params, lambda p: net.apply(p, *args), args)


def mlp() -> Example:
    import haiku as hk

    net = hk.transform(lambda x: hk.nets.MLP([64, 64, 64])(x, dropout_rate=0.1, rng=hk.next_rng_key()))
    args = (jax.random.key(1), normal(0, 32, 64))
    params = fill(jax.eval_shape(net.init, jax.random.key(0), args[1]))
    return Example(net, params, lambda p: net.apply(p, *args), args)


def transformer() -> Example:
    import haiku as hk

    def f(ids: Any) -> Any:
        embed = hk.Embed(24, 16)
        x = embed(ids)
        y = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(2, 8, w_init=hk.initializers.VarianceScaling())(y, y, y)
        x = x + hk.Linear(16)(jax.nn.gelu(hk.Linear(32)(hk.LayerNorm(-1, True, True)(x))))
        return x @ embed.embeddings.T

    return example(f, tokens(0, 24, 2, 5))


def lstm() -> Example:
    import haiku as hk

    def f(x: Any) -> Any:
        core = hk.DeepRNN([hk.LSTM(16), hk.GRU(16)])
        return hk.Linear(4)(hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0])

    return example(f, normal(0, 4, 2, 8))


def conv() -> Example:
    """With state: batch statistics come before the rng in the arguments, and back with the output."""
    import haiku as hk

    def f(x: Any) -> Any:
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3, stride=2)(x), is_training=True))
        x = jax.nn.relu(hk.Conv2D(8, 3, feature_group_count=2)(x))
        return hk.Linear(4)(hk.Flatten()(hk.Conv2DTranspose(8, 3, stride=2)(x)))

    net = hk.transform_with_state(f)
    params, state = fill(jax.eval_shape(net.init, jax.random.key(0), normal(0, 2, 8, 8, 4)))
    args = (state, None, normal(0, 2, 8, 8, 4))
    return Example(net, params, lambda p: net.apply(p, *args), args)


def stack() -> Example:
    import haiku as hk

    def block(x: Any) -> Any:
        return x + hk.Linear(16)(jax.nn.relu(hk.Linear(32)(x)))

    return example(lambda x: hk.experimental.layer_stack(3)(block)(x), normal(0, 6, 16))


def row(name: str, build: Any, targets: Any, count: int, **settings: Any) -> Case:
    return Case(name, "haiku", build, targets, count, requires="haiku", promotion="standard", **settings)


CASES = (
    row("mlp_dropout", mlp, "**/w", 3, flops=0.75, rows=False),
    row("transformer_tied", transformer, ["**/w", "**/embeddings"], 7),
    row("lstm_gru", lstm, "**/w*", 4),
    row("conv_batchnorm_state", conv, "**/w", 4, rows=False),
    row("layer_stack", stack, "**/w", 2),
)
