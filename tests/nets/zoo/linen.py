"""Flax Linen modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.nets.zoo.case import Case, Example, fill, normal, tokens


def example(net: nn.Module, *args: Any, **kwargs: Any) -> Example:
    variables = fill(jax.eval_shape(lambda key: net.init(key, *args, **kwargs), jax.random.key(0)))
    return Example(net, variables, lambda p: net.apply(p, *args, **kwargs), args, kwargs)


class MLP(nn.Module):
    width: int = 64
    depth: int = 3

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = nn.LayerNorm()(nn.relu(nn.Dense(self.width)(x)))
        return x


class Block(nn.Module):
    heads: int = 2
    hidden: int = 64

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))


class TiedLM(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        embed = nn.Embed(24, 16)
        return embed.attend(Block()(embed(ids) + nn.Embed(8, 16)(jnp.arange(ids.shape[-1]))))


class ScannedBlocks(nn.Module):
    """``nn.scan`` over ``nn.remat``: one stack of weights for all layers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def step(block: nn.Module, x: Any, _: Any) -> Any:
            return block(x), None

        stack = nn.scan(nn.remat(step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(Block(name="blocks"), x, None)[0]


class ConvNet(nn.Module):
    """Strided, dilated, grouped and transposed convolution, with batch statistics."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), strides=2)(x)))
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2)(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(x))
        x = nn.relu(nn.ConvTranspose(8, (2, 2), strides=(2, 2))(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.RNN(nn.GRUCell(16))(nn.RNN(nn.LSTMCell(16))(x))


class FusedGates(nn.Module):
    """A cell that joins the kernels of its gates before one product."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.RNN(nn.OptimizedLSTMCell(16))(x)


class Ensemble(nn.Module):
    """``nn.vmap``: members are a stack."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        members = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return members(16, 2)(x).mean(0)


class Experts(nn.Module):
    """Experts made by ``nn.vmap`` over their own inputs, mixed by a router."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        gate = nn.softmax(nn.Dense(3)(x))
        many = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
        return jnp.einsum("te,etd->td", gate, many(16, 2)(jnp.stack([x, -x, 2 * x])))


class Partitioned(nn.Module):
    """Weights in boxes that name their axes, several of which are out axes."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "heads", None))
        x = nn.DenseGeneral((2, 8), kernel_init=init)(x)
        return nn.DenseGeneral(16, axis=(-2, -1))(nn.tanh(x))


KERNELS = "params/**/kernel"
CASES = (
    Case("mlp_layernorm", "flax.linen", lambda: example(MLP(), normal(0, 32, 64)), KERNELS, 3, flops=0.75),
    Case("transformer_block", "flax.linen", lambda: example(Block(2, 32), normal(0, 2, 5, 16)), KERNELS, 6),
    Case(
        "tied_lm",
        "flax.linen",
        lambda: example(TiedLM(), tokens(0, 24, 2, 5)),
        [KERNELS, "**/embedding"],
        8,
    ),
    Case("scan_remat", "flax.linen", lambda: example(ScannedBlocks(), normal(0, 2, 5, 16)), KERNELS, 6),
    Case("conv_batchnorm", "flax.linen", lambda: example(ConvNet(), normal(0, 2, 8, 8, 4)), KERNELS, 5),
    Case("lstm_gru", "flax.linen", lambda: example(Recurrent(), normal(0, 2, 4, 8)), KERNELS, 14),
    Case("lstm_fused_gates", "flax.linen", lambda: example(FusedGates(), normal(0, 2, 4, 8)), KERNELS, 8),
    Case("vmap_ensemble", "flax.linen", lambda: example(Ensemble(), normal(0, 6, 8)), KERNELS, 2),
    Case("vmap_experts", "flax.linen", lambda: example(Experts(), normal(0, 6, 8)), KERNELS, 3),
    Case("partitioned_boxes", "flax.linen", lambda: example(Partitioned(), normal(0, 6, 16)), KERNELS, 2),
)
