"""How the weights of a net lie on a mesh: read off the arrays, their boxes, or what the user says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.linen.spmd import logical_to_mesh
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten, path_of


def weight_specs(params: Any, specs: Any, rules: Sequence[tuple[str, Any]] | None) -> dict[str, PartitionSpec]:
    """The spec of every weight by path, with one entry for each of its axes.

    Args:
        params: Arrays or shapes; None where there is no weight.
        specs: What the user says, as `lojax.sharding.shardings` takes it; it wins over the rest.
        rules: Logical axis names and the mesh axes they lie over; see `flax.linen.logical_to_mesh`.
    """
    said = _said(specs)
    known = set(flatten(params))
    unknown = sorted(path for path in said if not _covers(path, known))
    if unknown:
        raise ValueError(
            f"specs holds {unknown[0] or '(the whole tree)'!r}, which is no part of the parameters. "
            "Give a tree of the parameters' structure, or of its upper levels."
        )
    found = {}
    for path, leaf in flatten(params).items():
        if leaf is None:
            continue
        spec = _longest(said, path)
        spec = spec if spec is not None else _own(leaf, rules)
        found[path] = _padded(spec, unbox(leaf).shape, path)
    return found


def find_mesh(*trees: Any) -> Any:
    """The mesh of the first array or shape that lies on one, else the mesh set by `jax.set_mesh`, else None."""
    for leaf in jax.tree.leaves(trees, is_leaf=lambda x: isinstance(x, NamedSharding)):
        sharding = leaf if isinstance(leaf, NamedSharding) else _sharding(leaf)
        if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
            return sharding.mesh
    current = jax.sharding.get_mesh() if hasattr(jax.sharding, "get_mesh") else None
    return None if current is None or current.empty else current


def _sharding(leaf: Any) -> Any:
    return jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)


def _own(leaf: Any, rules: Sequence[tuple[str, Any]] | None) -> PartitionSpec:
    """What the box of a leaf says, or the sharding of its array."""
    if isinstance(leaf, meta.AxisMetadata):
        spec = nn.get_partition_spec(leaf)
        if isinstance(leaf, nn.LogicallyPartitioned) or rules:
            spec = logical_to_mesh(spec, rules=rules) if rules is not None else logical_to_mesh(spec)
        return spec
    sharding = _sharding(leaf)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _said(specs: Any) -> dict[str, PartitionSpec]:
    """The user's specs by path."""
    if specs is None:
        return {}
    if isinstance(specs, nnx.Module):
        specs = nnx.get_partition_spec(nnx.state(specs, nnx.Param))
    if isinstance(specs, nnx.State):
        specs = nnx.to_pure_dict(specs)
    kinds = (PartitionSpec, NamedSharding)
    leaves, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, kinds))
    found = {}
    for keys, leaf in leaves:
        if not isinstance(leaf, kinds):
            raise TypeError(
                f"specs holds {leaf!r} at {path_of(keys) or 'its root'}; expected a PartitionSpec or a NamedSharding."
            )
        found[path_of(keys)] = leaf.spec if isinstance(leaf, NamedSharding) else leaf
    return found


def _covers(prefix: str, paths: set[str]) -> bool:
    return not prefix or any(path == prefix or path.startswith(prefix + "/") for path in paths)


def _longest(said: Mapping[str, PartitionSpec], path: str) -> PartitionSpec | None:
    """The spec said for this path, or for the nearest level above it."""
    while path not in said:
        if not path:
            return None
        path = path.rpartition("/")[0]
    return said[path]


def _padded(spec: PartitionSpec, shape: Sequence[int], path: str) -> PartitionSpec:
    if len(spec) > len(shape):
        raise ValueError(f"{path}: {spec} has {len(spec)} entries for a weight of shape {tuple(shape)}.")
    return PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))


def check_divides(mesh: Any, spec: PartitionSpec, shape: Sequence[int], path: str) -> None:
    """Raises unless the mesh has the axes of ``spec`` and their sizes divide those of the weight."""
    for axis, (names, size) in enumerate(zip(spec, shape, strict=True)):
        names = () if names is None or names is PartitionSpec.UNCONSTRAINED else names
        names = names if isinstance(names, tuple) else (names,)
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"{path} lies over the mesh axis {name!r}, but the mesh has {dict(mesh.shape)}. "
                    "Rename an axis of the mesh, or give specs= or rules=."
                )
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(
                f"{path}: axis {axis} of shape {tuple(shape)} lies over {' × '.join(names)} = {parts} chips, and "
                f"{size} is no multiple of {parts}. Choose another mesh, or leave this axis whole with specs=."
            )
