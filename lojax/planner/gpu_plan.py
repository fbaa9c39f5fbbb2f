"""What a fine-tuning run needs on GPUs: memory, time and traffic of LoRA, QLoRA and full fine-tuning, and which card
holds them."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import optax

from lojax.planner.aot import abstract_mesh, read_cost
from lojax.planner.chips import parse_mesh
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import DecoderConfig, open_config
from lojax.planner.gpu_aot import HINT, compiler_options, gpu_mesh, gpu_sharding, has_gpu_compiler
from lojax.planner.gpus import GPUS, Gpu, find_gpu
from lojax.planner.kernels import GpuCost, gpu_cost
from lojax.planner.plan import Config, StepCost, check_batch, estimate, with_compiled
from lojax.planner.train_step import StepProgram, full_step, lora_step
from lojax.report.table import table
from lojax.types import PyTree
from lojax.wrap import wrap

MOST = 8
"""The GPUs of the largest host."""
RESERVE = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"


@dataclasses.dataclass(frozen=True)
class GpuStep:
    """What one step needs on each GPU.

    Attributes:
        cost: Memory, operations and traffic.
        network: Bytes received from other hosts, among those of ``cost``.
        seconds: The roofline time of the kernels, see `lojax.planner.kernels`; None without the compiler.
    """

    cost: StepCost
    network: int = 0
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """What one step needs. Printing it gives the tables; `as_dict` is for JSON.

    Attributes:
        config: The model.
        gpu: The kind of GPU.
        count: GPUs in a host.
        hosts: Hosts.
        mesh: How the GPUs are arranged.
        batch: Sequences in a step, over all GPUs.
        seq: Their length.
        rank: The rank of the adapters.
        mfu: The fraction of the peak FLOP/s that the time assumes.
        steps: The costs by method: LoRA, QLoRA, full fine-tuning.
        seconds: How long the plan took.
        note: What the reader must know.
    """

    config: DecoderConfig
    gpu: Gpu
    count: int
    hosts: int
    mesh: Mapping[str, int]
    batch: int
    seq: int
    rank: int
    mfu: float
    steps: Mapping[str, GpuStep]
    seconds: float
    note: str

    def fits(self, method: str, gpu: Gpu | None = None) -> bool:
        """Whether a method fits on these GPUs, or on as many of another kind.

        What a step takes hardly depends on the card: 7.79 to 7.88 GB for QLoRA of an 8B on L4, A100, H100 and B200. But
        without bfloat16 the products' operands become float32: 9.51 GB on a T4. So there activations count twice.
        """
        gpu, cost = gpu or self.gpu, self.steps[method].cost
        widened = self.gpu.has_bfloat16 and not gpu.has_bfloat16
        return cost.memory + widened * (cost.saved_activations + cost.temporaries) <= gpu.usable_memory

    def smallest_card(self, method: str) -> Gpu | None:
        """The card with the least memory, ``count`` of them in each host, that holds a method; None if none does."""
        return next((gpu for gpu in by_memory() if self.fits(method, gpu)), None)

    def link_seconds(self, step: GpuStep) -> float:
        """The time that a step's transfers take on the links of a host and between hosts, whichever is longer."""
        return max((step.cost.bytes_received - step.network) / self.gpu.link, step.network / self.gpu.network)

    def step_seconds(self, method: str) -> float:
        """The time of a step: its operations at ``mfu`` of the peak, or its traffic where that takes longer."""
        step = self.steps[method]
        return max(step.cost.flops / (self.gpu.flops * self.mfu), self.link_seconds(step))

    def roofline_seconds(self, method: str) -> float | None:
        """The least time of a step: its kernels, or its traffic if all of it runs beside them; None if not compiled."""
        step = self.steps[method]
        return None if step.seconds is None else max(step.seconds, self.link_seconds(step))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        fields: dict[str, Any] = dataclasses.asdict(self) | {"gpu": self.gpu.name}
        for method, step in self.steps.items():
            card = self.smallest_card(method)
            fields["steps"][method] |= {
                "memory": step.cost.memory,
                "fits": self.fits(method),
                "smallest_card": card and card.name,
                "step_seconds": self.step_seconds(method),
                "roofline_seconds": self.roofline_seconds(method),
            }
        return json.loads(json.dumps(fields))

    def __str__(self) -> str:
        arranged = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        total = self.count * self.hosts
        where = f"{total} × {self.gpu.title}" if total > 1 else f"one {self.gpu.title}"
        hosts = f" in {self.hosts} hosts" if self.hosts > 1 else ""
        return "\n".join(
            [
                f"{self.config.parameters / 1e9:.1f}B parameters on {where}{hosts} ({arranged}), "
                f"batch {self.batch} × {self.seq}, rank {self.rank}; per GPU:",
                self._costs(),
                "",
                *self._collectives(),
                f"Which card holds it, {'alone' if total == 1 else f'{self.count} in a host{hosts}'}?",
                self._cards(),
                "",
                f"Memory a program can have: 95 % of the card, with {RESERVE} in the environment (75 % without).",
                self.note,
            ]
        )

    def _costs(self) -> str:
        steps, usable = self.steps.values(), self.gpu.usable_memory
        names = ("weights", "adapters", "optimizer", "saved_activations", "temporaries", "memory")
        rows = [
            (f"{name.replace('_', ' ')}, GB", *(f"{getattr(step.cost, name) / 1e9:.3f}" for step in steps))
            for name in names
        ]
        roofline = [self.roofline_seconds(method) for method in self.steps]
        rows += [
            (f"fits in {usable / 1e9:.2f} GB", *("yes" if self.fits(method) else "NO" for method in self.steps)),
            ("operations, T", *(f"{step.cost.flops / 1e12:.2f}" for step in steps)),
            ("received in the host, GB", *(f"{(s.cost.bytes_received - s.network) / 1e9:.3f}" for s in steps)),
            ("received from other hosts, GB", *(f"{step.network / 1e9:.3f}" for step in steps)),
            ("roofline step, s", *("" if seconds is None else f"{seconds:.3f}" for seconds in roofline)),
            (f"step at {self.mfu:.0%} of peak, s", *(f"{self.step_seconds(method):.3f}" for method in self.steps)),
            ("tokens/s", *(f"{self.batch * self.seq / self.step_seconds(method):,.0f}" for method in self.steps)),
            ("source", *("compiler" if step.cost.compiled else "formulas" for step in steps)),
        ]
        return table(("", *self.steps), rows)

    def _collectives(self) -> list[str]:
        """The table of collectives, if there are any."""
        kinds = list(dict.fromkeys(kind for step in self.steps.values() for kind in step.cost.collectives))
        if not kinds:
            return []
        rows = []
        for kind in kinds:
            pairs = [step.cost.collectives.get(kind, (0, 0)) for step in self.steps.values()]
            rows.append((kind, *(f"{n:,} × = {size / 1e9:.3f}" for n, size in pairs)))
        return [table(("runs a step, GB received", *self.steps), rows), ""]

    def _cards(self) -> str:
        rows = []
        for gpu in by_memory():
            fits = ("yes" if self.fits(method, gpu) else "-" for method in self.steps)
            name = gpu.name if gpu.has_bfloat16 else f"{gpu.name} (no bfloat16)"
            rows.append((name, f"{gpu.gigabytes}", *fits))
        return table(("card", "GB", *self.steps), rows)


