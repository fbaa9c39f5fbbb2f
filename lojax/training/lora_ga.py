"""LoRA-GA: adapters that start from the gradient of the loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import Adapter, array_shapes
from lojax.adapters.axes import size
from lojax.adapters.matrices import subtract_update
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.quantized.quantized import is_quantized
from lojax.text import spec
from lojax.training.subspace_iteration import (
    Columns,
    check_batches,
    draw_columns,
    map_adapters,
    sum_over_batches,
    unit_scale_adapter,
)
from lojax.types import Array, Key, Leaf, Params, Path, PyTree

LossFn = Callable[[Params, Params, PyTree], Array]
"""``(frozen, lora, batch) -> loss``, a scalar."""


def lora_ga(
    loss: LossFn,
    frozen: Params,
    lora: Params,
    batches: Iterable[PyTree],
    *,
    gamma: float = 16.0,
    steps: int = 3,
    key: Key | None = None,
) -> tuple[Params, Params]:
    """Starts the factors at the singular vectors of the gradient (LoRA-GA, Wang et al. 2024, arXiv:2407.05000).

    With ``G = U S V^T`` the gradient of the loss with respect to a weight ``[m, n]`` over ``batches``, ``a`` is
    ``c U[:, :r]`` and ``b`` is ``c V^T[r:2r]``, ``c = n^(1/4) / sqrt(gamma)`` (§3.3, stable scale): the first step of
    the adapter is then near the first step of full fine-tuning. ``scale * a @ b`` is taken out of the weight, so the
    net starts at the pretrained model.

    Args:
        loss: ``loss(frozen, lora, batch)``, a scalar, through `Model.apply`.
        frozen: The frozen tree.
        lora: The trained tree; only where its adapters are and their ranks matter.
        batches: Read ``2 steps`` times: a list, or what can be iterated again.
        gamma: Divides the start; the paper's and PEFT's 16.
        steps: Steps of subspace iteration, of two gradients each.
        key: Where the iteration starts; the result hardly depends on it.

    Returns:
        ``(frozen, lora)``. What was trained from there is a plain LoRA on the original weights after
        `lojax.subtract` of this start.

    Raises:
        ValueError: No batches, a setting out of range, ``2r`` above min(m, n), ranks that differ within a stack, a
            gradient that is zero or not finite, or a weight that is quantized.

    >>> import lojax
    >>> model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=1)
    >>> params, x = {"w": jnp.eye(3)}, jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> frozen, lora = model.init(jax.random.key(0), params, x)
    >>> loss = lambda frozen, lora, x: jnp.sum(model.apply(frozen, lora, x) ** 2) / 2  # gradient x^T x
    >>> frozen, lora = lora_ga(loss, frozen, lora, [x])
    >>> jnp.abs(lora["w"].a[:, 0] / jnp.linalg.norm(lora["w"].a)).round(3).tolist()
    [1.0, 0.0, 0.0]
    """
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"lora_ga: gamma={gamma}; expected a finite number above 0.")
    batches, adapters = check_batches("lora_ga", frozen, lora, batches, steps)
    weights = {path: unbox(leaf) for path, leaf in flatten(frozen).items() if path in adapters}
    _check_stored(weights)
    _check_ranks(adapters, weights)
    multiply_gradient = _gradient_product(loss, frozen, lora, batches, adapters, weights)
    image = draw_columns(key, adapters, weights, "out", {path: 2 * adapter.rank for path, adapter in adapters.items()})
    left: Columns = {}
    for _ in range(steps):
        right = {path: jnp.linalg.qr(c)[0] for path, c in image.items()}
        left = {path: jnp.linalg.qr(c)[0] for path, c in multiply_gradient(right, "right").items()}
        image = multiply_gradient(left, "left")
    starts, new_weights = {}, {}
    for path, adapter in adapters.items():
        u, s, vt = jnp.linalg.svd(image[path].mT, full_matrices=False)
        if not bool(jnp.all(jnp.isfinite(s)) & jnp.all(s[:, 0] > 0)):
            raise ValueError(
                f"{path}: lora_ga found a gradient that is zero or not finite. Leave the weight out of the targets, "
                "or give batches and a loss that depend on it."
            )
        r, shape = adapter.rank, weights[path].shape
        c = size(adapter.axes, shape, "out") ** 0.25 / math.sqrt(gamma)
        shapes = array_shapes(adapter.axes, shape, r)
        a = (c * (left[path] @ u[:, :, :r])).reshape(shapes["a"]).astype(unbox(adapter.a).dtype)
        b = (c * vt[:, r : 2 * r]).reshape(shapes["b"]).astype(unbox(adapter.b).dtype)
        a_box, b_box = rebox(adapter.a, a), rebox(adapter.b, b)
        starts[path] = dataclasses.replace(adapter, a=a_box, b=b_box, moved_base="lora_ga")
        new_weights[path] = subtract_update(weights[path], a, b, adapter.one_scale, adapter.axes)
    new_frozen = map_paths(lambda path, leaf: rebox(leaf, new_weights[path]) if path in starts else leaf, frozen)
    return new_frozen, map_adapters(lora, lambda path, _: starts[path])


def _check_stored(weights: Mapping[Path, Leaf]) -> None:
    """Raises unless the start can be taken out of every weight."""
    for path, weight in weights.items():
        if is_quantized(weight):
            # Measured on a Gaussian 512 x 512, rank 8, NF4: 0.130 of the weight lost, against 0.093.
            raise ValueError(
                f"{path}: is quantized ({weight}), and lora_ga takes the start of the adapter out of the weight: it "
                "would be rounded a second time, for 1.4 times the error. Call lora_ga on the float weights, and "
                f"quantize the frozen tree that it returns: lojax.quantize(frozen, {weight.kind!r}, targets)."
            )
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ValueError(
                f"{path}: holds codes ({spec(weight)}), and lora_ga takes the start of the adapter out of the weight. "
                'Start from init="kaiming" or eva, which leave the weight as it is.'
            )


def _check_ranks(adapters: Mapping[Path, Adapter], weights: Mapping[Path, Array]) -> None:
    """Raises unless the gradient has enough singular vectors for every adapter."""
    for path, adapter in adapters.items():
        limit = min(size(adapter.axes, weights[path].shape, role) for role in ("in", "out")) // 2
        if adapter.ranks or isinstance(adapter.scale, tuple) or adapter.rank > limit:
            raise ValueError(
                f"{path}: lora_ga gives an adapter of one rank up to min(m, n) / 2 = {limit}; this one has "
                f"{f'ranks {adapter.ranks}' if adapter.ranks else f'rank {adapter.rank}'}. "
                "Choose such a rank, or another start for this weight."
            )


def _gradient_product(
    loss: LossFn,
    frozen: Params,
    lora: Params,
    batches: Sequence[PyTree],
    adapters: Mapping[Path, Adapter],
    weights: Mapping[Path, Array],
) -> Callable[[Columns, Literal["left", "right"]], Columns]:
    """Products with ``G``, the gradient over all batches: ``G^T left`` ``[S, n, k]``, or ``G right`` ``[S, m, k]``.

    Each is the gradient with respect to the zero factor of an adapter: ``dloss/db = a^T G`` and ``dloss/da = G b^T``.
    """

    @functools.partial(jax.jit, static_argnames="side")
    def batch_product(frozen: Params, lora: Params, columns: Columns, batch: PyTree, side: str) -> Columns:
        def loss_at(zeros: Columns) -> Array:
            def probe(path: Path, adapter: Adapter) -> Adapter:
                a, b = (columns[path], zeros[path]) if side == "left" else (zeros[path], columns[path])
                return unit_scale_adapter(Adapter, adapter, weights[path].shape, a, b.mT)

            return loss(frozen, map_adapters(lora, probe), batch)

        zeros = {}
        for path, c in columns.items():
            rows = size(adapters[path].axes, weights[path].shape, "out" if side == "left" else "in")
            zeros[path] = jnp.zeros((c.shape[0], rows, c.shape[2]), c.dtype)
        return jax.grad(loss_at)(zeros)

    def product(columns: Columns, side: Literal["left", "right"]) -> Columns:
        return sum_over_batches(batch_product(frozen, lora, columns, batch, side) for batch in batches)

    return product
