"""Boxes: Flax wrappers around a leaf that carry its axis names (`nn.Partitioned` and its kin).

A box is no part of a weight's path. It survives every round trip, and the factors of an adapter
inherit the axis names of the weight they adapt, so `nn.get_partition_spec(lora)` just works.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from flax.core import meta

from lojax.adapters.axes import array_axes

if TYPE_CHECKING:
    from lojax.adapters.adapter import Adapter


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


def box_arrays(box: Any, adapter: Adapter) -> Adapter:
    """``adapter`` with its arrays in boxes like that of its weight, with its axis names; the rank has no name."""
    if not isinstance(box, meta.Partitioned):
        return adapter
    names = (*box.names, *[None] * (len(adapter.axes) - len(box.names)))
    along = array_axes(adapter.axes)
    boxed = {
        name: box.replace(value=x, names=tuple(None if d is None else names[d] for d in along[name]))
        for name, x in adapter.arrays.items()
    }
    return dataclasses.replace(adapter, **boxed)