def by_memory() -> list[Gpu]:
    """The cards of the table, smallest first."""
    return sorted(GPUS.values(), key=lambda gpu: gpu.memory)


def plan_gpus(
    config: Config,
    *,
    gpu: str,
    count: int = 1,
    hosts: int = 1,
    mesh: str | Mapping[str, int] | None = None,
    seq: int = 4096,
    batch: int | None = None,
    rank: int = 16,
    targets: Any = TARGETS,
    mfu: float = 0.4,
    quantized: str = "nf4",
    compiled: bool | None = None,
) -> GpuPlan:
    """What a step of LoRA, of QLoRA and of full fine-tuning of a Llama-style decoder needs on each GPU.

    The real steps (scanned layers, full rematerialization, bfloat16 weights, float32 adapters, Adam) are compiled ahead
    of time with JAX's CUDA plugin; no GPU is needed. QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is LoRA on
    quantized linear layers; embedding, head and norms stay bfloat16.

    Args:
        config: A `DecoderConfig`, the name of a preset, or the path of a Hugging Face ``config.json``.
        gpu: The kind of GPU, such as ``"h100"``; `lojax.planner.gpus.GPUS` has them all.
        count: GPUs in a host, 1 to 8.
        hosts: Hosts.
        mesh: How they are arranged, such as ``"fsdp=4,tensor=2"``; by default ``fsdp`` within a host and ``data``
            between hosts, so that only the gradients of what trains cross the network.
        seq: The length of the sequences.
        batch: Sequences in a step, over all GPUs; by default one for each.
        rank: The rank of the adapters.
        targets: Which weights are adapted.
        mfu: The fraction of the peak FLOP/s that the time assumes.
        quantized: The kind of quantization of QLoRA.
        compiled: Whether to compile; None compiles where the plugin is installed.

    Returns:
        The `GpuPlan`.

    Raises:
        ValueError: There is no such GPU, no host with that many, the configuration lacks fields, or the mesh does not
            divide the weights or the batch.
        RuntimeError: ``compiled`` is True and the plugin is missing.
    """
    start = time.monotonic()
    config, card = open_config(config), find_gpu(gpu)
    _check_count(count, hosts)
    axes = parse_mesh({"data": hosts, "fsdp": count} if mesh is None else mesh, count * hosts)
    batch = count * hosts if batch is None else batch
    check_batch(axes, batch, seq)
    compiled = has_gpu_compiler() if compiled is None else compiled
    decoder = Decoder(config, gpu_mesh(card, axes, hosts=hosts) if compiled else abstract_mesh(axes))
    model = wrap(decoder.total_loss, targets, rank=rank, alpha=2 * rank, strict=True)
    tx = optax.adam(1e-4)
    # Adapters spread over hosts would be gathered over the network in every layer; they are small enough not to be.
    lora = functools.partial(lora_step, model, decoder, tx, batch=batch, seq=seq, spread=hosts == 1)
    programs = {
        "LoRA": lora(),
        f"QLoRA ({quantized})": lora(quantized=quantized),
        "full fine-tuning": full_step(decoder, tx, batch=batch, seq=seq),
    }
    steps = {
        method: _step(program, estimate(config, axes, program, batch, seq), card, count, compiled)
        for method, program in programs.items()
    }
    note = f"Compiled for the {card.title}; nothing was run." if compiled else HINT
    taken = time.monotonic() - start
    return GpuPlan(config, card, count, hosts, axes, batch, seq, rank, mfu, steps, taken, note)


