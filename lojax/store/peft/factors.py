"""Between the factors of an adapter and the tensors of PEFT: orientation, heads, stacks, parts, experts.

Letters: ``m`` in, ``n`` out, ``r`` rank, ``E`` experts. A *cell* is the update of one torch parameter in
JAX order: ``a`` ``[*expert, *in, r]`` and ``b`` ``[*expert, r, *out]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lojax.adapt.adapter import Adapter
from lojax.adapt.axes import Axes, positions
from lojax.adapt.boxes import unbox
from lojax.store.peft.namemap import Slot

RANK = "r"


@dataclasses.dataclass(frozen=True)
class Cell:
    """The update ``scale * a @ b`` of one torch parameter."""

    a: np.ndarray
    b: np.ndarray
    scale: float

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


def roles(slot: Slot) -> Axes:
    """The axes of an adapter for the leaf of ``slot``.

    Raises:
        ValueError: The map does not say, and the leaf is no matrix.
    """
    if slot.axes is None:
        raise ValueError(
            f"{slot.path} has shape {slot.shape}, and the name rule {slot.text!r} does not say which axes are in "
            "and out. Spell them, as in kernel[in, out, out]."
        )
    return tuple("stack" if role == "expert" else role for role in slot.axes)  # type: ignore[return-value]


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


def cell_from_torch(slot: Slot, a: np.ndarray, b: np.ndarray, scale: float, *, exchanged: bool = False) -> Cell:
    """The cell of PEFT's A and B (see `torch_shapes`); their shapes are already checked."""
    if slot.kind == "conv":
        window = a.ndim - 2
        return Cell(a.transpose(*range(2, window + 2), 1, 0), b.reshape(b.shape[:2]).T, scale)
    experts = sizes(slot, "expert")
    count = math.prod(experts)
    r = a.shape[0] // count
    a, b = (
        a.reshape(count, r, -1).transpose(0, 2, 1),
        b.reshape(-1, r, count).transpose(2, 1, 0),
    )  # [E, m, r], [E, r, n]
    if exchanged:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    return Cell(a.reshape(*experts, *sizes(slot, "in"), r), b.reshape(*experts, r, *sizes(slot, "out")), scale)


def read_cell(slot: Slot, adapter: Adapter) -> Cell:
    """The cell of one slot out of the adapter of its leaf.

    Where the adapter has one update across modules that torch keeps apart (a fused kernel adapted as one),
    each module gets its part of it: they share ``a`` (or ``b``).

    Raises:
        ValueError: The adapter's axes contradict the map's, or it is of a variant that PEFT files are not made of here.
    """
    if adapter.extras:
        raise ValueError(f"{slot.path}: the adapter holds {adapter.extras[0]}, which lojax cannot write as PEFT yet.")
    stack, ins, outs = (positions(adapter.axes, role) for role in ("stack", "in", "out"))
    a, a_dims = _take(np.asarray(unbox(adapter.a)), [*stack, *ins, RANK], slot)
    b, b_dims = _take(np.asarray(unbox(adapter.b)), [*stack, RANK, *outs], slot)
    if slot.axes is None:
        return Cell(a, b, adapter.one_scale)
    expected = [_left(slot, "in"), _left(slot, "out")]
    experts = _left(slot, "expert")
    got = [[d for d in dims if d != RANK and d not in experts] for dims in (a_dims, b_dims)]
    if got == expected:
        return Cell(a, b, adapter.one_scale)
    if got == expected[::-1]:  # adapted from the other end, as a tied head is
        k = len(experts)
        return Cell(np.moveaxis(b, k, -1), np.moveaxis(a, -1, k), adapter.one_scale)
    raise ValueError(
        f"{slot.path}: the adapter has axes {adapter.axes}, the name rule {slot.text!r} says {slot.axes}. "
        "Correct the rule, or adapt the weight with axes= as the rule says."
    )


def _left(slot: Slot, role: str) -> list[int]:
    assert slot.axes is not None
    return [i for i, r in enumerate(slot.axes) if r == role and not isinstance(slot.entry.get(i), int)]


def _take(array: np.ndarray, dims: list[Any], slot: Slot) -> tuple[np.ndarray, list[Any]]:
    array = array[tuple(slot.entry.get(d, slice(None)) if d != RANK else slice(None) for d in dims)]
    return array, [d for d in dims if d == RANK or not isinstance(slot.entry.get(d), int)]


def assemble(cells: Sequence[tuple[Slot, Cell]], dtype: Any) -> tuple[np.ndarray, np.ndarray, float, Axes]:
    """``a``, ``b``, scale and axes of the adapter of one leaf, from the cells of its torch parameters.

    Entries of a stack that have no cell, and ranks below the largest, are filled with zeros: no update.
    Parts side by side along one axis become blocks, so the rank is the sum of theirs. Where scales differ
    the difference goes into ``b``.
    """
    slot = cells[0][0]
    axes = roles(slot)
    groups: dict[tuple[Any, ...], list[tuple[Slot, Cell]]] = {}
    for one, cell in cells:
        key = tuple((i, e) for i, e in sorted(one.entry.items()) if isinstance(e, int))
        groups.setdefault(key, []).append((one, cell))
    rank = max(sum(cell.rank for _, cell in group) for group in groups.values())
    stack, ins, outs = (positions(axes, role) for role in ("stack", "in", "out"))
    shape = slot.shape
    a = np.zeros((*(shape[i] for i in (*stack, *ins)), rank), dtype)
    b = np.zeros((*(shape[i] for i in stack), rank, *(shape[i] for i in outs)), dtype)
    scale = next((cell.scale for _, cell in cells if cell.scale), 0.0)
    for group in groups.values():
        start = 0
        for one, cell in group:
            at: dict[Any, Any] = {**one.entry, RANK: slice(start, start + cell.rank)}
            a[tuple(at.get(d, slice(None)) for d in (*stack, *ins, RANK))] = cell.a
            factor = 1.0 if cell.scale == scale else cell.scale / scale
            b[tuple(at.get(d, slice(None)) for d in (*stack, RANK, *outs))] = cell.b * np.asarray(factor, cell.b.dtype)
            start += cell.rank
    return a, b, scale, axes


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
