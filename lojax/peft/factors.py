"""Between the factors of an adapter and the tensors of PEFT: orientation, heads, stacks, parts, experts.

Letters: ``m`` in, ``n`` out, ``r`` rank, ``E`` experts. A *cell* is the update of one torch parameter in
JAX order: ``a`` ``[*expert, *in, r]``, ``b`` ``[*expert, r, *out]``, and DoRA's magnitude ``[*out]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import positions
from lojax.adapters.matrices import at_least_float32
from lojax.adapters.metadata import unbox
from lojax.peft import magnitudes
from lojax.peft.name_map import Slot, roles

RANK = "r"


@dataclasses.dataclass(frozen=True)
class Cell:
    """The update ``scale * a @ b`` of one torch parameter, and its magnitude where it is a DoRA one."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The rank ``r``."""
        return self.a.shape[-1]


def weight_shape(adapter: Adapter) -> tuple[int, ...]:
    """The shape of the weight that an adapter fits.

    >>> weight_shape(Adapter(np.ones((5, 2)), np.ones((2, 3, 4)), 1.0, ("in", "out", "out")))
    (5, 3, 4)
    """
    a, b = unbox(adapter.a).shape, unbox(adapter.b).shape
    stack, ins, outs = (positions(adapter.axes, role) for role in ("stack", "in", "out"))
    sizes = dict(zip((*stack, *ins), a, strict=False)) | dict(zip(outs, b[len(stack) + 1 :], strict=False))
    return tuple(sizes[i] for i in range(len(adapter.axes)))


def sizes(slot: Slot, role: str) -> tuple[int, ...]:
    """The sizes of the axes with this role, of this slot's part of the leaf."""
    assert slot.axes is not None
    found = []
    for axis, here in enumerate(slot.axes):
        part = slot.entry.get(axis)
        if here == role and not isinstance(part, int):
            found.append(part.stop - part.start if isinstance(part, slice) else slot.shape[axis])
    return tuple(found)


