"""Between a `lora` tree and what is stored of it: flat arrays by name, and entries that describe them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from lojax.adapters.adapter import Adapter, box_arrays, is_adapter
from lojax.adapters.metadata import is_box, rebox, unbox
from lojax.adapters.paths import is_leaf, map_paths, path_of
from lojax.adapters.targets import nearest
from lojax.checkpoint.manifest import AdapterEntry, Array, Record, stored_name

_BOXES = {"Partitioned": nn.Partitioned, "LogicallyPartitioned": nn.LogicallyPartitioned}
_STATIC = [field.name for field in dataclasses.fields(Adapter) if field.metadata.get("static")]
_DATA = [field.name for field in dataclasses.fields(Adapter) if not field.metadata.get("static")]


def leaves(lora: Any) -> tuple[dict[str, Any], dict[str, tuple[str | int, ...]]]:
    """The leaves of ``lora`` by path, and the keys of the paths that do not simply split at ``/``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_leaf)
    found: dict[str, Any] = {}
    odd: dict[str, tuple[str | int, ...]] = {}
    for entries, leaf in flat:
        path = path_of(entries)
        if path in found:
            raise ValueError(f"lora has two leaves at the path {path}: a key holds a '/', or is a number. Rename it.")
        found[path] = leaf
        keys = tuple(_key(entry) for entry in entries)
        if keys != tuple(path.split("/")):
            odd[path] = keys
    return found, odd


def _key(entry: Any) -> str | int:
    for attribute in ("key", "idx"):
        if isinstance(value := getattr(entry, attribute, None), int) and not isinstance(value, bool):
            return value
    return path_of((entry,))


