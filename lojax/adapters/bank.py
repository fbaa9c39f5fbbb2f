"""A bank: several adapters of one base as one tree, whose arrays have one more axis in front."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.core import meta
from jax import export

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import positions
from lojax.adapters.conform import conform, pad_factors, with_arrays
from lojax.adapters.matrices import at_least_float32
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.text import suggest
from lojax.types import Array, Leaf, Params, Path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """A stack of adapters of one base; `lojax.stack` makes it.

    A pytree: gradients and optimizer states over a bank have its structure, and each adapter gets its own. The scale
    of each adapter is static, so no gradient and no optimizer reaches it. ``bank[i]`` is one adapter as it was, with
    its own rank; ``len(bank)`` their number.

    Attributes:
        lora: A ``lora`` tree whose arrays have one more axis in front, of length ``len(bank)``. Smaller ranks are
            padded with zeros, and a weight that one adapter leaves alone has zeros there.
        size: The number of adapters.
        names: A name for each adapter, or None.
    """

    lora: Params
    size: int = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Params]:
        return (self[i] for i in range(self.size))

    def __getitem__(self, which: int | str) -> Params:
        """The ``lora`` tree of one adapter, by its number or name."""
        i = self.index(which)
        return map_paths(lambda _, leaf: _take_entry(leaf, i), self.lora)

    def index(self, which: int | str) -> int:
        """The number of an adapter, by its number (from the end if negative) or name.

        Raises:
            IndexError: The number is out of range.
            KeyError: No adapter has that name.
        """
        if isinstance(which, str):
            if which not in (self.names or ()):
                listed = f"its names: {', '.join(self.names)}" if self.names else "it has no names: pass stack(names=)"
                raise KeyError(f"The bank has no adapter {which!r}; {listed}.{suggest(which, self.names or ())}")
            return (self.names or ()).index(which)
        i = operator.index(which)
        if not -self.size <= i < self.size:
            raise IndexError(
                f"The number {i} is out of range: the bank holds {self.size} adapters, numbered 0 to {self.size - 1}."
            )
        return i % self.size

    def ids(self, names: Sequence[str | int | None]) -> Array:
        """The numbers ``int32 [batch]`` of adapters by name, for ``apply(adapter=)``; None is -1, the base alone."""
        return jnp.asarray([-1 if name is None else self.index(name) for name in names], jnp.int32)

    def replace(self, which: int | str, lora: Params) -> Bank:
        """The bank with another adapter in the place of one: no program is compiled again.

        Args:
            which: The number or name of the adapter that goes.
            lora: The one that comes. It is conformed to the one that goes, see `lojax.conform`: its rank may be as
                large as that one's.

        Returns:
            A bank of the same treedef.
        """
        i = self.index(which)
        try:
            leaves = flatten(conform(lora, self[i]))
        except ValueError as error:
            place = f"like is the place {which!r} of the bank. lojax.stack(..., rank=) makes a bank with room in it."
            raise ValueError(f"{error} Here {place}") from None

        def put(path: str, leaf: Leaf) -> Leaf:
            if leaf is None or leaves[path] is None:  # no place, or one that stays empty
                return leaf
            new = leaves[path]
            if is_adapter(leaf) and leaf.a is not None:
                a, b = pad_factors(new, leaf.rank)
                new = with_arrays(new, {"a": a, "b": b})
            arrays = zip(jax.tree.leaves(leaf), jax.tree.leaves(new), strict=True)
            return jax.tree.unflatten(jax.tree.structure(leaf), [old.at[i].set(x) for old, x in arrays])

        return dataclasses.replace(self, lora=map_paths(put, self.lora))

    def for_vmap(self) -> Params:
        """The adapters as one ``lora`` tree with a leading axis, for `jax.vmap`.

        ``jax.vmap(lambda lora, x: model.apply(frozen, lora, x))(bank.for_vmap(), x)`` runs every adapter on its own
        ``x``. Each ``b`` is multiplied by its scale, which is 1 in the result; gradients flow back to the bank.
        """

        def scale(_: Path, leaf: Leaf) -> Leaf:
            # No entries, but not None: the products of a mapped adapter are not fused, which would form a weight each.
            return dataclasses.replace(scale_entries(leaf), entries=()) if is_adapter(leaf) else leaf

        return map_paths(scale, self.lora)

    def __repr__(self) -> str:
        adapters = [leaf for leaf in flatten(self.lora).values() if is_adapter(leaf)]
        ranks = sorted({entry.rank for leaf in adapters for entry in leaf.entries or () if entry})
        named = f", names={list(self.names)}" if self.names else ""
        return f"Bank({self.size} adapters of {len(adapters)} weights, ranks {ranks}{named})"


def is_bank(tree: object) -> bool:
    """Whether ``tree`` is a `Bank`."""
    return isinstance(tree, Bank)


def scale_entries(adapter: Adapter) -> Adapter:
    """The adapters of a bank at one weight, each ``b`` times its scale, as one adapter of scale 1."""
    if adapter.rows is not None:
        adapter = with_arrays(adapter, {"rows": own_rows(adapter)})
    if adapter.a is None or adapter.entries is None:
        return dataclasses.replace(adapter, entries=None)
    # In float32, as for a single adapter (`lowrank.value.from_adapter`).
    scales = scales_of(adapter)
    plain = dataclasses.replace(adapter, scale=1.0, entries=None, ranks=None)
    return with_arrays(plain, {"b": adapter.arrays["b"].astype(scales.dtype) * scales})


def own_rows(adapter: Adapter) -> Array:
    """The token rows of the adapters of a bank; of one that leaves the weight alone zeros, which get no gradient."""
    rows = jnp.asarray(adapter.arrays["rows"])
    trains = np.array([entry is not None for entry in adapter.entries or ()])
    if trains.all():
        return rows
    return jnp.where(trains.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.zeros_like(rows))


def scales_of(adapter: Adapter) -> Array:
    """The scales of the adapters of a bank at one weight, in a shape that multiplies ``b``: float32 or wider."""
    scales = np.broadcast_arrays(*(np.asarray(1.0 if e is None else e.scale) for e in adapter.entries or ()))
    scale = np.stack(scales)  # [N], or [N, S] where the scales differ along a stack
    b = adapter.arrays["b"]
    stack = len(positions(adapter.axes, "stack"))
    shape = (*b.shape[: 1 + stack], *[1] * (b.ndim - 1 - stack)) if scale.ndim > 1 else (-1, *[1] * (b.ndim - 1))
    return jnp.asarray(scale.reshape(shape), at_least_float32(b.dtype))


def _take_entry(leaf: Leaf, i: int) -> Leaf:
    """One adapter of a bank at one weight, as it was before it was stacked."""
    if leaf is None or not is_adapter(leaf):
        return leaf if leaf is None else _index_box(leaf, i)
    assert leaf.entries is not None
    entry = leaf.entries[i]
    if entry is None:
        return None
    arrays = {name: _index_box(getattr(leaf, name), i) for name in leaf.arrays}
    taken = dataclasses.replace(leaf, entries=None, **entry.static, **arrays)
    if leaf.a is None or entry.rank == leaf.rank:
        return taken
    a, b = taken.arrays["a"], taken.arrays["b"]
    axis = len(positions(leaf.axes, "stack"))
    return with_arrays(taken, {"a": a[..., : entry.rank], "b": b[(*[slice(None)] * axis, slice(entry.rank))]})


def _index_box(leaf: Leaf, i: int) -> Leaf:
    """``leaf[i]``, of the array in the box; the name of the first axis goes too."""
    if isinstance(leaf, meta.Partitioned):
        return leaf.replace(value=leaf.value[i], names=leaf.names[1:])
    return rebox(leaf, unbox(leaf)[i])


# --- registration with the libraries that write pytrees ---


def _to_state_dict(bank: Bank) -> dict[str, Any]:
    """The arrays. As everywhere in Flax, what is static (names, scales, ranks) comes from the target on reading."""
    return {"lora": serialization.to_state_dict(bank.lora)}


def _from_state_dict(bank: Bank, state: dict[str, Any]) -> Bank:
    if state.keys() != {"lora"}:
        raise ValueError(
            f"What was written holds {', '.join(state)}, and the target is a bank. Read it into a tree like the one "
            "that was written; lojax.save writes banks that need no target."
        )
    return dataclasses.replace(bank, lora=serialization.from_state_dict(bank.lora, state["lora"], "lora"))


def _serialize_static(values: tuple[Any, ...]) -> bytes:
    return json.dumps(values).encode()


def _deserialize_static(data: bytes) -> tuple[Any, ...]:
    size, names = json.loads(data)
    return size, None if names is None else tuple(names)


serialization.register_serialization_state(Bank, _to_state_dict, _from_state_dict)
export.register_pytree_node_serialization(
    Bank,
    serialized_name="lojax.Bank",
    serialize_auxdata=_serialize_static,
    deserialize_auxdata=_deserialize_static,
)