def torch_shapes(slot: Slot, rank: int, *, exchanged: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of PEFT's A and B for a slot, with ``rank`` for one expert.

    ``exchanged``: with in and out exchanged, as PEFT before 0.19 had them for experts ``[E, out, in]``.
    """
    roles(slot)
    ins, outs = sizes(slot, "in"), sizes(slot, "out")
    if exchanged and slot.kind == "experts":
        ins, outs = outs, ins
    if slot.kind == "conv":
        *window, features = ins
        return (rank, features, *window), (*outs, rank, *[1] * len(window))
    experts = math.prod(sizes(slot, "expert"))
    return (experts * rank, math.prod(ins)), (math.prod(outs), rank * experts)


def cell_to_torch(slot: Slot, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B (see `torch_shapes`) of a cell."""
    r = cell.rank
    if slot.kind == "conv":
        window = cell.a.ndim - 2
        a = cell.a.transpose(window + 1, window, *range(window))
        return a, cell.b.T.reshape(*cell.b.T.shape, *[1] * window)
    experts = math.prod(sizes(slot, "expert")) if slot.axes else 1
    a, b = cell.a.reshape(experts, -1, r), cell.b.reshape(experts, r, -1)
    return a.transpose(0, 2, 1).reshape(experts * r, -1), b.transpose(2, 1, 0).reshape(-1, r * experts)


def cell_from_torch(
    slot: Slot,
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    *,
    magnitude: np.ndarray | None = None,
    exchanged: bool = False,
) -> Cell:
    """The cell of PEFT's A and B (see `torch_shapes`) and magnitude; their shapes are already checked."""
    if magnitude is not None:
        magnitude = magnitude.reshape(sizes(slot, "out"))
    if slot.kind == "conv":
        window = a.ndim - 2
        return Cell(a.transpose(*range(2, window + 2), 1, 0), b.reshape(b.shape[:2]).T, scale, magnitude)
    experts = sizes(slot, "expert")
    count = math.prod(experts)
    r = a.shape[0] // count
    a, b = (
        a.reshape(count, r, -1).transpose(0, 2, 1),
        b.reshape(-1, r, count).transpose(2, 1, 0),
    )  # [E, m, r], [E, r, n]
    if exchanged:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    a, b = a.reshape(*experts, *sizes(slot, "in"), r), b.reshape(*experts, r, *sizes(slot, "out"))
    return Cell(a, b, scale, magnitude)


def read_cell(slot: Slot, adapter: Adapter) -> Cell | None:
    """The cell of one slot out of the adapter of its leaf; None where its entry of the stack has rank 0.

    Where the adapter has one update across modules that torch keeps apart (a fused kernel adapted as one),
    each module gets its part of it: they share ``a`` (or ``b``). Ranks that differ among the experts of one torch
    parameter become the largest of them. A magnitude that trains on an entry of rank 0 gets factors of zeros beside
    it, of rank 1: there is no magnitude without them.

    Raises:
        ValueError: The adapter's axes contradict the map's, or its magnitude is not one that PEFT has.
    """
    stack, ins, outs = (positions(adapter.axes, role) for role in ("stack", "in", "out"))
    if stack:
        roles(slot)  # raises if the map says nothing of stacks
    rank, scale, factor = _entry_settings(slot, adapter, stack)
    if not rank and adapter.magnitude is None:
        return None
    a, a_dims = _take(np.asarray(unbox(adapter.a)), [*stack, *ins, RANK], slot)
    b, b_dims = _take(np.asarray(unbox(adapter.b)), [*stack, RANK, *outs], slot)
    experts = b_dims.index(RANK)
    kept = slice(max(rank, 1))
    a, b = a[..., kept], b[(slice(None),) * experts + (kept,)]
    if isinstance(factor, np.ndarray):
        b = b * factor.reshape(*factor.shape, *[1] * (b.ndim - experts)).astype(b.dtype)
    magnitude = None
    if adapter.magnitude is not None:
        magnitude, _ = _take(np.asarray(unbox(adapter.magnitude)), [*stack, *outs], slot)
        _check_magnitude(slot, adapter)
    cell = Cell(a, b, scale, magnitude)
    if slot.axes is None:
        return cell
    expected = [_left(slot, "in"), _left(slot, "out")]
    got = [[d for d in dims if d != RANK and d not in _left(slot, "expert")] for dims in (a_dims, b_dims)]
    if got == expected:
        return cell
    if got == expected[::-1] and magnitude is None:  # adapted from the other end, as a tied head is
        return Cell(np.moveaxis(b, experts, -1), np.moveaxis(a, -1, experts), scale)
    raise ValueError(
        f"{slot.path}: the adapter has axes {adapter.axes}, the name rule {slot.text!r} says {slot.axes}. "
        "Correct the rule, or adapt the weight with axes= as the rule says."
    )


def _entry_settings(slot: Slot, adapter: Adapter, stack: tuple[int, ...]) -> tuple[int, float, np.ndarray | float]:
    """The rank and scale of a slot, and what each of its experts has on top of the scale."""
    lengths = unbox(adapter.a).shape[: len(stack)]
    at = tuple(slot.entry.get(i, slice(None)) for i in stack)
    ranks = np.broadcast_to(np.reshape(adapter.ranks or adapter.rank, lengths if adapter.ranks else ()), lengths)[at]
    if not isinstance(adapter.scale, tuple):
        return int(np.max(ranks)), adapter.scale, 1.0
    scales = np.reshape(adapter.scale, lengths)[at]
    scale = next((float(s) for s, r in zip(np.ravel(scales), np.ravel(ranks), strict=True) if r and s), 1.0)
    return int(np.max(ranks)), scale, scales / scale if np.ndim(scales) else 1.0


def _check_magnitude(slot: Slot, adapter: Adapter) -> None:
    magnitudes.check_parts(slot)
    if slot.kind in ("experts", "experts_t"):
        raise ValueError(
            f"{slot.path}: the adapter is a DoRA one, and PEFT has no DoRA on parameters such as {slot.name}. "
            "Use plain LoRA for it."
        )


def _left(slot: Slot, role: str) -> list[int]:
    assert slot.axes is not None
    return [i for i, r in enumerate(slot.axes) if r == role and not isinstance(slot.entry.get(i), int)]


def _take(array: np.ndarray, dims: list[Any], slot: Slot) -> tuple[np.ndarray, list[Any]]:
    array = array[tuple(slot.entry.get(d, slice(None)) if d != RANK else slice(None) for d in dims)]
    return array, [d for d in dims if d == RANK or not isinstance(slot.entry.get(d), int)]


def assemble(cells: Sequence[tuple[Slot, Cell]], dtype: Any, leaf: Any = None) -> Adapter:
    """The adapter of one leaf, of numpy arrays, from the cells of its torch parameters.

    Each entry of a stack keeps its rank and scale: 0 where it has no cell; what is above its rank is zeros.
    Parts side by side along one axis become blocks, so the rank is the sum of theirs; where their scales differ
    the difference goes into ``b``.

    Args:
        cells: What the file holds.
        dtype: Of the arrays.
        leaf: The weight; see `magnitudes.joined`.
    """
    slot = cells[0][0]
    axes = roles(slot)
    stack, ins, outs = (positions(axes, role) for role in ("stack", "in", "out"))
    groups: dict[tuple[Any, ...], list[tuple[Slot, Cell]]] = {}  # by entry of the stack
    for one, cell in cells:
        groups.setdefault(tuple(one.entry.get(i) for i in stack), []).append((one, cell))
    shape = slot.shape
    ranks, scales = np.zeros([shape[i] for i in stack], int), np.ones([shape[i] for i in stack])
    for group in groups.values():
        at = _index(group[0][0], stack)
        ranks[at] = sum(cell.rank for _, cell in group)
        scales[at] = next((cell.scale for _, cell in group if cell.scale), 0.0)
    rank = int(np.max(ranks))
    a = np.zeros((*(shape[i] for i in (*stack, *ins)), rank), dtype)
    b = np.zeros((*(shape[i] for i in stack), rank, *(shape[i] for i in outs)), dtype)
    for group in groups.values():
        start, scale = 0, next((cell.scale for _, cell in group if cell.scale), 0.0)
        for one, cell in group:
            within = slice(start, start + cell.rank)
            a[(*_index(one, (*stack, *ins)), within)] = cell.a
            factor = 1.0 if cell.scale == scale else cell.scale / scale
            b[(*_index(one, stack), within, *_index(one, outs))] = cell.b * np.asarray(factor, cell.b.dtype)
            start += cell.rank
    measured = [(one, cell.magnitude) for one, cell in cells if cell.magnitude is not None]
    magnitude = magnitudes.joined(measured, axes, leaf, at_least_float32(dtype)) if measured else None
    return Adapter(a, b, _common(scales, ranks), axes, magnitude=magnitude, ranks=_uneven(ranks))


def _index(slot: Slot, axes: Sequence[int]) -> tuple[Any, ...]:
    return tuple(slot.entry.get(i, slice(None)) for i in axes)


def _uneven(ranks: np.ndarray) -> tuple[int, ...] | None:
    each = tuple(ranks.ravel().tolist())
    return each if len(set(each)) > 1 else None


def _common(scales: np.ndarray, ranks: np.ndarray) -> float | tuple[float, ...]:
    """One scale where all entries with a rank share it, else one for each entry."""
    used = set(scales[ranks > 0].tolist())
    return used.pop() if len(used) == 1 else tuple(scales.ravel().tolist())


# --- parameters saved in full ---


def full_order(slot: Slot) -> tuple[int, ...]:
    """The order in which torch has the axes that are left of the leaf's after taking the entry."""
    left = [i for i in range(len(slot.shape)) if not isinstance(slot.entry.get(i), int)]
    if slot.kind == "param" or len(left) < 2:
        return tuple(range(len(left)))
    axes = roles(slot) and slot.axes
    assert axes is not None
    experts, ins, outs = ([k for k, i in enumerate(left) if axes[i] == role] for role in ("expert", "in", "out"))
    if slot.kind == "conv":
        return (*outs, ins[-1], *ins[:-1])
    return (*experts, *ins, *outs) if slot.kind in ("conv1d", "embedding", "experts_t") else (*experts, *outs, *ins)


def full_shape(slot: Slot) -> tuple[int, ...]:
    """The shape of the torch parameter of a slot."""
    if slot.kind == "param" or slot.axes is None or slot.kind == "conv":
        piece = [slot.shape[i] for i in range(len(slot.shape)) if not isinstance(slot.entry.get(i), int)]
        return tuple(piece[k] for k in full_order(slot))
    experts, ins, outs = (sizes(slot, role) for role in ("expert", "in", "out"))
    flat = [math.prod(group) for group in (ins, outs) if group]
    if slot.kind not in ("conv1d", "embedding", "experts_t"):
        flat.reverse()
    return (*experts, *flat)


def full_index(slot: Slot) -> tuple[Any, ...]:
    """The index of a slot's part in its leaf."""
    return tuple(slot.entry.get(i, slice(None)) for i in range(len(slot.shape)))


def full_to_torch(slot: Slot, leaf: np.ndarray) -> np.ndarray:
    """The torch parameter of a slot out of its whole leaf."""
    return leaf[full_index(slot)].transpose(full_order(slot)).reshape(full_shape(slot))


def full_from_torch(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """A slot's part of its leaf, from the torch parameter, of checked shape."""
    order = full_order(slot)
    piece = np.empty(slot.shape, np.bool_)[full_index(slot)].shape
    return tensor.reshape([piece[k] for k in order]).transpose(np.argsort(order))
