"""The factors of an adapter as PEFT's tensors A and B, and back: orientation, heads, stacks, parts, experts.

Letters: ``m`` in, ``n`` out, ``r`` rank, ``E`` experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import positions
from lojax.adapters.metadata import unbox
from lojax.peft.name_map import TorchParameter, group_by
from lojax.types import Dtype, Shape

RANK = "r"
"""Stands for the rank where the axes of a factor are listed."""


@dataclasses.dataclass(frozen=True)
class TorchUpdate:
    """The update ``scale * a @ b`` of one torch parameter, in the order of JAX.

    Attributes:
        a: ``[*expert, *in, r]``.
        b: ``[*expert, r, *out]``.
        scale: The LoRA scale.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """The rank ``r``."""
        return self.a.shape[-1]

    @property
    def is_zero(self) -> bool:
        """Whether both factors are zero, as they are in entries of a stack without an adapter."""
        return not self.a.any() and not self.b.any()


def torch_shapes(parameter: TorchParameter, rank: int, *, exchanged: bool = False) -> tuple[Shape, Shape]:
    """The shapes of PEFT's A and B for a parameter, with ``rank`` for one expert.

    ``exchanged``: with in and out exchanged, as PEFT before 0.19 had them for experts ``[E, out, in]``.
    """
    ins, outs = parameter.sizes("in"), parameter.sizes("out")
    if exchanged and parameter.kind == "experts":
        ins, outs = outs, ins
    if parameter.kind == "conv":
        *window, features = ins
        return (rank, features, *window), (*outs, rank, *[1] * len(window))
    experts = math.prod(parameter.sizes("expert"))
    return (experts * rank, math.prod(ins)), (math.prod(outs), rank * experts)


def rank_in_file(parameter: TorchParameter, shape: Shape) -> int:
    """The rank that a tensor A of this shape has, for one expert; 0 where it has none."""
    experts = math.prod(parameter.sizes("expert")) if parameter.is_experts else 1
    return shape[0] // experts if shape and experts else 0


def to_torch(parameter: TorchParameter, update: TorchUpdate) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B (see `torch_shapes`) of an update."""
    r = update.rank
    if parameter.kind == "conv":
        window = update.a.ndim - 2
        a = update.a.transpose(window + 1, window, *range(window))
        return a, update.b.T.reshape(*update.b.T.shape, *[1] * window)
    experts = math.prod(parameter.sizes("expert")) if parameter.axes else 1
    a, b = update.a.reshape(experts, -1, r), update.b.reshape(experts, r, -1)
    # PEFT has the expert as the slow axis of A's rows, and as the fast axis of B's columns
    return a.transpose(0, 2, 1).reshape(experts * r, -1), b.transpose(2, 1, 0).reshape(-1, r * experts)


def from_torch(
    parameter: TorchParameter, a: np.ndarray, b: np.ndarray, scale: float, *, exchanged: bool = False
) -> TorchUpdate:
    """The update that PEFT's A and B are (see `torch_shapes`); their shapes are already checked."""
    if parameter.kind == "conv":
        window = a.ndim - 2
        return TorchUpdate(a.transpose(*range(2, window + 2), 1, 0), b.reshape(b.shape[:2]).T, scale)
    experts = parameter.sizes("expert")
    count = math.prod(experts)
    r = a.shape[0] // count
    a = a.reshape(count, r, -1).transpose(0, 2, 1)  # [E, m, r]
    b = b.reshape(-1, r, count).transpose(2, 1, 0)  # [E, r, n]
    if exchanged:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    a, b = a.reshape(*experts, *parameter.sizes("in"), r), b.reshape(*experts, r, *parameter.sizes("out"))
    return TorchUpdate(a, b, scale)


def read_update(parameter: TorchParameter, adapter: Adapter) -> TorchUpdate:
    """The update of one torch parameter out of the adapter of its leaf; of rank 1 and zero where its rank is 0.

    Where the adapter has one update across modules that torch keeps apart (a fused kernel adapted as one),
    each module gets its part of it: they share ``a`` (or ``b``). Ranks that differ among the experts of one torch
    parameter become the largest of them.

    Raises:
        ValueError: The axes of the adapter contradict the map.
    """
    stack, ins, outs = (positions(adapter.axes, role) for role in ("stack", "in", "out"))
    if stack:
        parameter.roles()  # raises if the map says nothing of stacks
    scale, expert_scales = _entry_scale(parameter, adapter)
    a, a_axes = _take(adapter.a, [*stack, *ins, RANK], parameter)
    b, b_axes = _take(adapter.b, [*stack, RANK, *outs], parameter)
    experts = b_axes.index(RANK)
    # what is above the rank of an entry is zero
    within_rank = slice(max(entry_rank(parameter, adapter), 1))
    a, b = a[..., within_rank], b[(slice(None),) * experts + (within_rank,)]
    if expert_scales is not None:
        b = b * expert_scales.reshape(*expert_scales.shape, *[1] * (b.ndim - experts)).astype(b.dtype)
    if parameter.axes is None:
        return TorchUpdate(a, b, scale)
    expected = [parameter.own_axes("in"), parameter.own_axes("out")]
    without = (RANK, *parameter.own_axes("expert"))
    got = [[axis for axis in axes if axis not in without] for axes in (a_axes, b_axes)]
    if got == expected:
        return TorchUpdate(a, b, scale)
    if got == expected[::-1] and adapter.arrays.keys() == {"a", "b"}:  # adapted from the other end, as a tied head is
        return TorchUpdate(np.moveaxis(b, experts, -1), np.moveaxis(a, -1, experts), scale)
    raise ValueError(
        f"{parameter.path}: the adapter has axes {adapter.axes}, the name rule {parameter.rule!r} says "
        f"{parameter.axes}. Correct the rule, or adapt the weight with axes= as the rule says."
    )


