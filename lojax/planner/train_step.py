"""The train step of an adapted decoder, and the shapes and shardings of its arguments: what a plan compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from lojax.base.quantize import quantize
from lojax.planner.decoder import BATCH, TARGETS, Batch, Decoder
from lojax.sharding.shardings import shardings, state_shardings
from lojax.types import Array, Dtype, Key, Params, PyTree
from lojax.wrap import Model

Loss: TypeAlias = Callable[[Params, Params, Batch], Array]
"""``loss(frozen, lora, batch)``."""


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A step and its arguments as shapes with shardings, ready to be lowered.

    Attributes:
        step: The function.
        args: Its arguments.
        out_shardings: The shardings of its results.
        donate: The positions of the arguments whose memory it may reuse.
        args_by_kind: The arguments as ``"weights"``, ``"adapters"``, ``"optimizer"`` and ``"batch"``.
    """

    step: Callable[..., PyTree]
    args: tuple[PyTree, ...]
    out_shardings: PyTree
    donate: tuple[int, ...]
    args_by_kind: dict[str, PyTree]

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered for the mesh of its arguments."""
        return jax.jit(self.step, out_shardings=self.out_shardings, donate_argnums=self.donate).lower(*self.args)


def train_step(
    loss: Loss, tx: optax.GradientTransformation, *, accumulation_steps: int = 1
) -> Callable[[Params, Params, PyTree, Batch], tuple[Params, PyTree, Array]]:
    """``step(frozen, lora, opt_state, batch) -> (lora, opt_state, loss)``.

    Args:
        loss: ``loss(frozen, lora, batch)``, the sum over the batch weighted by ``batch["weights"]``. The step makes
            these weights sum to one, so the loss is a mean over all targets, however the batch is divided.
        tx: The optimizer.
        accumulation_steps: The number of microbatches whose gradients are added up, in float32. With more than one,
            every array of the batch has a leading axis of this size.
    """

    def step(frozen: Params, lora: Params, opt_state: PyTree, batch: Batch) -> tuple[Params, PyTree, Array]:
        batch = {**batch, "weights": batch["weights"] / jnp.maximum(batch["weights"].sum(), 1)}
        value, grads = _accumulate_gradient(loss, frozen, lora, batch, accumulation_steps)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counter with floats
            updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, value

    return step


def _accumulate_gradient(
    loss: Loss, frozen: Params, lora: Params, batch: Batch, accumulation_steps: int
) -> tuple[Array, Params]:
    def gradient(batch: Batch) -> tuple[Array, Params]:
        return value_then_grad(lambda lora: loss(frozen, lora, batch), lora)

    if accumulation_steps == 1:
        return gradient(batch)

    def add(total: tuple[Array, Params], microbatch: Batch) -> tuple[tuple[Array, Params], None]:
        return jax.tree.map(jnp.add, total, gradient(microbatch)), None

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, lora)
    return jax.lax.scan(add, zero, batch)[0]


def value_then_grad(loss: Callable[[Params], Array], x: Params) -> tuple[Array, Params]:
    """`jax.value_and_grad` whose backward pass starts only when the value is known."""
    value, pullback = jax.vjp(loss, x)
    # A loss that is recomputed for its gradient leaves the backward pass independent of the value. The compiler may
    # then compute the value last, and the last hidden states and the gathered head stay in memory through the backward
    # pass of every layer (190 MB a device for 70B on v5e:16x16). The barrier makes the cotangent depend on the value.
    value, cotangent = jax.lax.optimization_barrier((value, jnp.ones_like(value)))
    return value, pullback(cotangent)[0]


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that carry these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def batch_shapes(decoder: Decoder, batch: int, seq: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Packed tokens, targets, segments, positions and weights, ``[B, S]``."""
    sharding = decoder.sharding(PartitionSpec(BATCH))
    dtypes = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct((batch, seq), dtype, sharding=sharding) for name, dtype in dtypes.items()}


def lora_step(
    model: Model,
    decoder: Decoder,
    tx: optax.GradientTransformation,
    *,
    batch: int,
    seq: int,
    spread: bool = True,
    dtype: Dtype = jnp.bfloat16,
    quantized: str | None = None,
    quantized_targets: Any = TARGETS,
) -> StepProgram:
    """The LoRA step on shapes.

    Args:
        model: ``lojax.wrap(decoder.total_loss, ...)``.
        decoder: The decoder, on its mesh.
        tx: The optimizer.
        batch: The number of sequences in a step, over all devices.
        seq: Their length.
        spread: As in `lojax.sharding.shardings`.
        dtype: The dtype of the weights.
        quantized: The kind of quantization of weights (`lojax.quantize`); None for none.
        quantized_targets: Which weights that is: by default the linear layers of the blocks.
    """
    data = batch_shapes(decoder, batch, seq)

    def init(key: Key, params: Params) -> tuple[Params, Params]:
        base = params if quantized is None else quantize(params, quantized, quantized_targets)
        return model.init(key, base, data)

    frozen, lora = jax.eval_shape(init, jax.random.key(0), decoder.shapes(dtype))
    state = jax.eval_shape(tx.init, lora)
    placed = shardings(frozen, lora, state, mesh=decoder.mesh, specs=decoder.specs(), spread=spread)
    frozen, lora, state = (with_shardings(*pair) for pair in zip((frozen, lora, state), placed, strict=True))
    return StepProgram(
        train_step(model.apply, tx),
        (frozen, lora, state, data),
        (placed.lora, placed.opt_state, decoder.sharding(PartitionSpec())),
        (1, 2),
        {"weights": frozen, "adapters": lora, "optimizer": state, "batch": data},
    )


def full_step(
    decoder: Decoder, tx: optax.GradientTransformation, *, batch: int, seq: int, dtype: Dtype = jnp.bfloat16
) -> StepProgram:
    """The step of full fine-tuning on shapes, with moments in float32."""
    assert decoder.mesh is not None, "a plan has a mesh"
    params = decoder.shapes(dtype)
    moments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), params)
    sharding_tree = shardings(params, jax.tree.map(lambda _: None, params), mesh=decoder.mesh).frozen
    state = jax.eval_shape(tx.init, moments)
    state = with_shardings(state, state_shardings(state, moments, sharding_tree, decoder.mesh))
    data = batch_shapes(decoder, batch, seq)

    def step(params: Params, state: PyTree, data: Batch) -> tuple[Params, PyTree, Array]:
        value, grads = value_then_grad(lambda params: decoder.loss(params, data), params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)
            params = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
        return params, state, value

    out_shardings = (sharding_tree, jax.tree.map(lambda x: x.sharding, state), decoder.sharding(PartitionSpec()))
    kinds = {"weights": params, "optimizer": state, "batch": data}
    return StepProgram(step, (params, state, data), out_shardings, (0, 1), kinds)
