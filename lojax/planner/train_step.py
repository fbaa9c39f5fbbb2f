"""The train step of an adapted decoder, and the shapes and shardings of all that goes in: what a plan compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lojax.planner.decoder import BATCH, Decoder
from lojax.sharding.shardings import shardings, state_shardings


class Adapted(Protocol):
    """What `lojax.wrap` returns, as far as it matters here."""

    init: Callable[..., Any]
    apply: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """A step and its arguments as shapes with shardings; ``jax.jit(step, ...).lower(*args)`` compiles it.

    Attributes:
        step: The function.
        args: Its arguments.
        out_shardings: How its results lie.
        donate: Which arguments it may reuse.
        parts: Arguments by what they are, for the account of memory.
    """

    step: Callable[..., Any]
    args: tuple[Any, ...]
    out_shardings: Any
    donate: tuple[int, ...]
    parts: dict[str, Any]

    def lower(self) -> Any:
        """The step, lowered for the mesh of its arguments."""
        return jax.jit(self.step, out_shardings=self.out_shardings, donate_argnums=self.donate).lower(*self.args)


def train_step(loss: Callable[..., Any], tx: optax.GradientTransformation, *, micro: int = 1) -> Callable[..., Any]:
    """``step(frozen, lora, opt_state, batch) -> (lora, opt_state, loss)``.

    Args:
        loss: ``loss(frozen, lora, batch)``, the sum over the batch weighted by ``batch["weights"]``. The step makes
            these weights sum to one, so the loss is the mean over all that counts, however the batch is cut.
        tx: The optimizer.
        micro: Into how many parts the batch is cut, one after the other, gradients added in float32. Every
            array of the batch then has a leading axis of this size.
    """

    def step(frozen: Any, lora: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any]:
        batch = {**batch, "weights": batch["weights"] / jnp.maximum(batch["weights"].sum(), 1)}
        value, grads = _gradient(loss, frozen, lora, batch, micro)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counter with floats
            updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, value

    return step


def _gradient(loss: Callable[..., Any], frozen: Any, lora: Any, batch: Any, micro: int) -> tuple[Any, Any]:
    def part_gradient(part: Any) -> tuple[Any, Any]:
        return value_then_grad(lambda lora: loss(frozen, lora, part), lora)

    if micro == 1:
        return part_gradient(batch)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part_gradient(part)), None

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, lora)
    return jax.lax.scan(add, zero, batch)[0]


def value_then_grad(loss: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
    """`jax.value_and_grad`, whose backward pass starts when the value is known.

    Where the loss is computed again for its gradient, nothing of the backward pass needs the value, and a compiler may
    compute it last of all: the last hidden states and the gathered head then stay in memory through the backward pass
    of every layer (190 MB a chip for 70B on v5e:16x16).
    """
    value, pull = jax.vjp(loss, x)
    value, one = jax.lax.optimization_barrier((value, jnp.ones_like(value)))
    return value, pull(one)[0]


def with_shardings(shapes: Any, placed: Any) -> Any:
    """Shapes that lie as ``placed`` says."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def batch_shapes(decoder: Decoder, batch: int, seq: int, micro: int = 1) -> Any:
    """Packed tokens, targets, segments, positions and weights, ``[B, S]`` or ``[micro, B/micro, S]``."""
    shape = (batch, seq) if micro == 1 else (micro, batch // micro, seq)
    entries = decoder.spec(BATCH) if micro == 1 else decoder.spec(None, BATCH)
    sharding = NamedSharding(decoder.mesh, entries)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "positions": jnp.int32}
    kinds["weights"] = jnp.float32
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()}


def lora_work(
    model: Adapted,
    decoder: Decoder,
    tx: optax.GradientTransformation,
    *,
    batch: int,
    seq: int,
    micro: int = 1,
    spread: bool = True,
    dtype: Any = jnp.bfloat16,
) -> Work:
    """The LoRA step on shapes.

    Args:
        model: ``lojax.wrap(decoder.total_loss, ...)``.
        decoder: The decoder, on its mesh.
        tx: The optimizer.
        batch: The number of sequences in a step, over all chips.
        seq: Their length.
        micro: How many parts the batch is worked off in.
        spread: As in `lojax.sharding.shardings`.
        dtype: The dtype of the weights.
    """
    data = batch_shapes(decoder, batch, seq, micro)
    one = batch_shapes(decoder, batch // micro, seq)
    frozen, lora = jax.eval_shape(lambda key, p: model.init(key, p, one), jax.random.key(0), decoder.shapes(dtype))
    state = jax.eval_shape(tx.init, lora)
    placed = shardings(frozen, lora, state, mesh=decoder.mesh, specs=decoder.specs(), spread=spread)
    trees = [with_shardings(*pair) for pair in zip((frozen, lora, state), placed, strict=True)]
    whole = NamedSharding(decoder.mesh, PartitionSpec())
    step = train_step(model.apply, tx, micro=micro)
    parts = dict(zip(("weights", "adapters", "optimizer"), trees, strict=True)) | {"batch": data}
    return Work(step, (*trees, data), (placed.lora, placed.opt_state, whole), (1, 2), parts)


def full_work(
    decoder: Decoder, tx: optax.GradientTransformation, *, batch: int, seq: int, dtype: Any = jnp.bfloat16
) -> Work:
    """The step of full fine-tuning on shapes, with moments in float32."""
    params = decoder.shapes(dtype)
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), params)
    placed = shardings(params, jax.tree.map(lambda _: None, params), mesh=decoder.mesh).frozen
    state = jax.eval_shape(tx.init, wide)
    placed_wide = jax.tree.map(lambda x: x.sharding, wide)
    state = with_shardings(state, state_shardings(state, wide, placed_wide, decoder.mesh))
    data = batch_shapes(decoder, batch, seq)

    def step(params: Any, state: Any, data: Any) -> Any:
        value, grads = value_then_grad(lambda params: decoder.loss(params, data), params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)
            params = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
        return params, state, value

    whole = NamedSharding(decoder.mesh, PartitionSpec())
    outs = (placed, jax.tree.map(lambda x: x.sharding, state), whole)
    return Work(step, (params, state, data), outs, (0, 1), {"weights": params, "optimizer": state, "batch": data})


def floor_work(decoder: Decoder, *, batch: int, seq: int, dtype: Any = jnp.bfloat16) -> Work:
    """The frozen forward and backward on shapes: all that LoRA is compared with.

    The gradient of the norms of every layer, a ten-thousandth of the weights, is what makes it run backward
    through everything.
    """
    params, data = decoder.shapes(dtype), batch_shapes(decoder, batch, seq)

    def step(params: Any, data: Any) -> Any:
        def loss(scale: Any) -> Any:
            layers = {**params["layers"], "input_layernorm": {"scale": scale}}
            return decoder.loss({**params, "layers": layers}, data)

        return value_then_grad(loss, params["layers"]["input_layernorm"]["scale"])

    return Work(step, (params, data), None, (), {"weights": params, "batch": data})
