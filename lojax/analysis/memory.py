"""The memory of a training step that follows from shapes: weights, what trains, its gradients, Adam's two moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import unbox
from lojax.quantized.formats import make_format
from lojax.quantized.quantized import Quantized, is_quantized, quantize_weight
from lojax.types import Leaf, Path

BASE = "nf4"
"""The kind of the quantized base that is compared."""


class StepMemory(NamedTuple):
    """Bytes of a step without its activations, which depend on the batch and are alike for all.

    Attributes:
        weights: What is frozen.
        trained: What trains.
        gradients: Its gradients, in its dtype.
        moments: Adam's two moments, in its dtype, as optax has them.
    """

    weights: int
    trained: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def lora_memory(weights: Mapping[Path, Leaf], trained: Mapping[Path, Leaf], *, quantized: bool = False) -> StepMemory:
    """The memory with adapters.

    Args:
        weights: The frozen tree by path; shapes are enough.
        trained: The ``lora`` tree by path; likewise.
        quantized: Whether the adapted weights are in `BASE`, as ``lojax.wrap(..., base="nf4")`` makes them.
    """
    base = held = moving = 0
    for path, leaf in trained.items():
        weight = unbox(weights[path])
        if weight is not None:
            base += _quantized_bytes(weight) if quantized and is_adapter(leaf) else _bytes(weight)
        if is_adapter(leaf):
            held += sum(_bytes(x) for x in leaf.arrays.values())
            moving += sum(_bytes(leaf.arrays[name]) for name in leaf.trained_arrays)
        elif leaf is not None:
            held, moving = held + _bytes(unbox(leaf)), moving + _bytes(unbox(leaf))
    return StepMemory(base, held, moving, 2 * moving)


def full_memory(weights: Mapping[Path, Leaf], trained: Mapping[Path, Leaf]) -> StepMemory:
    """The memory of full fine-tuning in the dtype of the weights; of quantized ones in the dtype they stand for."""
    total = 0
    for path, leaf in trained.items():
        weight = unbox(weights[path]) if unbox(weights[path]) is not None else unbox(leaf)
        if weight is not None:
            total += math.prod(np.shape(weight)) * jnp.dtype(weight.dtype).itemsize
    return StepMemory(0, total, total, 2 * total)


def _bytes(x: Leaf) -> int:
    if is_quantized(x):
        return x.nbytes
    return math.prod(np.shape(x)) * jnp.dtype(getattr(x, "dtype", jnp.float32)).itemsize


def _quantized_bytes(weight: Leaf) -> int:
    if is_quantized(weight) or not jnp.issubdtype(weight.dtype, jnp.floating):
        return _bytes(weight)
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    quantized: Quantized = jax.eval_shape(lambda w: quantize_weight(w, make_format(BASE)), shape)
    return quantized.nbytes
