"""DoRA's magnitude between an adapter, ``[*stack, *out]``, and PEFT's tensor for each torch module.

PEFT scales every output: ``w' = m * (w + s b a) / |w + s b a|``, the length taken over all axes but out and held
constant in the backward pass (Liu et al. 2024, arXiv:2402.09353, eq. 5 and 11): as here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import Axes, positions
from lojax.adapters.matrices import column_squares
from lojax.adapters.metadata import unbox
from lojax.peft.name_map import Slot, roles


def torch_shape(slot: Slot, outs: Sequence[int]) -> tuple[int, ...]:
    """The shape of PEFT's ``lora_magnitude_vector`` for out axes of these sizes.

    >>> torch_shape(Slot("conv.weight", "conv", "w", (3, 3, 2, 8), ("in", "in", "in", "out"), {}, ""), (8,))
    (1, 8, 1, 1)
    """
    window = slot.axes.count("in") - 1 if slot.kind == "conv" and slot.axes else 0
    return (1, math.prod(outs), *[1] * window) if window else (math.prod(outs),)


def check_parts(slot: Slot) -> None:
    """Raises where the slot is a part along an in axis: its columns are only pieces of those that DoRA measures."""
    for axis, part in slot.entry.items():
        if isinstance(part, slice) and slot.axes is not None and slot.axes[axis] == "in":
            raise ValueError(
                f"{slot.path}: the name rule {slot.text!r} has {slot.module} as a part along the in axis {axis}, and "
                "DoRA takes the length of whole columns, across all parts. Keep the parts in leaves of their own, or "
                "use plain LoRA."
            )


def check_alike(adapters: Mapping[str, Adapter]) -> None:
    """Raises where some updates have a magnitude and some have none, or PEFT has none for their kind.

    ``adapters``: those with factors, by path.
    """
    dora = [path for path, adapter in adapters.items() if adapter.magnitude is not None]
    plain = [path for path in adapters if path not in dora]
    if dora and plain:
        raise ValueError(
            f"PEFT has one use_dora for all adapters; {len(dora)} of these are DoRA ({dora[0]}) and {len(plain)} are "
            f"not ({plain[0]}). Use one variant for all, or save two adapters."
        )


def joined(entries: Sequence[tuple[Slot, np.ndarray]], axes: Axes, leaf: Any, dtype: Any) -> np.ndarray:
    """The magnitude of a leaf from those of its torch modules.

    Args:
        entries: Each slot with its ``[*out]``.
        axes: The axes of the leaf.
        leaf: The weight. Columns of modules without an adapter keep its own lengths, so that they stay as they are.
        dtype: Of the result.

    Raises:
        ValueError: A module is a part along an in axis, or there are such columns and ``leaf`` has only a shape.
    """
    slot = entries[0][0]
    dims = [*positions(axes, "stack"), *positions(axes, "out")]
    found = np.full([slot.shape[i] for i in dims], np.nan, np.float32)
    for one, magnitude in entries:
        check_parts(one)
        found[tuple(one.entry.get(i, slice(None)) for i in dims)] = magnitude
    missing = np.isnan(found)
    if missing.any():
        lengths = _lengths(leaf, axes)
        if lengths is None:
            raise ValueError(
                f"{slot.path}: only {len(entries)} of its modules are DoRA adapted, so the lengths of the other "
                "columns must come from the base; pass its arrays, not shapes."
            )
        found = np.where(missing, lengths, found)
    return found.astype(dtype)


def is_of_base(slot: Slot, magnitude: np.ndarray, leaf: Any) -> bool:
    """Whether a magnitude ``[*out]`` is the lengths of the base's own columns, to rounding; no if those are unknown."""
    lengths = _lengths(leaf, roles(slot))
    if lengths is None:
        return False
    dims = [*positions(roles(slot), "stack"), *positions(roles(slot), "out")]
    base = lengths[tuple(slot.entry.get(i, slice(None)) for i in dims)]
    return np.allclose(np.asarray(magnitude, np.float32), base, rtol=max(1e-6, float(jnp.finfo(magnitude.dtype).eps)))


def _lengths(leaf: Any, axes: Axes) -> np.ndarray | None:
    """The length of each column of a weight, ``[*stack, *out]``; None where it is only a shape."""
    weight = unbox(leaf)
    if not hasattr(weight, "__array__"):
        return None
    return np.sqrt(np.asarray(column_squares(jnp.asarray(weight), axes), np.float32))
