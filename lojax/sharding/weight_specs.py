"""How the weights of a net are sharded: read from the user's specs, from their boxes, or from the arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.linen.spmd import logical_to_mesh
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten, path_of
from lojax.quantized.quantized import Quantized
from lojax.text import suggest
from lojax.types import Leaf, Params, Path, PyTree, Shape

AnyMesh: TypeAlias = Mesh | AbstractMesh
Rules: TypeAlias = Sequence[tuple[str, str | tuple[str, ...] | None]]
"""Logical axis names and the mesh axes that they are sharded over; see `flax.linen.logical_to_mesh`."""


def weight_specs(params: Params, specs: PyTree, rules: Rules | None) -> dict[Path, PartitionSpec]:
    """The spec of every weight by path, with one entry for each of its axes.

    Args:
        params: Arrays or shapes; None where there is no weight.
        specs: The user's specs, as `lojax.sharding.shardings` takes them; they win over boxes and arrays.
        rules: Logical axis names and the mesh axes that they are sharded over.
    """
    given_specs = _flatten_specs(specs)
    weights = flatten(params)
    for path in sorted(given_specs):
        if not any(weight == path or weight.startswith(f"{path}/" if path else "") for weight in weights):
            raise ValueError(
                f"specs holds {path or '(the whole tree)'!r}, but the parameters have no such path."
                f"{suggest(path, weights)} Pass a tree with the structure of the parameters, or of its upper levels."
            )
    spec_by_path: dict[Path, PartitionSpec] = {}
    for path, leaf in weights.items():
        if leaf is not None:
            spec = _nearest_spec(given_specs, path)
            spec_by_path[path] = _pad_spec(_own_spec(leaf, rules) if spec is None else spec, unbox(leaf).shape, path)
    return spec_by_path


def find_mesh(*trees: PyTree) -> AnyMesh | None:
    """The mesh of the first array or shape that is on one, else the mesh set by `jax.set_mesh`, else None."""
    for leaf in jax.tree.leaves(trees, is_leaf=lambda x: isinstance(x, NamedSharding)):
        sharding = leaf if isinstance(leaf, NamedSharding) else _sharding(leaf)
        if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
            return sharding.mesh
    current = jax.sharding.get_mesh()
    return None if current.empty else current


def _sharding(leaf: Leaf) -> Sharding | None:
    # A tracer has no sharding of its own, only its type has.
    return jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)


def _own_spec(leaf: Leaf, rules: Rules | None) -> PartitionSpec:
    """What the box of a leaf says, or the sharding of its array."""
    if isinstance(leaf, meta.AxisMetadata):
        spec = nn.get_partition_spec(leaf)
        return logical_to_mesh(spec, rules) if isinstance(leaf, nn.LogicallyPartitioned) or rules else spec
    if isinstance(leaf, Quantized):
        codes = leaf.arrays["codes"]
        spec = _own_spec(codes, rules)
        # The last axis of codes is that of the weight, or all of its axes that have no axis of their own in the codes.
        return spec if len(codes.shape) == leaf.ndim else PartitionSpec(*spec[: leaf.format.leading(leaf.shape)])
    sharding = _sharding(leaf)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def is_spec(node: object) -> bool:
    """Whether ``node`` is a spec."""
    return isinstance(node, PartitionSpec)


def stored_specs(weight: Quantized, spec: PartitionSpec, mesh: AnyMesh) -> Quantized:
    """The specs of what a quantized weight stores: each axis is sharded like the axis of the weight that it stands for.

    Args:
        weight: Arrays or shapes.
        spec: The spec of the weight, one entry for each of its axes.
        mesh: The mesh. An axis that it does not divide is replicated: scales are few.
    """

    def entry(shape: Shape, axis: int) -> Any:
        merged = len(shape) < weight.ndim and axis == len(shape) - 1 and shape[axis] != weight.shape[axis]
        shards = math.prod(mesh.shape[name] for name in mesh_axes(spec[axis]))
        return None if merged or shape[axis] % shards else spec[axis]

    arrays: dict[str, Any] = {
        name: PartitionSpec(*(entry(tuple(x.shape), axis) for axis in range(len(x.shape))))
        for name, x in weight.arrays.items()
    }
    return dataclasses.replace(weight, arrays=arrays)


def _flatten_specs(specs: PyTree) -> dict[Path, PartitionSpec]:
    """The user's specs by path."""
    if isinstance(specs, nnx.Module):
        specs = nnx.get_partition_spec(nnx.state(specs, nnx.Param))
    if isinstance(specs, nnx.State):
        specs = nnx.to_pure_dict(specs)
    kinds = (PartitionSpec, NamedSharding)
    leaves, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, kinds))
    for keys, leaf in leaves:
        if not isinstance(leaf, kinds):
            raise TypeError(
                f"specs holds {leaf!r} at {path_of(keys) or 'its root'}; expected a PartitionSpec or a NamedSharding."
            )
    return {path_of(keys): leaf.spec if isinstance(leaf, NamedSharding) else leaf for keys, leaf in leaves}


def _nearest_spec(specs: Mapping[Path, PartitionSpec], path: Path) -> PartitionSpec | None:
    """The spec for this path, or for the nearest level above it."""
    while path and path not in specs:
        path = path.rpartition("/")[0]
    return specs.get(path)


def _pad_spec(spec: PartitionSpec, shape: Shape, path: Path) -> PartitionSpec:
    if len(spec) > len(shape):
        raise ValueError(
            f"{path}: {spec} has {len(spec)} entries for a weight of shape {tuple(shape)}. "
            f"Give at most {len(shape)}, one for each axis."
        )
    return PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a spec names.

    >>> mesh_axes(None), mesh_axes("data"), mesh_axes(("data", "fsdp"))
    ((), ('data',), ('data', 'fsdp'))
    """
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def check_divides(mesh: AnyMesh, spec: PartitionSpec, shape: Shape, path: Path) -> None:
    """Raises unless the mesh has the axes of ``spec`` and their sizes divide those of the weight."""
    for axis, (entry, size) in enumerate(zip(spec, shape, strict=True)):
        names = mesh_axes(entry)
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"{path} is sharded over the mesh axis {name!r}, but the mesh has {dict(mesh.shape)}."
                    f"{suggest(name, mesh.shape)} Rename an axis of the mesh, or pass specs= or rules=."
                )
        shards = math.prod(mesh.shape[name] for name in names)
        if size % shards:
            raise ValueError(
                f"{path}: axis {axis} of shape {tuple(shape)} is sharded over {' × '.join(names)} = {shards} devices, "
                f"but {size} is not a multiple of {shards}. Choose another mesh, or replicate this axis with specs=."
            )
