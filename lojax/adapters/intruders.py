"""Intruder dimensions: strong directions of an adapted weight that its base did not have. `tame` weakens them.

Shuttleworth et al. 2024, arXiv:2410.21228.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.algebra import refuse_variant
from lojax.adapters.matrices import factor_matrices, with_factors
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import map_paths
from lojax.adapters.rule import is_finite, is_integer
from lojax.adapters.single_matrices import host_array, single_adapters, single_weight
from lojax.adapters.spectrum import out_directions, share_evenly, thin_svd
from lojax.adapters.trees import check_pair
from lojax.adapters.truncation import refuse_moved
from lojax.quantized.quantized import dense
from lojax.text import spec
from lojax.types import Leaf, Params, Path

TOP = 10
"""How many directions are searched for intruders: the ``k`` of the paper, and PEFT's default."""
THRESHOLD = 0.5
"""The cosine below which a direction is an intruder: ``epsilon`` there."""


def tame(frozen: Params, lora: Params, *, top: int = TOP, threshold: float = THRESHOLD, keep: float = 0.75) -> Params:
    """The adapter with its intruder dimensions weakened, which gives back some of what the base knew.

    PEFT's ``reduce_intruder_dimension``: among the ``top`` directions ``sigma u v^T`` of ``W0 + dW``, those whose
    output side ``v`` has a cosine below ``threshold`` with every one of ``W0`` are intruders (Shuttleworth et al. 2024,
    arXiv:2410.21228, algorithm 1). Of each the share ``keep`` stays (there section 5): the update becomes
    ``dW - (1 - keep) sum sigma u v^T``, and what is nearest to it of the old rank. Matrix by matrix, on the host. PEFT
    looks at the side of the inputs where torch keeps a weight as ``[in, out]`` (embeddings, GPT-2's Conv1D).

    Args:
        frozen: The frozen tree, its weights quantized or not.
        lora: The ``lora`` tree.
        top: How many directions are searched.
        threshold: The cosine below which a direction is an intruder.
        keep: The share of an intruder that stays, from 0 to 1. Less of it forgets less and does the task less well.

    Returns:
        A ``lora`` tree of the same structure, ranks and scales. Weights without intruders keep their adapter as it is.
        `lojax.analyze` counts the intruders, before and after.

    Raises:
        ValueError: The trees do not fit together; an adapter is of another variant, or its start was taken out of the
            weight; a weight cannot be read; an argument is out of range; or it is called under `jit`.

    >>> import lojax
    >>> base, direction = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0])), jnp.ones((4, 1)) / 2
    >>> lora = {"w": Adapter(10 * direction, direction.T, scale=1.0, axes=("in", "out"))}
    >>> tamed = tame({"w": base}, lora, threshold=0.7, keep=0.5)
    >>> [lojax.analyze({"w": base}, x, threshold=0.7).rows[0].norm for x in (lora, tamed)]  # doctest: +ELLIPSIS
    [10.0, 3.8...]
    """
    for name, value in (("threshold", threshold), ("keep", keep)):
        if not is_finite(value) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r}; expected a number between 0 and 1.")
    if not is_integer(top) or top < 1:
        raise ValueError(f"top={top!r}; expected an integer of at least 1.")
    weights, _ = check_pair(frozen, lora)

    def tame_at(path: Path, leaf: Leaf) -> Leaf:
        if not is_adapter(leaf):
            return leaf
        weight = unbox(weights[path])
        _check(path, leaf, weight)
        values = dense(weight)
        a, b = (host_array(path, factor).copy() for factor in factor_matrices(leaf))
        changed = False
        for i, (index, single) in enumerate(single_adapters(path, leaf)):
            w, rank = single_weight(path, values, leaf.axes, index), single.rank
            factors = _weaken(w, single.a.astype(np.float64), single.b, top, threshold, keep)
            if factors is not None:
                scale = leaf.scale[i] if isinstance(leaf.scale, tuple) else leaf.scale
                a[i, :, :rank], b[i, :rank] = share_evenly(*factors, scale)
                changed = True
        if not changed:
            return leaf
        return dataclasses.replace(with_factors(leaf, jnp.asarray(a), jnp.asarray(b), 1.0), scale=leaf.scale)

    return map_paths(tame_at, lora)


def direction_cosines(
    base_vectors: np.ndarray, w: np.ndarray, top: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """How near each of the top directions of a matrix comes to any direction of its base.

    Args:
        base_vectors: ``[n, p]``, the singular vectors of the base on the side of the outputs.
        w: ``[m, n]``, base and update.
        top: How many of its directions.

    Returns:
        The largest ``|cos|`` of each, ``[top]``, and these directions as ``(s, v)``: ``[top]`` and ``[n, top]``. An
        intruder dimension is one whose cosine is small (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1).
    """
    s, v = out_directions(w)
    s, v = s[:top], v[:, :top]
    cosines = np.abs(base_vectors.T @ v)
    return cosines.max(0, initial=0.0), (s, v)


def _weaken(
    w: np.ndarray, a: np.ndarray, b: np.ndarray, top: int, threshold: float, keep: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The update ``a @ b`` of ``w`` with less of its intruders, decomposed and of the same rank; None without any."""
    _, base_vectors = out_directions(w)
    merged = w + a @ b
    cosines, (_, v) = direction_cosines(base_vectors, merged, top)
    intruders = v[:, cosines < threshold]
    if not intruders.shape[1]:
        return None
    # sigma u = (W0 + dW) v, so the correction is a product of as many columns as there are intruders.
    left = np.concatenate([a, (keep - 1) * (merged @ intruders)], 1)
    u, s, vt = thin_svd(left, np.concatenate([b, intruders.T], 0))
    rank = a.shape[1]
    return u[:, :rank], s[:rank], vt[:rank]


def _check(path: Path, adapter: Adapter, weight: Leaf) -> None:
    refuse_variant(path, adapter)
    refuse_moved(path, adapter)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{path}: holds codes ({spec(weight)}) that the net dequantizes by itself, and to find intruders their "
            "values are needed. Pass the float weights as frozen."
        )
