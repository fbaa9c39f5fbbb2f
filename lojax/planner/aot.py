"""Compiling for chips that are not there: `jax.experimental.topologies` and the TPU compiler in libtpu."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from lojax.planner.chips import Topology
from lojax.planner.collectives import Traffic, traffic

HINT = (
    "libtpu, the TPU compiler, is not installed, so this is the estimate by formula and nothing was compiled. "
    'Install it for the compiled plan (no TPU is needed): pip install "jax[tpu]"'
)


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _without_a_machine(topology: Topology) -> Iterator[None]:
    """The environment in which libtpu looks for no TPU, no cloud metadata, and no other process that uses it."""
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{topology.chips}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so several plans at once are no danger
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def topology_mesh(topology: Topology, axes: Mapping[str, int]) -> Mesh:
    """A mesh of the chips of ``topology``, to lower and compile for.

    An axis of the mesh takes whole axes of the torus where that can be, and parts of them elsewhere (``data=4,fsdp=16``
    on 8 x 8 chips).

    Raises:
        RuntimeError: libtpu is missing, or does not know the topology.
    """
    if not has_compiler():
        raise RuntimeError(HINT)
    from jax.experimental import mesh_utils, topologies

    shape = tuple(axes.values())
    with _without_a_machine(topology):
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=str(topology))
            try:
                chips = mesh_utils.create_device_mesh(shape, found.devices)
            except NotImplementedError:
                chips = mesh_utils.create_device_mesh(shape, found.devices, allow_split_physical_axes=True)
            return Mesh(chips, tuple(axes))
        except Exception as error:  # jaxlib raises several kinds, none of them its own
            raise RuntimeError(f"libtpu does not give a mesh for {topology}: {error}") from error


def abstract_mesh(axes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no chips at all, to count on."""
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the compiler says of a program, per chip.

    Attributes:
        peak: The most bytes in use at once, arguments included.
        arguments: The bytes of the arguments.
        fits: Whether the compiler could place it in the chip's memory.
        traffic: Its collectives; None where it does not fit.
    """

    peak: int
    arguments: int
    fits: bool
    traffic: Traffic | None


def measure(lowered: Any) -> Measured:
    """Compiles a lowered program and reads off memory and traffic. One that does not fit is a finding, no error."""
    try:
        compiled = lowered.compile()
    except Exception as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        if used is None:
            raise
        return Measured(int(float(used[1]) * 1024 ** "BKMGT".index(used[2])), 0, False, None)
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0) or total
    return Measured(peak, memory.argument_size_in_bytes, True, traffic(compiled.as_text()))


def shard_bytes(tree: Any) -> int:
    """The bytes that one chip holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize if x.sharding else 0
        for x in jax.tree.leaves(tree)
    )
