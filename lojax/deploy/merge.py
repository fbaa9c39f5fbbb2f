"""Merging an adapter into its weights and taking it out again.

The update is added in float32 (or wider) and cast once. In bfloat16 a merge still loses what falls
below the weight's own rounding: train factored on a low-precision base, and keep ``frozen``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapt.adapter import is_adapter
from lojax.adapt.boxes import rebox, unbox
from lojax.adapt.paths import flatten, map_paths
from lojax.adapt.tree import check_pair
from lojax.execute.lowrank import from_adapter


def merge(frozen: Any, lora: Any, *, donate: bool = False, check_finite: bool = False) -> Any:
    """Plain parameters for the net: ``W0 + scale * a @ b`` at every adapted weight.

    A jitted `tree_map`; float32 accumulation, one cast to the dtype of ``W0``.

    Args:
        frozen: The frozen tree.
        lora: The adapters and the parameters trained in full.
        donate: Reuse the buffers of ``frozen`` for the result; ``frozen`` is then no longer usable.
        check_finite: Raise if a merged weight holds NaN or infinity, naming its path.

    Returns:
        A tree of the structure of ``params``, with nothing of lojax in it.

    Raises:
        ValueError: The trees do not fit together, or a merged weight is not finite.
    """
    check_pair(frozen, lora)
    if check_finite and donate:
        _refuse_nonfinite(_merge_kept(frozen, lora))  # before the only copy is given away
    merged = (_merge_donated if donate else _merge_kept)(frozen, lora)
    if check_finite and not donate:
        _refuse_nonfinite(merged)
    return merged


def unmerge(params: Any, lora: Any, *, donate: bool = False) -> Any:
    """The ``frozen`` tree that `merge` would turn into ``params``: ``W - scale * a @ b``.

    Exact to the rounding of the weight's dtype; where the base is at hand, keep it instead.

    Args:
        params: Merged parameters.
        lora: The adapters that were merged.
        donate: Reuse the buffers of ``params``.
    """
    frozen = map_paths(lambda _, p, t: p if t is None or is_adapter(t) else None, params, lora)
    check_pair(frozen, lora)
    negative = map_paths(_negated, lora)
    return (_merge_donated if donate else _merge_kept)(frozen, negative, full=False)


def _negated(path: str, trained: Any) -> Any:
    return dataclasses.replace(trained, scale=-trained.scale) if is_adapter(trained) else None


def _merged(frozen: Any, lora: Any, full: bool = True) -> Any:
    def join(path: str, weight: Any, trained: Any) -> Any:
        if is_adapter(trained):
            return rebox(weight, from_adapter(path, unbox(weight), trained).dense())
        return trained if trained is not None and full else weight

    return map_paths(join, frozen, lora)


_merge_kept = functools.partial(jax.jit, static_argnames="full")(_merged)
_merge_donated = functools.partial(jax.jit, static_argnames="full", donate_argnums=0)(_merged)


@jax.jit
def _all_finite(params: Any) -> Any:
    leaves = {path: unbox(leaf) for path, leaf in flatten(params).items() if leaf is not None}
    return {path: jnp.isfinite(x).all() for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _refuse_nonfinite(params: Any) -> None:
    bad = [path for path, finite in _all_finite(params).items() if not bool(finite)]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"Merging gives NaN or infinity at {', '.join(bad[:5])}{more}. The adapter diverged or the base "
            "already held such values; restore an earlier checkpoint. Nothing was changed."
        )