def arrays_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Every array of a `lora` by the name it is stored under, out of its box.

    Raises:
        TypeError: A leaf holds no array.
        ValueError: There is nothing to store.
    """
    arrays: dict[str, Any] = {}
    for path, leaf in found.items():
        if is_adapter(leaf):
            fields = {name: unbox(getattr(leaf, name)) for name in _DATA}
            arrays |= {stored_name(path, name): value for name, value in fields.items() if value is not None}
        elif leaf is not None:
            arrays[stored_name(path, None)] = unbox(leaf)
    for name, value in arrays.items():
        if not isinstance(value, (np.ndarray, np.generic, jax.Array)) or isinstance(value, Tracer):
            raise TypeError(f"{name} is a {type(value).__name__}, expected an array. Save outside jit, with values.")
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is an array of random keys ({value.dtype}). Save jax.random.key_data of it.")
    if not any(value.size for value in arrays.values()):
        raise ValueError("lora holds no adapter and no array, so there is nothing to save.")
    return arrays


def entries_of(
    found: Mapping[str, Any], digests: Mapping[str, str]
) -> tuple[dict[str, AdapterEntry], dict[str, Array], tuple[str, ...]]:
    """What ``adapter.json`` says of each leaf: the adapters, the full arrays, the paths that hold None."""

    def entry(path: str, field: str | None, leaf: Any) -> Array:
        value = unbox(leaf)
        return Array(tuple(value.shape), str(value.dtype), digests[stored_name(path, field)], _describe(leaf))

    adapters, full, other = {}, {}, []
    for path, leaf in found.items():
        if is_adapter(leaf):
            data = {name: value for name in _DATA if (value := getattr(leaf, name)) is not None}
            static = {name: getattr(leaf, name) for name in _STATIC}
            if isinstance(leaf.scale, (int, float)):
                static["scale"] = float(leaf.scale)
            adapters[path] = AdapterEntry(static, {name: entry(path, name, value) for name, value in data.items()})
        elif leaf is None:
            other.append(path)
        else:
            full[path] = entry(path, None, leaf)
    return adapters, full, tuple(other)


def _describe(leaf: Any) -> dict[str, Any] | None:
    if not is_box(leaf):
        return None
    kind = type(leaf).__name__
    return {"kind": kind, "names": [*leaf.names]} if kind in _BOXES else {"kind": kind}


def _boxed(array: Array, value: Any) -> Any:
    kind = _BOXES.get(array.box["kind"]) if array.box else None
    return kind(value, names=tuple(_tuples(name) for name in array.box["names"])) if kind and array.box else value


def _tuples(name: Any) -> Any:
    return tuple(name) if isinstance(name, list) else name


def build(record: Record, arrays: Mapping[str, Any], *, like: Any, frozen: Any) -> Any:
    """The `lora` tree: in the structure of ``like``, else of ``frozen``, else of nested dicts."""

    def leaf(path: str, template: Any) -> Any:
        if path in record.full:
            entry, value = record.full[path], arrays[stored_name(path, None)]
            return rebox(template, value) if like is not None else _boxed(entry, value)
        if path not in record.adapters:
            return None
        entry = record.adapters[path]
        data = {name: arrays[stored_name(path, name)] for name in entry.arrays}
        if like is not None:
            data = {name: rebox(getattr(template, name), value) for name, value in data.items()}
        elif frozen is None:
            data = {name: _boxed(entry.arrays[name], value) for name, value in data.items()}
        adapter = Adapter(**{"a": None, "b": None} | data, **entry.static)
        return box_arrays(template, adapter) if like is None and frozen is not None else adapter

    template = like if like is not None else frozen
    return _nested(record, leaf) if template is None else map_paths(leaf, template)


def _nested(record: Record, leaf: Callable[[str, Any], Any]) -> Any:
    root: dict[Any, Any] = {}
    for path in record.paths:
        *parents, last = record.keys.get(path) or path.split("/")
        if (path, parents, last) == ("", [], ""):
            return leaf(path, None)  # the tree is one leaf
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf(path, None)
    return root


def check_like(record: Record, like: Any, place: Any) -> None:
    """Raises unless ``like`` has the leaves that are stored: same paths, kinds, shapes, dtypes, static fields."""
    found, _ = leaves(like)
    check_paths(record, found, "like", place)
    for path, leaf in found.items():
        expected: Any = "nothing" if path in record.other else "an array" if path in record.full else "an adapter"
        got = "nothing" if leaf is None else "an adapter" if is_adapter(leaf) else "an array"
        if got != expected:
            raise ValueError(f"{path}: {place} holds {expected}, but like holds {got}. Use the targets of the save.")
        if is_adapter(leaf):
            entry = record.adapters[path]
            for name in _STATIC:
                if getattr(leaf, name) != entry.static[name]:
                    raise ValueError(
                        f"{path}: {place} has {name}={entry.static[name]!r}, but like has {getattr(leaf, name)!r}. "
                        f"Use the {name} of the save, or restore without like."
                    )
        for name in _DATA if is_adapter(leaf) else [None] if leaf is not None else []:
            value = unbox(getattr(leaf, name) if name else leaf)
            array = record.adapters[path].arrays.get(name) if name else record.full[path]
            spec = None if value is None else f"{value.dtype}[{','.join(map(str, value.shape))}]"
            if spec != (array.spec if array else None):
                where = f"{path}/{name}" if name else path
                raise ValueError(f"{where}: {place} holds {array.spec if array else None}, but like holds {spec}.")


def check_paths(record: Record, found: Mapping[str, Any], name: str, place: Any) -> None:
    """Raises if the tree called ``name`` lacks a stored path, or has one that is not in the record."""
    known = set(record.paths)
    for path in record.paths:
        if path not in found:
            near = "".join(f"\n  {other}" for other in nearest(path, list(found), 3))
            raise ValueError(f"{path}: is in {place}, but not in {name}. Is it another model? The nearest:{near}")
    for path in found:
        if path not in known:
            near = "".join(f"\n  {other}" for other in nearest(path, list(known), 3))
            raise ValueError(f"{path}: is in {name}, but not in {place}. Is it another model? The nearest:{near}")