def _check_count(count: int, hosts: int) -> None:
    if not 1 <= count <= MOST:
        raise ValueError(
            f"count={count}; a host has 1 to {MOST} GPUs. "
            f"For more, give the GPUs of a host and the number of hosts, such as count={MOST}, hosts=2."
        )
    if hosts < 1:
        raise ValueError(f"hosts={hosts}; expected a whole number of at least 1.")


def _step(program: StepProgram, estimated: StepCost, gpu: Gpu, per_host: int, compiled: bool) -> GpuStep:
    if not compiled:
        return GpuStep(estimated)
    binary = program.lower().compile(compiler_options())
    cost = read_cost(binary)
    network = cost.traffic.bytes_from_other_hosts(per_host) if cost.traffic else 0
    return GpuStep(with_compiled(estimated, cost), network, gpu_cost(binary, gpu).seconds)


def cost_on_gpu(step: Any, *args: PyTree, gpu: str = "h100", triton: bool = True) -> GpuCost:
    """What a step of your own net costs on one GPU that is not there.

    Args:
        step: A function of arrays, jitted (with its donated arguments) or not.
        *args: Its arguments, as arrays or shapes.
        gpu: The kind of GPU.
        triton: Whether products are Triton kernels; otherwise cuBLAS calls.

    Raises:
        ValueError: There is no such GPU.
        RuntimeError: The CUDA plugin is missing.
    """
    sharding = gpu_sharding(find_gpu(gpu))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    jitted = step if hasattr(step, "lower") else jax.jit(step)
    return gpu_cost(jitted.lower(*shapes).compile(compiler_options(triton=triton)), find_gpu(gpu))
