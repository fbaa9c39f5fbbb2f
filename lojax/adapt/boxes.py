"""Boxes: Flax wrappers around a leaf that carry its axis names (`nn.Partitioned` and its kin).

A box is no part of a weight's path. It survives every round trip, and the factors of an adapter
inherit the axis names of the weight they adapt, so `nn.get_partition_spec(lora)` just works.
"""

from __future__ import annotations

from typing import Any

from flax.core import meta

from lojax.adapt.axes import Axes, positions


def is_box(node: Any) -> bool:
    """Whether ``node`` is a Flax metadata box."""
    return isinstance(node, meta.AxisMetadata)


def unbox(node: Any) -> Any:
    """The value inside ``node``, or ``node`` itself where it is no box."""
    if isinstance(node, meta.Partitioned):
        return node.value  # its unbox() would add a sharding constraint
    return node.unbox() if is_box(node) else node


def rebox(box: Any, value: Any) -> Any:
    """``value`` in a box like ``box``, or ``value`` itself where ``box`` is none."""
    return box.replace_boxed(value) if is_box(box) else value


def box_factors(box: Any, axes: Axes, a: Any, b: Any) -> tuple[Any, Any]:
    """Boxes the factors of a boxed weight, with its axis names; the rank axis has no name."""
    if not isinstance(box, meta.Partitioned):
        return a, b
    names = (*box.names, *[None] * (len(axes) - len(box.names)))
    stack, ins, outs = (tuple(names[i] for i in positions(axes, role)) for role in ("stack", "in", "out"))
    return (
        box.replace(value=a, names=(*stack, *ins, None)),
        box.replace(value=b, names=(*stack, None, *outs)),
    )
