"""The trainable data of one adapted weight."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
from flax import serialization
from flax.core import meta
from jax import export

from lojax.adapters.axes import Axes, positions
from lojax.adapters.metadata import rebox, unbox
from lojax.types import Array, Leaf, Shape


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is static about one adapter of a stack of adapters, where the stack holds its arrays.

    Attributes:
        scale: As in `Adapter`.
        rank: Its own rank; the stack pads it with zeros to the largest.
        dropout: As in `Adapter`.
        ranks: As in `Adapter`.
        requested_rank: As in `Adapter`.
        invocation_tokens: As in `Adapter`.
    """

    scale: float | tuple[float, ...]
    rank: int
    dropout: float = 0.0
    ranks: tuple[int, ...] | None = None
    requested_rank: int | None = None
    invocation_tokens: tuple[int, ...] | None = None

    @property
    def static(self) -> dict[str, Any]:
        """The fields that the adapter itself has under the same names."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rank"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update ``scale * a @ b`` of one weight (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    A pytree node: its arrays are leaves, the rest is static. It sits in the ``lora`` tree where the
    weight sits in ``params``. The members of the LoRA family differ in which fields are set:

    ============== ======================================================================
    LoRA, rsLoRA   ``a``, ``b``; they differ in the rule that gave ``scale``
    DoRA           ``magnitude`` as well
    LoRA-FA        ``frozen_a``
    token rows     ``rows`` and ``tokens``, with ``a`` and ``b`` or, in their place, None
    ============== ======================================================================

    Attributes:
        a: ``[*stack, *in, r]``, random at the start. PEFT's ``lora_A`` transposed.
        b: ``[*stack, r, *out]``, zero at the start. PEFT's ``lora_B`` transposed.
        scale: The factor on the update, ``alpha / r`` (or ``alpha / sqrt(r)`` for rsLoRA). One number, or one
            for each entry of the stack.
        axes: The role of each axis of the weight: ``"in"``, ``"out"`` or ``"stack"``.
        dropout: The rate of dropout on the input of the update, used when a key is passed to apply.
        magnitude: ``[*stack, *out]``: the length of each column of the weight, which DoRA trains apart from its
            direction (Liu et al. 2024, arXiv:2402.09353, eq. 5). None for any other variant.
        rows: ``[k, *out]``: what is added to the rows ``tokens`` of an embedding. None without such rows.
        tokens: The ``k`` rows of the embedding that train.
        ranks: The rank of each entry of the stack, where they differ. The columns of ``a`` and the rows of ``b``
            above it are zero, get no gradient and stay zero.
        requested_rank: The rank that was asked for, where it was above min(m, n) and so was lowered to that.
        moved_base: The initialization that took the start of the update out of the frozen weight (``"pissa"``,
            ``"lora_ga"``). The adapter then belongs to that weight, not to the pretrained one. None for the others.
        frozen_a: Whether ``a`` stays as it is (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303): no gradient reaches
            it, and the input of the weight is not kept for the backward pass. `lojax.optimizer` does not update it.
        invocation_tokens: The tokens from whose last occurrence on the adapter acts (activated LoRA, Greenewald et al.
            2025, arXiv:2512.17910), see `lojax.active_tokens`. None for an adapter that acts on every token.
        entries: In a `lojax.Bank`, where every array has one more axis in front: what is static about each adapter of
            the stack, and None for one that does not adapt this weight. None for a single adapter. Empty for one of
            many that `jax.vmap` maps over: its products are not fused, which would form a weight for each.
    """

    # An array field says which axes it has, by their role in the weight; "rank" and "tokens" are its own. All code
    # that needs to know an adapter's arrays reads this (see `ARRAYS`), so a new array is one more field here.
    a: Leaf = dataclasses.field(metadata={"axes": ("stack", "in", "rank")})
    b: Leaf = dataclasses.field(metadata={"axes": ("stack", "rank", "out")})
    scale: float | tuple[float, ...] = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    magnitude: Leaf = dataclasses.field(default=None, metadata={"axes": ("stack", "out")})
    rows: Leaf = dataclasses.field(default=None, metadata={"axes": ("tokens", "out")})
    tokens: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    ranks: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    requested_rank: int | None = dataclasses.field(default=None, metadata={"static": True})
    moved_base: str | None = dataclasses.field(default=None, metadata={"static": True})
    frozen_a: bool = dataclasses.field(default=False, metadata={"static": True})
    invocation_tokens: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    entries: tuple[Entry | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank ``r`` of the update, the largest of a stack; 0 where only token rows train."""
        return 0 if self.a is None else unbox(self.a).shape[-1]

    @property
    def one_scale(self) -> float:
        """The scale, where it is the same for every entry of the stack."""
        assert not isinstance(self.scale, tuple)
        return self.scale

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays that are set, by field, out of their boxes."""
        fields = {name: getattr(self, name) for name in ARRAYS}
        return {name: unbox(x) for name, x in fields.items() if x is not None}

    @property
    def trained_arrays(self) -> tuple[str, ...]:
        """The fields of the arrays that train: all that are set, without a frozen ``a``."""
        return tuple(name for name in self.arrays if not (name == "a" and self.frozen_a))

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        """The shape of the adapted weight; None for an axis that none of the arrays has."""
        sizes = {}
        for name, x in self.arrays.items():
            sizes |= dict(zip(array_axes(self.axes)[name], x.shape, strict=True))
        return tuple(sizes.get(axis) for axis in range(len(self.axes)))

    @property
    def parameters(self) -> int:
        """The number of parameters that train: without a frozen ``a``, and without the padding of ``ranks``."""
        total = 0
        for name in self.trained_arrays:
            size = math.prod(self.arrays[name].shape)
            if self.ranks is not None and "rank" in ARRAYS[name]:
                size = size * sum(self.ranks) // (len(self.ranks) * self.rank)
            total += size
        return total

    @property
    def extras(self) -> tuple[str, ...]:
        """The fields that make it more than ``scale * a @ b`` with one scale and one rank."""
        names = [name for name in self.arrays if name not in ("a", "b")]
        if self.ranks is not None:
            return (*names, "ranks")
        return (*names, "scale") if isinstance(self.scale, tuple) else tuple(names)

    @property
    def variant(self) -> str:
        """The member of the family, as `lojax.Rule` names it."""
        if self.a is None:
            return "tokens"
        return "dora" if self.magnitude is not None else "lora-fa" if self.frozen_a else "lora"

    def __repr__(self) -> str:
        along = array_axes(self.axes)
        if not self.arrays or any(len(getattr(x, "shape", "")) != len(along[name]) for name, x in self.arrays.items()):
            return self._repr_of_fields()  # a map over trees put something else here, such as labels or a leading axis
        shape = ", ".join("?" if size is None else str(size) for size in self.weight_shape)
        parts = [f"({shape})"]
        if self.a is not None:
            parts += [f"ranks={self.ranks}" if self.ranks else f"rank={self.rank}"]
            parts += [f"scale={self.scale}" if isinstance(self.scale, tuple) else f"alpha={self.scale * self.rank:g}"]
        if self.tokens:
            parts += [f"{len(self.tokens)} token rows"]
        parts += [str(next(iter(self.arrays.values())).dtype)]
        parts += [self.variant] if self.variant in ("dora", "lora-fa") else []
        parts += [f"dropout={self.dropout:g}"] if self.dropout else []
        return f"Adapter({', '.join(parts)})"

    def _repr_of_fields(self) -> str:
        shown = (f for f in dataclasses.fields(self) if not (f.name in ARRAYS and getattr(self, f.name) is None))
        changed = (f.name for f in shown if f.name in ARRAYS or getattr(self, f.name) != f.default)
        return f"Adapter({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"


ARRAYS: dict[str, tuple[str, ...]] = {
    field.name: field.metadata["axes"] for field in dataclasses.fields(Adapter) if "axes" in field.metadata
}
"""The array fields of an `Adapter`, each with the role of its axes."""


def is_adapter(node: object) -> bool:
    """Whether ``node`` is an `Adapter`."""
    return isinstance(node, Adapter)


def array_axes(axes: Axes) -> dict[str, tuple[int | None, ...]]:
    """For every array of an adapter, the axis of the weight that each of its axes stands for, or None.

    >>> array_axes(("in", "out", "out"))["b"]
    (None, 1, 2)
    """
    weight_axes = {role: positions(axes, role) for role in ("stack", "in", "out")}
    return {
        name: tuple(axis for role in roles for axis in weight_axes.get(role, (None,))) for name, roles in ARRAYS.items()
    }


def array_shapes(axes: Axes, shape: Shape, rank: int, tokens: int = 0) -> dict[str, Shape]:
    """The shape of every array of an adapter for a weight of this ``shape``, by field.

    >>> array_shapes(("stack", "in", "out", "out"), (12, 512, 8, 64), 4)["b"]
    (12, 4, 8, 64)
    """
    sizes = {role: tuple(shape[axis] for axis in positions(axes, role)) for role in ("stack", "in", "out")}
    sizes |= {"rank": (rank,), "tokens": (tokens,)}
    return {name: tuple(size for role in roles for size in sizes[role]) for name, roles in ARRAYS.items()}


def box_arrays(box: Leaf, adapter: Adapter) -> Adapter:
    """``adapter`` with its arrays in boxes like that of its weight, with its axis names; the rank has no name."""
    if not isinstance(box, meta.Partitioned):
        return adapter
    names = (*box.names, *[None] * (len(adapter.axes) - len(box.names)))
    boxes = {
        name: box.replace(value=x, names=tuple(None if axis is None else names[axis] for axis in along))
        for name, along in array_axes(adapter.axes).items()
        if (x := adapter.arrays.get(name)) is not None
    }
    return dataclasses.replace(adapter, **boxes)


def scale_update(adapter: Adapter, factor: float) -> Adapter:
    """``adapter`` with its update multiplied by ``factor``: another scale, and other token rows."""
    scale = adapter.scale
    scale = tuple(s * factor for s in scale) if isinstance(scale, tuple) else scale * factor
    rows = None if adapter.rows is None else rebox(adapter.rows, unbox(adapter.rows) * factor)
    return dataclasses.replace(adapter, scale=scale, rows=rows)


# --- registration with the libraries that write pytrees ---


def _to_state_dict(adapter: Adapter) -> dict[str, Any]:
    """The arrays by field. As everywhere in Flax, what is static (scale, axes) comes from the target on reading."""
    return {name: serialization.to_state_dict(getattr(adapter, name)) for name in adapter.arrays}


def _from_state_dict(adapter: Adapter, state: dict[str, Any]) -> Adapter:
    if state.keys() != adapter.arrays.keys():
        raise ValueError(
            f"What was written holds the arrays {', '.join(state)}, and the target {', '.join(adapter.arrays)}. "
            "Read it into an adapter of the same variant; lojax.save writes adapters that need no target."
        )
    fields = {name: serialization.from_state_dict(getattr(adapter, name), state[name], name) for name in state}
    for name, value in fields.items():
        shape, expected = unbox(value).shape, adapter.arrays[name].shape
        if shape != expected:
            raise ValueError(f"What was written for {name} has shape {shape}, and the target's has {expected}.")
    return dataclasses.replace(adapter, **fields)


_STATIC = [field for field in dataclasses.fields(Adapter) if field.metadata.get("static")]


def _serialize_static(values: tuple[Any, ...]) -> bytes:
    fields = dict(zip((field.name for field in _STATIC), values, strict=True))
    return json.dumps(fields, default=lambda x: vars(x) if isinstance(x, Entry) else float(x)).encode()


def _deserialize_static(data: bytes) -> tuple[Any, ...]:
    fields = json.loads(data)
    values = (fields.get(field.name, field.default) for field in _STATIC)

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return Entry(**{name: restore(x) for name, x in value.items()})
        return tuple(map(restore, value)) if isinstance(value, list) else value

    return tuple(map(restore, values))


serialization.register_serialization_state(Adapter, _to_state_dict, _from_state_dict)
export.register_pytree_node_serialization(
    Adapter,
    serialized_name="lojax.Adapter",
    serialize_auxdata=_serialize_static,
    deserialize_auxdata=_deserialize_static,
)
