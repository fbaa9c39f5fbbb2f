"""LoRA-GA: adapters that start from the gradient of the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import array_shapes, size
from lojax.adapters.decompositions import without_update
from lojax.adapters.initializers import zeros
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.training.subspace_iteration import Columns, checked_batches, plain, random_columns, replaced, total


def lora_ga(
    loss: Callable[[Any, Any, Any], Any],
    frozen: Any,
    lora: Any,
    batches: Iterable[Any],
    *,
    gamma: float = 16.0,
    steps: int = 3,
    key: jax.Array | None = None,
) -> tuple[Any, Any]:
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
        ValueError: No batches, a setting out of range, ``2r`` above min(m, n), ranks that differ within a stack, or a
            gradient that is zero or not finite.

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
    batches, adapters = checked_batches("lora_ga", frozen, lora, batches, steps)
    weights = {path: unbox(leaf) for path, leaf in flatten(frozen).items() if path in adapters}
    _check_ranks(adapters, weights)
    on = _sketches(loss, frozen, lora, batches, adapters, weights)
    image = random_columns(
        key, adapters, weights, "out", {path: 2 * adapter.rank for path, adapter in adapters.items()}
    )
    left: Columns = {}
    for _ in range(steps):
        right = {path: jnp.linalg.qr(c)[0] for path, c in image.items()}
        left = {path: jnp.linalg.qr(c)[0] for path, c in on(right=right).items()}
        image = on(left=left)
    starts, kept = {}, {}
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
        starts[path] = dataclasses.replace(adapter, a=rebox(adapter.a, a), b=rebox(adapter.b, b))
        kept[path] = without_update(weights[path], a, b, adapter.one_scale, adapter.axes)
    changed = map_paths(lambda path, leaf: rebox(leaf, kept[path]) if path in kept else leaf, frozen)
    return changed, replaced(lora, lambda path, adapter: starts[path])


def _check_ranks(adapters: Mapping[str, Adapter], weights: Mapping[str, Any]) -> None:
    """Raises unless the gradient has vectors enough for every adapter."""
    for path, adapter in adapters.items():
        least = min(size(adapter.axes, weights[path].shape, role) for role in ("in", "out"))
        if "ranks" in adapter.extras or "scale" in adapter.extras or 2 * adapter.rank > least:
            raise ValueError(
                f"{path}: lora_ga gives an adapter of one rank up to min(m, n) / 2 = {least // 2}; this one has "
                f"{f'ranks {adapter.ranks}' if adapter.ranks else f'rank {adapter.rank}'}. "
                "Choose such a rank, or another start for this weight."
            )


def _sketches(
    loss: Callable[[Any, Any, Any], Any],
    frozen: Any,
    lora: Any,
    batches: Sequence[Any],
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, Any],
) -> Callable[..., Columns]:
    """``G^T left`` ``[S, n, k]``, or ``G right`` ``[S, m, k]``: the gradient of an adapter that adds nothing."""

    @jax.jit
    def sketch(frozen: Any, lora: Any, left: Columns | None, right: Columns | None, batch: Any) -> Columns:
        def of(moving: Columns) -> Any:
            def sketching(path: str, adapter: Adapter) -> Adapter:
                a, b = (left[path], moving[path]) if left else (moving[path], right[path])  # type: ignore[index]
                return plain(Adapter, adapter, weights[path].shape, a, b.mT)

            return loss(frozen, replaced(lora, sketching), batch)

        role, given = ("out", left) if left else ("in", right)
        assert given is not None
        still = {
            path: zeros((c.shape[0], size(adapters[path].axes, weights[path].shape, role), c.shape[2]), c.dtype)
            for path, c in given.items()
        }
        return jax.grad(of)(still)

    def on(left: Columns | None = None, right: Columns | None = None) -> Columns:
        return total(sketch(frozen, lora, left, right, batch) for batch in batches)

    return on
