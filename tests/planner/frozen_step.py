"""The frozen step: the baseline that a LoRA step is compared with, here and in benchmarks/plan.py."""

import jax.numpy as jnp

from lojax.planner.decoder import Decoder
from lojax.planner.train_step import StepProgram, batch_shapes, value_then_grad


def frozen_step(decoder: Decoder, *, batch: int, seq: int, dtype=jnp.bfloat16) -> StepProgram:
    """Forward and backward through frozen weights, on shapes.

    It returns the gradient of the norms of every layer, a ten-thousandth of the weights, so that the backward pass
    runs through all layers.
    """
    params, data = decoder.shapes(dtype), batch_shapes(decoder, batch, seq)

    def step(params, data):
        def loss(scale):
            layers = {**params["layers"], "input_layernorm": {"scale": scale}}
            return decoder.loss({**params, "layers": layers}, data)

        return value_then_grad(loss, params["layers"]["input_layernorm"]["scale"])

    return StepProgram(step, (params, data), None, (), {"weights": params, "batch": data})
