"""Compiling ahead of time for TPUs that are not there, with `jax.experimental.topologies` and libtpu."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from lojax.planner.chips import Topology
from lojax.planner.collectives import Traffic, traffic
from lojax.types import PyTree

HINT = (
    "libtpu, the TPU compiler, is not installed, so nothing was compiled and the formulas' estimate is shown. "
    'Install it for the compiled plan (no TPU is needed): pip install "jax[tpu]"'
)


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _compile_only_environment(topology: Topology) -> Iterator[None]:
    """The environment in which libtpu looks for no TPU, no cloud metadata, and no other process that uses it."""
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{topology.devices}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu locks the TPUs of a host for one process. Nothing is opened here, so several plans may run at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def topology_mesh(topology: Topology, axes: Mapping[str, int]) -> Mesh:
    """A mesh of the devices of ``topology``, to lower and compile for.

    A mesh axis takes whole axes of the torus where possible, and parts of them elsewhere (``data=4,fsdp=16`` on
    8 x 8 devices).

    Raises:
        RuntimeError: libtpu is missing, or does not know the topology.
    """
    if not has_compiler():
        raise RuntimeError(HINT)
    from jax.experimental import mesh_utils, topologies

    shape = tuple(axes.values())
    with _compile_only_environment(topology):
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=str(topology)).devices
            try:
                grid = mesh_utils.create_device_mesh(shape, devices)
            except NotImplementedError:  # its way of saying that the shape splits an axis of the torus
                grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(grid, tuple(axes))
        except Exception as error:  # jaxlib raises several kinds of errors here, none of them its own
            raise RuntimeError(f"libtpu has no mesh for {topology}: {error}") from error


def abstract_mesh(axes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, for shardings whose program is not compiled."""
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@dataclasses.dataclass(frozen=True)
class CompiledCost:
    """What the compiler says about a program, per device.

    Attributes:
        peak_memory: The most bytes in use at once, arguments included.
        traffic: Its collectives; None where the program does not fit into memory.
    """

    peak_memory: int
    traffic: Traffic | None


def compile_cost(lowered: jax.stages.Lowered) -> CompiledCost:
    """Compiles a lowered program and reads memory and traffic. A program that does not fit is not an error."""
    try:
        compiled = lowered.compile()
    except Exception as error:
        # The compiler has no other way to say how much memory a program needs that it cannot place.
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        if used is None:
            raise
        return CompiledCost(int(float(used[1]) * 1024 ** "BKMGT".index(used[2])), None)
    return read_cost(compiled)


def read_cost(compiled: jax.stages.Compiled) -> CompiledCost:
    """The memory and the traffic of a compiled program."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "only backends without a compiler return None"
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated arguments count once
    peak = getattr(memory, "peak_memory_in_bytes", 0) or total  # 0 on backends that do not simulate the schedule
    return CompiledCost(peak, traffic(text))


def shard_bytes(tree: PyTree) -> int:
    """The bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize if x.sharding else 0
        for x in jax.tree.leaves(tree)
    )