def entry_rank(parameter: TorchParameter, adapter: Adapter) -> int:
    """The rank of an adapter at a parameter's entry of the stack: the largest of its experts."""
    ranks = adapter.rank if adapter.ranks is None else np.reshape(adapter.ranks, _stack_shape(adapter))
    return int(np.max(np.broadcast_to(ranks, _stack_shape(adapter))[_stack_index(parameter, adapter)]))


def _entry_scale(parameter: TorchParameter, adapter: Adapter) -> tuple[float, np.ndarray | None]:
    """The scale of a parameter, and what each of its experts has on top of it, if they differ."""
    if not isinstance(adapter.scale, tuple):
        return adapter.scale, None
    shape, index = _stack_shape(adapter), _stack_index(parameter, adapter)
    scales = np.reshape(adapter.scale, shape)[index]
    ranks = np.broadcast_to(np.reshape(adapter.ranks or adapter.rank, shape if adapter.ranks else ()), shape)[index]
    scale = next((float(s) for s, r in zip(np.ravel(scales), np.ravel(ranks), strict=True) if r and s), 1.0)
    return scale, scales / scale if np.ndim(scales) else None


def _stack_shape(adapter: Adapter) -> Shape:
    return unbox(adapter.a).shape[: len(positions(adapter.axes, "stack"))]


def _stack_index(parameter: TorchParameter, adapter: Adapter) -> tuple[int | slice, ...]:
    return parameter.at(positions(adapter.axes, "stack"))


def _take(array: object, axes: list[int | str], parameter: TorchParameter) -> tuple[np.ndarray, list[int | str]]:
    """A parameter's numbers in an array with these axes of the leaf (and the rank), and the axes they have."""
    index = tuple(slice(None) if axis == RANK else parameter.index.get(axis, slice(None)) for axis in axes)  # type: ignore
    return np.asarray(unbox(array))[index], [
        axis for axis, i in zip(axes, index, strict=True) if not isinstance(i, int)
    ]


def assemble(updates: Sequence[tuple[TorchParameter, TorchUpdate]], dtype: Dtype) -> Adapter:
    """The adapter of one leaf, of numpy arrays, from the updates of its torch parameters.

    Each entry of a stack keeps its rank and scale: 0 where it has no update; what is above its rank is zeros.
    Parts side by side along one axis become blocks, so the rank is the sum of theirs; where their scales differ
    the difference goes into ``b``.
    """
    first, _ = updates[0]
    axes, shape = first.adapter_axes(), first.shape
    stack, ins, outs = (positions(axes, role) for role in ("stack", "in", "out"))
    entries = group_by(updates, lambda item: str(item[0].at(stack)))
    stack_shape = [shape[i] for i in stack]
    ranks, scales = np.zeros(stack_shape, int), np.ones(stack_shape)
    for group in entries.values():
        index = group[0][0].at(stack)
        ranks[index] = sum(update.rank for _, update in group)
        scales[index] = next((update.scale for _, update in group if update.scale), 0.0)
    rank = int(np.max(ranks))
    a = np.zeros((*stack_shape, *(shape[i] for i in ins), rank), dtype)
    b = np.zeros((*stack_shape, rank, *(shape[i] for i in outs)), dtype)
    for group in entries.values():
        start, scale = 0, next((update.scale for _, update in group if update.scale), 0.0)
        for parameter, update in group:
            block = slice(start, start + update.rank)
            a[(*parameter.at((*stack, *ins)), block)] = update.a
            ratio = 1.0 if update.scale == scale else update.scale / scale
            b[(*parameter.at(stack), block, *parameter.at(outs))] = update.b * np.asarray(ratio, update.b.dtype)
            start += update.rank
    used_scales, each_rank = set(scales[ranks > 0].tolist()), tuple(ranks.ravel().tolist())
    return Adapter(
        a,
        b,
        used_scales.pop() if len(used_scales) == 1 else tuple(scales.ravel().tolist()),
        axes,
        ranks=each_rank if len(set(each_rank)) > 1 else None,
    )
