"""What a fine-tuning run needs on each device, before anything is rented: memory, operations, traffic and time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import optax

from lojax.planner.aot import (
    HINT,
    CompiledCost,
    abstract_mesh,
    compile_cost,
    has_compiler,
    shard_bytes,
    topology_mesh,
)
from lojax.planner.chips import AXES, CHIPS, Topology, parse_mesh, parse_topology
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import DecoderConfig, open_config
from lojax.planner.flops import count_flops
from lojax.planner.train_step import StepProgram, full_step, lora_step
from lojax.report.table import table
from lojax.text import suggest
from lojax.wrap import wrap

Config: TypeAlias = DecoderConfig | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step needs on each device.

    Attributes:
        weights: Bytes of the model's weights.
        adapters: Bytes of the adapters; 0 without.
        optimizer: Bytes of the optimizer's state.
        saved_activations: Bytes of activations saved from forward to backward: the input of every layer.
        temporaries: All other bytes at the peak, gradients among them.
        flops: Operations, recomputation included.
        bytes_received: Bytes received from other devices.
        collectives: By kind, how many run and the bytes received; empty for an estimate.
        compiled: Whether this comes from the compiler or from formulas.
    """

    weights: int
    adapters: int
    optimizer: int
    saved_activations: int
    temporaries: int
    flops: int
    bytes_received: int
    collectives: Mapping[str, tuple[int, int]]
    compiled: bool

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.adapters + self.optimizer + self.saved_activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step needs. Printing it gives the table; `as_dict` is for JSON.

    Attributes:
        config: The model.
        topology: The slice.
        mesh: How its devices are arranged.
        batch: Sequences in a step, over all devices.
        seq: Their length.
        rank: The rank of the adapters.
        mfu: The fraction of the chip's peak FLOP/s that the time assumes.
        lora: The cost of LoRA.
        full: The cost of full fine-tuning, by formulas.
        seconds: How long the plan took.
        note: What the reader must know, or "".
    """

    config: DecoderConfig
    topology: Topology
    mesh: Mapping[str, int]
    batch: int
    seq: int
    rank: int
    mfu: float
    lora: StepCost
    full: StepCost
    seconds: float
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether LoRA fits into memory."""
        return self.lora.memory <= self.topology.chip.usable_memory

    @property
    def tokens(self) -> int:
        """Tokens in a step, over all devices."""
        return self.batch * self.seq

    @property
    def bytes_received_per_token(self) -> float:
        """Bytes that a device receives for each token that it processes."""
        return self.lora.bytes_received * self.topology.devices / self.tokens

    def step_seconds(self, cost: StepCost) -> float:
        """The time of a step: its operations at ``mfu`` of the peak, or its traffic where that takes longer."""
        chip = self.topology.chip
        return max(cost.flops / (chip.flops * self.mfu), cost.bytes_received / chip.bandwidth)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        fields = dataclasses.asdict(self) | {"topology": str(self.topology), "fits": self.fits}
        fields["bytes_received_per_token"] = self.bytes_received_per_token
        for name, cost in (("lora", self.lora), ("full", self.full)):
            fields[name] |= {"memory": cost.memory, "step_seconds": self.step_seconds(cost)}
        return json.loads(json.dumps(fields))

    def __str__(self) -> str:
        usable = self.topology.chip.usable_memory
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        costs = (self.lora, self.full)
        fields = ("weights", "adapters", "optimizer", "saved_activations", "temporaries", "memory")
        rows = [
            (f"{name.replace('_', ' ')}, GB", *(f"{getattr(cost, name) / 1e9:.3f}" for cost in costs))
            for name in fields
        ]
        rows += [
            (f"fits in {usable / 1e9:.2f} GB", *("yes" if cost.memory <= usable else "NO" for cost in costs)),
            ("operations, T", *(f"{cost.flops / 1e12:.2f}" for cost in costs)),
            ("received, GB", *(f"{cost.bytes_received / 1e9:.3f}" for cost in costs)),
            (f"step at {self.mfu:.0%} of peak, s", *(f"{self.step_seconds(cost):.3f}" for cost in costs)),
            ("source", *("compiler" if cost.compiled else "formulas" for cost in costs)),
        ]
        lines = [
            f"{self.config.parameters / 1e9:.1f}B parameters on {self.topology} ({self.topology.devices} devices; "
            f"{mesh}), batch {self.batch} × {self.seq}, rank {self.rank}; per device:",
            table(("", "LoRA", "full fine-tuning"), rows),
        ]
        if self.lora.collectives:
            kinds = [(k, f"{n:,}", f"{b / 1e9:.3f}") for k, (n, b) in self.lora.collectives.items()]
            lines += ["", table(("collective (LoRA)", "runs a step", "GB a device"), kinds)]
        rate = self.tokens / self.step_seconds(self.lora)
        lines += ["", f"{rate:,.0f} tokens/s; {self.bytes_received_per_token:,.0f} bytes received per device and token"]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def plan(
    config: Config,
    *,
    topology: str,
    mesh: str | Mapping[str, int],
    seq: int = 4096,
    batch: int = 16,
    rank: int = 16,
    targets: Any = TARGETS,
    mfu: float = 0.4,
    spread: bool = True,
    compiled: bool | None = None,
    quantized: str | None = None,
) -> Plan:
    """What one LoRA step of a Llama-style decoder needs on each device of a slice that nobody has rented yet.

    The real step (scanned layers, full rematerialization, bfloat16 weights, float32 adapters, Adam) is compiled
    ahead of time with libtpu; no TPU is needed.

    Args:
        config: A `DecoderConfig`, the name of a preset, or the path of a Hugging Face ``config.json``.
        topology: The slice, such as ``"v5e:16x16"``.
        mesh: How its devices are arranged, such as ``"fsdp=16,tensor=16"``.
        seq: The length of the sequences.
        batch: Sequences in a step, over all devices.
        rank: The rank of the adapters.
        targets: Which weights are adapted.
        mfu: The fraction of the chip's peak FLOP/s that the time assumes.
        spread: As in `lojax.sharding.shardings`.
        compiled: Whether to compile; None compiles where libtpu is installed.
        quantized: The kind of quantization of the linear layers of the blocks, such as ``"nf4"``; None for none.

    Returns:
        The `Plan`.

    Raises:
        ValueError: The topology is unknown, the configuration lacks fields, or the mesh does not divide the
            weights or the batch.
        RuntimeError: ``compiled`` is True and libtpu is missing.
    """
    start = time.monotonic()
    config, tpu_slice = open_config(config), parse_topology(topology)
    axes = parse_mesh(mesh, tpu_slice.devices)
    check_batch(axes, batch, seq)
    compiled = has_compiler() if compiled is None else compiled
    decoder = Decoder(config, topology_mesh(tpu_slice, axes) if compiled else abstract_mesh(axes))
    model = wrap(decoder.total_loss, targets, rank=rank, alpha=2 * rank, strict=True)
    tx = optax.adam(1e-4)
    program = lora_step(model, decoder, tx, batch=batch, seq=seq, spread=spread, quantized=quantized)
    lora = estimate(config, axes, program, batch, seq)
    if compiled:
        lora = with_compiled(lora, compile_cost(program.lower()))
    full = estimate(config, axes, full_step(decoder, tx, batch=batch, seq=seq), batch, seq)
    seconds = time.monotonic() - start
    return Plan(config, tpu_slice, axes, batch, seq, rank, mfu, lora, full, seconds, "" if compiled else HINT)


