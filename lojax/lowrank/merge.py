"""Merging an adapter into its weights and taking it out again.

The update is added in float32 (or wider) and cast once. In bfloat16 a merge still loses the part of the update that
is smaller than the rounding of the weight: train factored on a low-precision base, and keep ``frozen``. A merge that
quantizes the sum again loses more, often most of the update; `requantization_loss` says how much.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lojax.adapters.adapter import Adapter, is_adapter, scale_update
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.trees import check_pair, check_structure
from lojax.lowrank.frozen import frozen_weight
from lojax.lowrank.value import from_adapter
from lojax.quantized.quantized import Quantized, is_quantized, quantize_weight
from lojax.text import check_flags, spec
from lojax.types import Array, Leaf, Params, Path


def merge(
    frozen: Params, lora: Params, *, donate: bool = False, check_finite: bool = False, requantize: bool = False
) -> Params:
    """Plain parameters for the net: ``W0 + scale * a @ b`` at every adapted weight.

    A `tree_map` of a jitted sum, accumulated in float32 and cast once to the dtype of ``W0``. Weights are merged one
    after another, so only one float32 update exists at a time, and weights of equal shapes are compiled once. A
    quantized base gives plain arrays, unless ``requantize``.

    Args:
        frozen: The frozen tree.
        lora: The adapters and the parameters trained in full.
        donate: Reuse the buffers of ``frozen`` for the result; neither ``frozen`` nor the ``params`` it
            came from is then usable any more. Those of quantized weights are not reused.
        check_finite: Raise if a merged parameter has NaN or infinity, naming its path. Reads values,
            so not under `jit`.
        requantize: Keep quantized weights quantized, each in its own format: those with an adapter are quantized
            again after the update is added, which loses a share of it (see `requantization_loss`); the others stay
            as they are.

    Returns:
        A tree of the structure of ``params``, with nothing of lojax in it, or, with ``requantize``, nothing but
        quantized weights.

    Raises:
        TypeError: A flag is neither True nor False.
        ValueError: The trees do not fit together, a merged parameter is not finite, or ``requantize`` is asked for
            and ``frozen`` holds no quantized weight.

    >>> from lojax import Adapter
    >>> frozen = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    >>> adapter = Adapter(a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=0.5, axes=("in", "out"))
    >>> merge(frozen, {"kernel": adapter, "bias": None})["kernel"].tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    check_flags(donate=donate, check_finite=check_finite, requantize=requantize)
    pair = check_pair(frozen, lora)
    _refuse_codes(pair)
    _refuse_invocation(pair[1])
    if requantize and not any(is_quantized(unbox(leaf)) for leaf in pair[0].values()):
        raise ValueError(
            "requantize=True quantizes again what was quantized, and frozen holds no quantized weight. Leave it out, "
            "or quantize what merge returns with lojax.quantize."
        )
    if check_finite:  # before `donate` gives up the only copy
        _refuse_nonfinite(_finite_merge(frozen, lora))
    return _merge(frozen, lora, _sum_donated if donate else _sum, requantize=requantize)


def requantization_loss(frozen: Params, lora: Params) -> dict[Path, float]:
    """What share of each update ``merge(frozen, lora, requantize=True)`` loses.

    With ``D`` the dequantized weight, ``U`` its update and ``R`` the values of the weight that is quantized again, it
    is ``||D + U - R|| / ||U||`` in the Frobenius norm. ``D`` lies on the grid of its format, so of an update that is
    small against the steps of the grid little gets through: near 1, serve the adapter beside its base, or merge into
    float weights. Above 1, quantizing again does more harm than leaving the update out.

    Args:
        frozen: The frozen tree.
        lora: The adapters.

    Returns:
        The share by path, for each quantized weight with an adapter; 0 where the update is zero. Weights are taken
        one after another.

    Raises:
        ValueError: The trees do not fit together, or it is called under `jit`.

    >>> from lojax import Adapter, quantize
    >>> frozen = quantize({"kernel": jax.random.normal(jax.random.key(0), (64, 64))}, "nf4")
    >>> a, b = jax.random.normal(jax.random.key(1), (64, 2)), jax.random.normal(jax.random.key(2), (2, 64))
    >>> for scale in (0.001, 0.1, 10.0):
    ...     lora = {"kernel": Adapter(a, b, scale, axes=("in", "out"))}
    ...     print(f"{requantization_loss(frozen, lora)['kernel']:.1f}")
    1.1
    0.6
    0.1
    """
    weights, trained = check_pair(frozen, lora)
    shares = {}
    for path, adapter in trained.items():
        weight = unbox(weights[path])
        if is_adapter(adapter) and is_quantized(weight):
            share = _lost_share(weight, adapter)
            if isinstance(share, Tracer):
                raise ValueError(
                    "requantization_loss reads values, which do not exist under jit: call it outside of jit."
                )
            shares[path] = float(share)
    return shares


