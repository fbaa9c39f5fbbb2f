"""Boxes: Flax wrappers around a leaf that carry its axis names (`nn.Partitioned` and its kin).

A box is not part of a weight's path. It survives every round trip, and the factors of an adapter
inherit the axis names of the weight they adapt, so `nn.get_partition_spec(lora)` just works.
"""

from __future__ import annotations

from typing import Any

from flax.core import meta

from lojax.types import Leaf


def is_box(node: object) -> bool:
    """Whether ``node`` is a Flax metadata box."""
    return isinstance(node, meta.AxisMetadata)


def unbox(node: Leaf) -> Any:
    """The value inside ``node``, or ``node`` itself where it is not a box."""
    if isinstance(node, meta.Partitioned):
        return node.value  # its unbox() would add a sharding constraint
    return node.unbox() if is_box(node) else node


def rebox(box: Leaf, value: Leaf) -> Any:
    """``value`` in a box like ``box``, or ``value`` itself where ``box`` is not a box."""
    return box.replace_boxed(value) if is_box(box) else value
