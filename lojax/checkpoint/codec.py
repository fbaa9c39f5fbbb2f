"""Between a `lora` tree and what is stored of it: flat arrays by name, and entries that describe them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from lojax.adapters.adapter import ARRAYS, Adapter, box_arrays, is_adapter
from lojax.adapters.metadata import is_box, rebox, unbox
from lojax.adapters.paths import is_leaf, map_paths, path_of, unflatten
from lojax.adapters.targets import nearest
from lojax.checkpoint.manifest import STATIC_FIELDS, Manifest, StoredArray, fields_of, stored_name
from lojax.text import spec
from lojax.types import ArrayLike, Leaf, Params, Path

_BOXES = {"Partitioned": nn.Partitioned, "LogicallyPartitioned": nn.LogicallyPartitioned}


def flatten_with_keys(lora: Params) -> tuple[dict[Path, Leaf], dict[Path, tuple[str | int, ...]]]:
    """The leaves of ``lora`` by path, and the keys of the paths that do not simply split at ``/``."""
    leaves: dict[Path, Leaf] = {}
    keys: dict[Path, tuple[str | int, ...]] = {}
    for entries, leaf in jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_leaf)[0]:
        path = path_of(entries)
        if path in leaves:
            raise ValueError(f"lora has two leaves at the path {path}: a key holds a '/', or is a number. Rename it.")
        leaves[path] = leaf
        own_keys = tuple(_plain_key(entry) for entry in entries)
        if own_keys != tuple(path.split("/")):
            keys[path] = own_keys
    return leaves, keys


def _plain_key(entry: Any) -> str | int:
    for attribute in ("key", "idx"):
        if isinstance(value := getattr(entry, attribute, None), int) and not isinstance(value, bool):
            return value
    return path_of((entry,))


def collect_arrays(leaves: Mapping[Path, Leaf]) -> dict[str, ArrayLike]:
    """Every array of a `lora` by the name it is stored under, out of its box.

    Raises:
        TypeError: A leaf does not hold an array.
        ValueError: There is nothing to store.
    """
    arrays: dict[str, Any] = {}
    for path, leaf in leaves.items():
        for field, value in fields_of(leaf).items():
            arrays[stored_name(path, field)] = unbox(value)
    for name, value in arrays.items():
        if not isinstance(value, (np.ndarray, np.generic, jax.Array)) or isinstance(value, Tracer):
            raise TypeError(f"{name} is a {type(value).__name__}, expected an array. Save outside jit, with values.")
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is an array of random keys ({value.dtype}). Save jax.random.key_data of it.")
    if not any(value.size for value in arrays.values()):
        raise ValueError("lora holds no adapter and no array, so there is nothing to save.")
    return arrays


def describe_leaves(
    leaves: Mapping[Path, Leaf],
) -> tuple[dict[Path, Adapter], dict[Path, StoredArray], tuple[Path, ...]]:
    """What the manifest says of each leaf: the adapters, the full arrays, the paths that hold None."""
    adapters, full = {}, {}
    for path, leaf in leaves.items():
        if is_adapter(leaf):
            scale = leaf.scale if isinstance(leaf.scale, tuple) else float(leaf.scale)
            arrays = {str(name): _describe_array(value) for name, value in fields_of(leaf).items()}
            adapters[path] = dataclasses.replace(leaf, scale=scale, **arrays)
        elif leaf is not None:
            full[path] = _describe_array(leaf)
    return adapters, full, tuple(path for path, leaf in leaves.items() if leaf is None)


def _describe_array(leaf: Leaf) -> StoredArray:
    value, box, kind = unbox(leaf), None, type(leaf).__name__
    if is_box(leaf):
        box = {"kind": kind, "names": [*leaf.names]} if kind in _BOXES else {"kind": kind}
    return StoredArray(tuple(value.shape), str(value.dtype), box)


def _rebuild_box(array: StoredArray, value: ArrayLike) -> Leaf:
    box = array.box or {}
    kind, names = _BOXES.get(box.get("kind", "")), box.get("names", [])
    return kind(value, names=tuple(tuple(x) if isinstance(x, list) else x for x in names)) if kind else value


def build_tree(manifest: Manifest, arrays: Mapping[str, ArrayLike], *, like: Params, frozen: Params) -> Params:
    """The `lora` tree: in the structure of ``like``, else of ``frozen``, else of nested dicts."""

    def leaf(path: Path, template: Leaf) -> Leaf:
        if path in manifest.full:
            value = arrays[stored_name(path, None)]
            return rebox(template, value) if like is not None else _rebuild_box(manifest.full[path], value)
        if path not in manifest.adapters:
            return None
        entry = manifest.adapters[path]
        data: dict[str, Leaf] = {}
        for name, array in fields_of(entry).items():
            data[str(name)] = value = arrays[stored_name(path, name)]
            if like is not None:
                data[str(name)] = rebox(getattr(template, str(name)), value)
            elif frozen is None:
                data[str(name)] = _rebuild_box(array, value)
        adapter = dataclasses.replace(entry, **data)
        return box_arrays(template, adapter) if like is None and frozen is not None else adapter

    template = like if like is not None else frozen
    if template is None:
        leaves = {manifest.keys.get(path, path): leaf(path, None) for path in manifest.paths}
        return leaves[()] if () in leaves else unflatten(leaves)  # no key at all: the tree is one leaf
    return map_paths(leaf, template)


def check_like(manifest: Manifest, like: Params, directory: FilePath) -> None:
    """Raises unless ``like`` has the leaves that are stored: same paths, kinds, shapes, dtypes, static fields."""
    leaves, _ = flatten_with_keys(like)
    check_paths(manifest, leaves, "like", directory)
    for path, leaf in leaves.items():
        expected = "an adapter" if path in manifest.adapters else "an array" if path in manifest.full else "nothing"
        got = "nothing" if leaf is None else "an adapter" if is_adapter(leaf) else "an array"
        if got != expected:
            raise ValueError(
                f"{path}: {directory} holds {expected}, but like holds {got}. Use the targets of the save."
            )
        entry = manifest.adapters.get(path)
        for name in STATIC_FIELDS if entry is not None else ():
            if getattr(leaf, name) != getattr(entry, name):
                raise ValueError(
                    f"{path}: {directory} has {name}={getattr(entry, name)!r}, but like has {getattr(leaf, name)!r}. "
                    f"Use the {name} of the save, or restore without like."
                )
        stored = fields_of(manifest.full.get(path) if entry is None else entry)
        fields = fields_of(leaf)
        for name in (*ARRAYS, None):
            expected = spec(stored[name]) if name in stored else None
            got = spec(unbox(fields[name])) if name in fields else None
            if got != expected:
                where = f"{path}/{name}" if name else path
                raise ValueError(f"{where}: {directory} holds {expected}, but like holds {got}.")


def check_paths(manifest: Manifest, leaves: Mapping[Path, Leaf], name: str, directory: FilePath) -> None:
    """Raises if the tree called ``name`` lacks a stored path, or has one that is not in the manifest."""
    known = set(manifest.paths)
    for paths, others, where in (
        (manifest.paths, leaves, f"is in {directory}, but not in {name}"),
        (leaves, known, f"is in {name}, but not in {directory}"),
    ):
        for path in paths:
            if path not in others:
                near = "".join(f"\n  {other}" for other in nearest(path, list(others), 3))
                raise ValueError(f"{path}: {where}. Is it another model? The nearest:{near}")