def _refuse_invocation(trained: dict[Path, Leaf]) -> None:
    for path, leaf in trained.items():
        if is_adapter(leaf) and leaf.invocation_tokens:
            raise ValueError(
                f"{path}: this adapter acts from its invocation tokens {leaf.invocation_tokens} on, and a merged "
                "weight acts on every token. Serve frozen and lora with model.apply(..., active=)."
            )


def _refuse_codes(pair: tuple[dict[Path, Leaf], dict[Path, Leaf]]) -> None:
    weights, trained = pair
    for path, leaf in trained.items():
        if is_adapter(leaf) and not jnp.issubdtype(unbox(weights[path]).dtype, jnp.floating):
            raise ValueError(
                f"{path}: holds codes ({spec(unbox(weights[path]))}) that the net dequantizes by itself, and an "
                "update cannot be added to codes. Serve frozen and lora with model.apply, or merge into the float "
                "weights."
            )


def unmerge(params: Params, lora: Params, *, donate: bool = False) -> Params:
    """The ``frozen`` tree that `merge` would turn into ``params``: ``W - scale * a @ b``.

    Exact up to the rounding of the weight's dtype. If you still have the base, use it instead.

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
    check_flags(donate=donate)
    check_structure(params, lora, name="params")
    frozen = map_paths(lambda _, p, t: p if t is None or is_adapter(t) else None, params, lora)
    check_pair(frozen, lora)
    negative = map_paths(_negate, lora)
    return _merge(frozen, negative, _sum_donated if donate else _sum)


def _negate(path: Path, trained: Leaf) -> Leaf:
    if not is_adapter(trained):
        return None
    if trained.magnitude is not None:
        raise ValueError(
            f"{path}: a DoRA merge sets the length of every column to its magnitude, so the base's own lengths are "
            "gone from params. Keep frozen, or load the base again."
        )
    return scale_update(trained, -1.0)


def _merge(
    frozen: Params, lora: Params, add: Callable[[Array | Quantized, Adapter], Array], *, requantize: bool = False
) -> Params:
    def join(_: Path, weight: Leaf, trained: Leaf) -> Leaf:
        stored = unbox(weight)
        if is_adapter(trained) and is_quantized(stored):
            # The buffers of codes cannot hold the sum, so there is nothing to donate.
            plain_add = _sum if add is _sum_donated else add
            return rebox(weight, (_requantized_sum if requantize else plain_add)(stored, trained))
        if is_adapter(trained):
            return rebox(weight, add(stored, trained))
        if trained is None and is_quantized(stored):
            return weight if requantize else rebox(weight, stored.dense())
        return jax.tree.map(jnp.asarray, weight if trained is None else trained)

    return map_paths(join, frozen, lora)


def _add_update(weight: Array | Quantized, adapter: Adapter) -> Array:
    return from_adapter("", frozen_weight(weight), adapter).dense()


# At module level, so that the compiled sums outlive a call: merging again compiles nothing.
_sum = jax.jit(_add_update)
_sum_donated = jax.jit(_add_update, donate_argnums=0)


@jax.jit
def _requantized_sum(weight: Quantized, adapter: Adapter) -> Quantized:
    return quantize_weight(_add_update(weight, adapter), weight.format)


@jax.jit
def _lost_share(weight: Quantized, adapter: Adapter) -> Array:
    # Each in the dtype of the weight: what this rounds away, a merge into float weights loses as well.
    before, after = weight.dense(), _add_update(weight, adapter)
    again = _requantized_sum(weight, adapter).dense()
    lost, update = (jnp.linalg.norm(x.astype(jnp.float32).reshape(-1)) for x in (after - again, after - before))
    return jnp.where(update > 0, lost / jnp.where(update > 0, update, 1), 0)


@jax.jit
def _finite_merge(frozen: Params, lora: Params) -> dict[Path, Array]:
    """Whether each merged parameter is finite, by path. One jit, so that no merged copy leaves it."""
    leaves = flatten(_merge(frozen, lora, _add_update))
    params = {path: unbox(leaf) for path, leaf in leaves.items() if leaf is not None}
    return {path: jnp.isfinite(x).all() for path, x in params.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _refuse_nonfinite(finite: dict[Path, Array]) -> None:
    if any(isinstance(flag, Tracer) for flag in finite.values()):
        raise ValueError("check_finite=True reads values, which do not exist under jit: merge outside of jit.")
    bad = [path for path, flag in jax.device_get(finite).items() if not flag]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"Merging gives NaN or infinity at {', '.join(bad[:5])}{more}. The adapter diverged or the base "
            "already held such values; restore an earlier checkpoint. Nothing was changed."
        )
