"""Kinds of NVIDIA GPUs, with the numbers that their makers publish and the text by which XLA compiles for one."""

from __future__ import annotations

import dataclasses

from lojax.text import suggest


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates are peaks: no program reaches them.

    Attributes:
        name: As in ``--gpu``.
        title: As the driver says it.
        memory: Bytes of memory that the driver reports.
        flops: bfloat16 operations a second of the tensor cores, summed in float32, without sparsity.
        vector_flops: float32 operations a second outside of the tensor cores.
        bandwidth: Bytes a second between the chip and its memory.
        link: Bytes a second that it receives from the other GPUs of its host.
        network: Bytes a second that it receives from other hosts, in a host as its maker ships it.
        capability: The compute capability, such as ``(9, 0)``.
        cores: Streaming multiprocessors.
        clock: Their boost clock, GHz.
        l2: Bytes of second-level cache.
    """

    name: str
    title: str
    memory: int
    flops: float
    vector_flops: float
    bandwidth: float
    link: float
    network: float
    capability: tuple[int, int]
    cores: int
    clock: float
    l2: int

    @property
    def usable_memory(self) -> int:
        """The bytes that a program can have where JAX may take 95 %: the driver and the libraries need the rest."""
        return self.memory * 95 // 100

    @property
    def has_bfloat16(self) -> bool:
        """Whether its tensor cores know bfloat16; elsewhere products run in float32, in more memory and time."""
        return self.capability >= (8, 0)

    @property
    def gigabytes(self) -> int:
        """The memory as it is advertised."""
        return min((8, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 180), key=lambda n: abs(n - self.memory / 1.06e9))


# Memory, cores, clock, cache and bandwidth of A100, A6000, H100, H200, B200 and RTX 6000 Pro: the target configurations
# in openxla/xla, xla/backends/gpu/target_config/specs. Everything else: NVIDIA's data sheets of these products, and the
# white papers of Turing, Ampere (GA102), Ada and RTX Blackwell, appendix A; the memory that the driver reports of T4,
# A10, L4, L40S and the GeForce cards: PyTorch's "total capacity" in public reports. Data sheets that give operations
# "with sparsity" are halved. GeForce cards sum in float32 at half of the rate that boxes advertise. Links: half of
# NVLink's bandwidth, which is given for both directions; or PCIe x16. Networks: a 400 Gb/s adapter for each H100, H200
# and B200 (DGX and HGX), 200 Gb/s for each A100, and one of 100 Gb/s among eight elsewhere.
_GIB, _PCIE3, _PCIE4, _PCIE5 = 2**30, 16e9, 32e9, 64e9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", "Tesla T4", 15828320256, 65e12, 8.1e12, 320e9, _PCIE3, 1.6e9, (7, 5), 40, 1.59, 4 << 20),
        Gpu("rtx5080", "NVIDIA GeForce RTX 5080", int(15.47 * _GIB), 112.6e12, 56.3e12, 960e9, _PCIE5, 1.6e9, (12, 0),
            84, 2.617, 64 << 20),
        Gpu("a10", "NVIDIA A10", int(22.06 * _GIB), 125e12, 31.2e12, 600e9, _PCIE4, 1.6e9, (8, 6), 72, 1.695, 6 << 20),
        Gpu("l4", "NVIDIA L4", int(22.03 * _GIB), 121e12, 30.3e12, 300e9, _PCIE4, 1.6e9, (8, 9), 58, 2.04, 48 << 20),
        Gpu("rtx3090", "NVIDIA GeForce RTX 3090", int(23.68 * _GIB), 71e12, 35.6e12, 936e9, _PCIE4, 1.6e9, (8, 6), 82,
            1.695, 6 << 20),
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090", int(23.64 * _GIB), 165.2e12, 82.6e12, 1008e9, _PCIE4, 1.6e9, (8, 9),
            128, 2.52, 72 << 20),
        Gpu("rtx5090", "NVIDIA GeForce RTX 5090", int(31.36 * _GIB), 209.5e12, 104.8e12, 1792e9, _PCIE5, 1.6e9,
            (12, 0), 170, 2.407, 96 << 20),
        Gpu("a100-40", "NVIDIA A100-SXM4-40GB", 42331013120, 312e12, 19.5e12, 1555.2e9, 300e9, 25e9, (8, 0), 108, 1.41,
            40 << 20),
        Gpu("a6000", "NVIDIA RTX A6000", 51041271808, 154.8e12, 38.7e12, 768.096e9, _PCIE4, 1.6e9, (8, 6), 84, 1.8,
            6 << 20),
        Gpu("l40s", "NVIDIA L40S", int(44.39 * _GIB), 362e12, 91.6e12, 864e9, _PCIE4, 1.6e9, (8, 9), 142, 2.52,
            96 << 20),
        Gpu("a100", "NVIDIA A100-SXM4-80GB", 85100068864, 312e12, 19.5e12, 2039.04e9, 300e9, 25e9, (8, 0), 108, 1.41,
            40 << 20),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 84942979072, 989.4e12, 66.9e12, 3352.32e9, 450e9, 50e9, (9, 0), 132, 1.98,
            50 << 20),
        Gpu("rtx6000pro", "NVIDIA RTX PRO 6000 Blackwell", 103079215104, 503.8e12, 126e12, 1792e9, _PCIE5, 1.6e9,
            (12, 0), 188, 2.6, 128 << 20),
        Gpu("h200", "NVIDIA H200 141GB HBM3e", 151397597184, 989.4e12, 66.9e12, 4800e9, 450e9, 50e9, (9, 0), 132, 1.98,
            50 << 20),
        Gpu("b200", "NVIDIA B200", 191514411008, 2250e12, 75e12, 7672.32e9, 900e9, 50e9, (10, 0), 148, 1.965,
            132644864),
    )
}  # fmt: skip

# By compute capability: threads of a multiprocessor, its float32 units, its shared memory, and the most of it that a
# block can have (CUDA C++ Programming Guide, Technical Specifications per Compute Capability).
_MULTIPROCESSORS = {
    (7, 5): (1024, 64, 65536, 65536),
    (8, 0): (2048, 64, 167936, 166912),
    (8, 6): (1536, 128, 102400, 101376),
    (8, 9): (1536, 128, 102400, 101376),
    (9, 0): (2048, 128, 233472, 232448),
    (10, 0): (2048, 128, 233472, 232448),
    (12, 0): (1536, 128, 131072, 101376),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ValueError: There is no such GPU in the table.

    >>> find_gpu("h100").gigabytes
    80
    """
    if name not in GPUS:
        cards = ", ".join(f"{gpu.name} ({gpu.gigabytes} GB)" for gpu in GPUS.values())
        raise ValueError(f"gpu={name!r} is not a known card; expected one of {cards}.{suggest(name, GPUS)}")
    return GPUS[name]


def target_config(gpu: Gpu) -> str:
    """The text of the ``GpuTargetConfigProto`` by which XLA compiles for ``gpu``.

    Its fields are in ``xla/stream_executor/device_description.proto`` of openxla/xla.
    """
    threads, units, shared, shared_by_block = _MULTIPROCESSORS[gpu.capability]
    major, minor = gpu.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": threads,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": shared_by_block,
        "shared_memory_per_core": shared,
        "core_count": gpu.cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(gpu.bandwidth),
        "device_memory_size": gpu.memory,
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock,
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    return (
        f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 8 }\nruntime_version { major: 12 minor: 8 }\n'
        f'device_description_str: "{gpu.title}"\n'
    )
