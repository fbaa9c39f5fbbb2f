"""Compiling ahead of time for GPUs that are not there, with JAX's CUDA plugin and no driver."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lojax.planner.gpus import Gpu, target_config

HINT = (
    "JAX's CUDA plugin, the GPU compiler, is not installed, so nothing was compiled. "
    "Install it (no GPU, no driver and no CUDA libraries are needed, about 500 MB): "
    'pip install "lojax[gpu-plan]", or pip install jax-cuda12-plugin==VERSION where VERSION is that of jaxlib'
)

# Without a device nothing can be timed, so autotuning is off: a gemm takes the default configuration.
_OPTIONS = {"xla_gpu_autotune_level": 0}


def has_gpu_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return any(importlib.util.find_spec(name) is not None for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))


@contextlib.contextmanager
def _compile_only_environment() -> Iterator[None]:
    """The environment in which the plugin does not look for the libraries of CUDA, which only a GPU needs."""
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    unset = name not in os.environ
    if unset:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if unset:
            os.environ.pop(name, None)


def gpu_mesh(gpu: Gpu, axes: Mapping[str, int], *, hosts: int = 1) -> Mesh:
    """A mesh of GPUs to lower and compile for; they cannot run anything.

    The last axis of the mesh changes fastest, so it stays in a host where it fits.

    Args:
        gpu: Their kind.
        axes: The axes of the mesh with their sizes, such as ``{"fsdp": 8}``.
        hosts: Hosts, which divide the devices evenly.

    Raises:
        RuntimeError: The CUDA plugin is missing, or does not compile for this GPU.
    """
    if not has_gpu_compiler():
        raise RuntimeError(HINT)
    devices = _topology(gpu, hosts, math.prod(axes.values()) // hosts)
    return Mesh(np.asarray(devices).reshape(tuple(axes.values())), tuple(axes))


@functools.cache  # the devices of two descriptions of one topology do not go together in a program
def _topology(gpu: Gpu, hosts: int, count: int) -> Sequence[Any]:
    """The devices of ``hosts`` hosts with ``count`` GPUs each."""
    from jax.experimental import topologies

    shape = f"1x{hosts}x{count}"  # slices, hosts of a slice, GPUs of a host
    with _compile_only_environment():
        try:
            config = target_config(gpu)
            return topologies.get_topology_desc(gpu.name, "cuda", target_config=config, topology=shape).devices
        except Exception as error:  # jaxlib raises several kinds of errors here, none of them its own
            raise RuntimeError(
                f"The CUDA plugin does not compile for {hosts} × {count} {gpu.title}: {error}"
            ) from error


def gpu_sharding(gpu: Gpu) -> Sharding:
    """Where the shapes of a program for one GPU are.

    Raises:
        RuntimeError: As `gpu_mesh`.
    """
    return NamedSharding(gpu_mesh(gpu, {"x": 1}), PartitionSpec())


def compiler_options(*, triton: bool = True) -> dict[str, Any]:
    """Options for ``lowered.compile(...)``.

    Args:
        triton: Whether products may become Triton kernels, as a GPU's autotuner may decide; otherwise cuBLAS calls. A
            real run times both and takes the faster one, which nobody can know without the device.
    """
    return _OPTIONS | {"xla_gpu_enable_triton_gemm": triton}


def lower_for_gpu(jitted: Any, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
    """Lowers ``jax.jit(f)`` for the GPUs in the shardings of ``args``, on a machine whose own devices are others."""
    return jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))
