"""Merging an adapter into its weights and taking it out again.

The update is added in float32 (or wider) and cast once. In bfloat16 a merge still loses what falls
below the weight's own rounding: train factored on a low-precision base, and keep ``frozen``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lojax.adapters.adapter import Adapter, is_adapter, scale_update
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.trees import check_pair, check_structure
from lojax.lowrank.value import from_adapter


def merge(frozen: Any, lora: Any, *, donate: bool = False, check_finite: bool = False) -> Any:
    """Plain parameters for the net: ``W0 + scale * a @ b`` at every adapted weight.

    A `tree_map` of a jitted sum, float32 accumulation, one cast to the dtype of ``W0``: weights follow one another, so
    that only one float32 update is there at a time, and weights that are alike are compiled once.

    Args:
        frozen: The frozen tree.
        lora: The adapters and the parameters trained in full.
        donate: Reuse the buffers of ``frozen`` for the result; neither ``frozen`` nor the ``params`` it
            came from is then usable any more.
        check_finite: Raise if a merged parameter holds NaN or infinity, naming its path. Reads values,
            so not under `jit`.

    Returns:
        A tree of the structure of ``params``, with nothing of lojax in it.

    Raises:
        ValueError: The trees do not fit together, or a merged parameter is not finite.

    >>> from lojax import Adapter
    >>> frozen = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    >>> adapter = Adapter(a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=0.5, axes=("in", "out"))
    >>> merge(frozen, {"kernel": adapter, "bias": None})["kernel"].tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    check_pair(frozen, lora)
    if check_finite:  # before the only copy may be given away
        _refuse_nonfinite(_finite_merged(frozen, lora))
    return _merged(frozen, lora, _sum_donated if donate else _sum)


def unmerge(params: Any, lora: Any, *, donate: bool = False) -> Any:
    """The ``frozen`` tree that `merge` would turn into ``params``: ``W - scale * a @ b``.

    Exact to the rounding of the weight's dtype; where the base is at hand, keep it instead.

    Args:
        params: Merged parameters.
        lora: The adapters that were merged.
        donate: Reuse the buffers of ``params``.

    Returns:
        ``frozen``, with None at each parameter trained in full.

    Raises:
        ValueError: The trees do not fit together, or an adapter is a DoRA one, whose merge cannot be undone.

    >>> from lojax import Adapter
    >>> adapter = Adapter(a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=0.5, axes=("in", "out"))
    >>> unmerge({"kernel": jnp.full((2, 2), 1.5)}, {"kernel": adapter})["kernel"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    check_structure(params, lora, name="params")
    frozen = map_paths(lambda _, p, t: p if t is None or is_adapter(t) else None, params, lora)
    check_pair(frozen, lora)
    negative = map_paths(_negated, lora)
    return _merged(frozen, negative, _sum_donated if donate else _sum)


def _negated(path: str, trained: Any) -> Any:
    if not is_adapter(trained):
        return None
    if trained.magnitude is not None:
        raise ValueError(
            f"{path}: a DoRA merge sets the length of every column to its magnitude, so the base's own lengths are "
            "gone from params. Keep frozen, or load the base again."
        )
    return scale_update(trained, -1.0)


def _merged(frozen: Any, lora: Any, add: Callable[[Any, Adapter], Any]) -> Any:
    def join(_: str, weight: Any, trained: Any) -> Any:
        if is_adapter(trained):
            return rebox(weight, add(unbox(weight), trained))
        return jax.tree.map(jnp.asarray, weight if trained is None else trained)

    return map_paths(join, frozen, lora)


def _adapted(weight: Any, adapter: Adapter) -> Any:
    return from_adapter("", weight, adapter).dense()


_sum = jax.jit(_adapted)
_sum_donated = jax.jit(_adapted, donate_argnums=0)


@jax.jit
def _finite_merged(frozen: Any, lora: Any) -> dict[str, Any]:
    """Whether each merged parameter is finite, by path; no merged copy outlives the call."""
    params = {path: unbox(leaf) for path, leaf in flatten(_merged(frozen, lora, _adapted)).items() if leaf is not None}
    return {path: jnp.isfinite(x).all() for path, x in params.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _refuse_nonfinite(finite: dict[str, Any]) -> None:
    if any(isinstance(flag, Tracer) for flag in finite.values()):
        raise ValueError("check_finite=True reads values, which do not exist under jit: merge outside of jit.")
    bad = [path for path, flag in jax.device_get(finite).items() if not flag]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"Merging gives NaN or infinity at {', '.join(bad[:5])}{more}. The adapter diverged or the base "
            "already held such values; restore an earlier checkpoint. Nothing was changed."
        )