def check_batch(axes: Mapping[str, int], batch: int, seq: int) -> None:
    """Raises unless the mesh divides the batch and the sequences."""
    rows = axes["data"] * axes["fsdp"]
    if batch % rows:
        raise ValueError(
            f"batch={batch} is not a multiple of data × fsdp = {rows} devices. "
            f"Take a multiple of {rows}, or a mesh with more tensor."
        )
    if seq % axes["tensor"]:
        raise ValueError(
            f"seq={seq} is not a multiple of tensor = {axes['tensor']} devices. "
            f"Take a multiple of {axes['tensor']}, or a mesh with less tensor."
        )


def with_compiled(estimated: StepCost, cost: CompiledCost) -> StepCost:
    """The estimate with what the compiler says. It knows the peak but not what holds it; formulas divide it."""
    rest = max(0, cost.peak_memory - estimated.weights - estimated.adapters - estimated.optimizer)
    saved = min(estimated.saved_activations, rest)
    return dataclasses.replace(
        estimated,
        saved_activations=saved,
        temporaries=rest - saved,
        bytes_received=cost.traffic.bytes_received if cost.traffic else estimated.bytes_received,
        collectives=cost.traffic.by_kind() if cost.traffic else {},
        compiled=True,
    )


def estimate(config: DecoderConfig, axes: Mapping[str, int], program: StepProgram, batch: int, seq: int) -> StepCost:
    """The estimate by formulas: exact for arrays and operations, rough for temporaries and traffic.

    Args:
        config: The model.
        axes: The mesh.
        program: The step, with adapters or without.
        batch: Sequences in a step, over all devices.
        seq: Their length.
    """
    c, tensor, fsdp, replicas = config, axes["tensor"], axes["fsdp"], axes["data"] * axes["fsdp"]
    rows, chunk = batch // replicas, min(512, seq)
    argument_bytes = {kind: shard_bytes(tree) for kind, tree in program.args_by_kind.items()}
    adapters = argument_bytes.get("adapters", 0)
    trained = adapters or argument_bytes["weights"]
    hidden = rows * seq * c.width * 2  # bytes of the hidden states of a device's rows, bfloat16
    layer = (c.parameters - c.vocab * c.width * (1 if c.tied else 2)) // c.layers * 2  # bytes of a layer's weights

    # The peak is inside one layer: its activations and its gathered weights, with a chunk of logits and the head, or
    # with a chunk of attention scores. The small integers say how many such buffers are alive at once. A test holds
    # memory and traffic to a factor of three of what libtpu compiles.
    layer_temporaries = 6 * hidden + 4 * rows * seq * c.mlp // tensor * 2 + layer // tensor
    vocab = -(-c.vocab // tensor)
    logits = 3 * rows * chunk * vocab * 4 + vocab * c.width * 2
    scores = 3 * rows * -(-c.heads // tensor) * chunk * seq * 4

    # Forward and backward each gather every weight over fsdp. Over tensor, the hidden states of a layer change from
    # sharded positions to sharded heads and back 14 times: forward, recomputed and backward. Gradients are summed over
    # the replicas, and an all-reduce moves them twice.
    gathers = 2 * (c.layers * layer + 4 * c.vocab * c.width) // tensor * (fsdp - 1) // fsdp
    exchanges = 14 * c.layers * hidden * (tensor - 1) // tensor
    if adapters:
        reductions = 2 * trained * (replicas - 1) // replicas
    else:
        reductions = gathers // 2 + 2 * trained * (axes["data"] > 1)
    return StepCost(
        weights=argument_bytes["weights"],
        adapters=adapters,
        optimizer=argument_bytes["optimizer"],
        saved_activations=c.layers * hidden // tensor,
        temporaries=trained + layer_temporaries + max(logits, scores),
        flops=_count_step_flops(config, program) // math.prod(axes.values()),
        bytes_received=gathers + exchanges + reductions,
        collectives={},
        compiled=False,
    )


_step_flops: dict[Hashable, int] = {}  # by model and arguments: `search` asks for the same step on every mesh


def _count_step_flops(config: DecoderConfig, program: StepProgram) -> int:
    """The operations of a step on all devices together. They do not depend on the mesh, and to trace takes seconds."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.args)
    leaves, tree = jax.tree.flatten(shapes)
    key = (config, tree, tuple((x.shape, x.dtype) for x in leaves))
    if key not in _step_flops:
        _step_flops[key] = count_flops(program.step, *shapes)
    return _step_flops[key]


def candidates(config: DecoderConfig, chip: str, batch: int, seq: int) -> Iterator[tuple[Topology, dict[str, int]]]:
    """Every slice of a chip, smallest first, with every mesh that divides model and batch."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for shape in CHIPS[chip].slices:
        topology = parse_topology(f"{chip}:{shape}")
        powers = [2**i for i in range(topology.devices.bit_length())]
        for tensor, data in itertools.product(powers, powers):
            fsdp, remainder = divmod(topology.devices, tensor * data)
            if remainder or batch % (data * fsdp) or config.width % fsdp or heads % fsdp:
                continue
            if not any(n % tensor for n in (config.heads, kv_heads, config.mlp, config.vocab, seq)):
                yield topology, dict(zip(AXES, (data, fsdp, tensor), strict=True))


def search(
    config: Config,
    *,
    chip: str = "v5e",
    seq: int = 4096,
    batch: int = 16,
    compiled: bool | None = None,
    **settings: Any,
) -> Plan:
    """The smallest slice that the model fits on, with the mesh whose step is shortest.

    Formulas rank the meshes of a slice; where libtpu is installed the compiler confirms the best two.

    Args:
        config: As in `plan`.
        chip: The kind of chip.
        seq: As in `plan`.
        batch: As in `plan`.
        compiled: As in `plan`.
        **settings: As in `plan`.

    Raises:
        ValueError: The model fits on no slice of this chip.
    """
    config = open_config(config)
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}; expected one of {', '.join(CHIPS)}.{suggest(chip, CHIPS)}")
    compiled = has_compiler() if compiled is None else compiled
    run = {"seq": seq, "batch": batch, **settings}
    weights = config.parameters * (2 if settings.get("quantized") is None else 0.5)  # at the least
    largest: Plan | None = None
    for topology, group in itertools.groupby(candidates(config, chip, batch, seq), key=lambda pair: pair[0]):
        if weights > topology.devices * topology.chip.usable_memory * 1.05:  # the weights alone do not fit
            continue
        plans = [plan(config, topology=str(topology), mesh=axes, compiled=False, **run) for _, axes in group]
        largest = plans[-1]
        for best in sorted((p for p in plans if p.fits), key=lambda p: p.step_seconds(p.lora))[:2]:
            sure = plan(config, topology=str(topology), mesh=best.mesh, compiled=True, **run) if compiled else best
            if sure.fits:
                return sure
    need = (
        f"{largest.lora.memory / 1e9:.1f} GB a device on {largest.topology}"
        if largest
        else f"{weights / 1e9:,.0f} GB of weights"
    )
    raise ValueError(
        f"The model ({config.parameters / 1e9:,.1f}B parameters) fits on no slice of {chip} up to "
        f"{chip}:{CHIPS[chip].slices[-1]} with batch {batch} × {seq}: it takes {need}, and a device has "
        f"{CHIPS[chip].usable_memory / 1e9:.1f} GB. "
        "Take a chip with more memory, a shorter sequence, or a batch that divides over more devices."
    )
