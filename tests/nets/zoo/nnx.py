"""Flax NNX modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.nets.zoo.case import Case, Example, fill, normal, tokens


def build(make: Any, *args: Any, mutable: Any = False) -> Any:
    """A row's builder: ``make(rngs)`` is made on shapes, then filled. ``mutable``: the state that a call returns."""

    def example() -> Example:
        graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
        params, rest = fill(nnx.to_pure_dict(params)), fill(nnx.to_pure_dict(rest))

        def native(params: Any) -> Any:
            module = nnx.merge(graphdef, params, rest)
            outputs = module(*args)
            return (outputs, nnx.to_pure_dict(nnx.state(module, mutable))) if mutable else outputs

        kwargs = {"mutable": mutable} if mutable else {}
        return Example(nnx.merge(graphdef, params, rest), params, native, args, kwargs)

    return example


class MLP(nnx.Module):
    """A list of layers, batch statistics, and dropout that holds its own rngs."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64, depth: int = 3):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.dropout(self.norm(x))


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class TiedLM(nnx.Module):
    """One embedding for the input and the output, held twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(24, 16, rngs=rngs)
        self.block = Block(16, rngs)
        self.head = self.embed

    def __call__(self, ids: Any) -> Any:
        return self.head.attend(self.block(self.embed(ids)))


class Scanned(nnx.Module):
    """Layers made by ``nnx.vmap`` and run by ``nnx.scan`` over ``nnx.remat``."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(16, rngs)

        self.blocks = make(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block: Block, x: Any) -> Any:
            return block(x)

        return run(self.blocks, x)


class Ensemble(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(8, 16, rngs=rngs)

        self.members = make(rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.vmap(lambda member, x: nnx.tanh(member(x)), in_axes=(0, None))(self.members, x).mean(0)


class ConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs)
        self.groups = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 8, (2, 2), strides=(2, 2), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.up(nnx.relu(self.groups(nnx.relu(self.down(x)))))


class Recurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(8, 16, rngs=rngs))
        self.gru = nnx.RNN(nnx.GRUCell(16, 16, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        return self.gru(self.lstm(x))


class Experts(nnx.Module):
    """Experts as einsum weights ``[E, D, F]``, and a choice of the best for each token."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.router = nnx.Linear(16, 4, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (4, 16, 32)))
        self.down = nnx.Param(init(rngs.params(), (4, 32, 16)))

    def __call__(self, x: Any) -> Any:
        gate = self.router(x)
        gate = jnp.where(gate == gate.max(-1, keepdims=True), nnx.softmax(gate), 0.0)
        hidden = nnx.relu(jnp.einsum("td,edf->etf", x, self.up[...]))
        return jnp.einsum("te,etf,efd->td", gate, hidden, self.down[...])


class FusedHeads(nnx.Module):
    """``nnx.Einsum`` with q, k and v as a leading axis of one weight, as Gemma has them."""

    def __init__(self, rngs: nnx.Rngs):
        self.qkv = nnx.Einsum("BTD,SNDH->SBTNH", (3, 2, 16, 8), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (2, 8, 16), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        q, k, v = self.qkv(x)
        weights = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k))
        return self.out(jnp.einsum("BNTS,BSNH->BTNH", weights, v))


KERNELS = "**/kernel"
STATE = (nnx.BatchStat, nnx.RngCount)
CASES = (
    Case(
        "mlp_batchnorm_dropout",
        "flax.nnx",
        build(MLP, normal(0, 32, 64), mutable=STATE),
        KERNELS,
        3,
        flops=0.75,
        rows=False,
    ),
    Case("tied_lm", "flax.nnx", build(TiedLM, tokens(0, 24, 2, 5)), [KERNELS, "**/embedding"], 7),
    Case("scan_remat", "flax.nnx", build(Scanned, normal(0, 2, 5, 16)), KERNELS, 6),
    Case("vmap_ensemble", "flax.nnx", build(Ensemble, normal(0, 6, 8)), KERNELS, 1),
    Case("conv", "flax.nnx", build(ConvNet, normal(0, 2, 8, 8, 4)), KERNELS, 3),
    Case("lstm_gru", "flax.nnx", build(Recurrent, normal(0, 2, 4, 8)), KERNELS, 4),
    Case("moe_einsum", "flax.nnx", build(Experts, normal(0, 6, 16)), [KERNELS, "up", "down"], 3),
    Case("fused_qkv_einsum", "flax.nnx", build(FusedHeads, normal(0, 2, 5, 16)), KERNELS, 2),
)
