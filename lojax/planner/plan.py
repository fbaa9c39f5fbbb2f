"""What a fine-tuning run will need, before anything is rented: memory, operations, traffic and time of one chip."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from lojax.planner.aot import HINT, abstract_mesh, has_compiler, measure, shard_bytes, topology_mesh
from lojax.planner.chips import AXES, CHIPS, Topology, parse_mesh, parse_topology
from lojax.planner.decoder import TARGETS, Decoder
from lojax.planner.decoder_config import PRESETS, DecoderConfig, preset, read_config
from lojax.planner.flops import count_flops
from lojax.planner.train_step import Work, full_work, lora_work
from lojax.report.table import table
from lojax.wrap import wrap


@dataclasses.dataclass(frozen=True)
class Side:
    """One way of fine-tuning, per chip: bytes of memory by what holds them, operations, and traffic.

    Attributes:
        weights: Bytes of the model's weights.
        adapters: Bytes of the adapters; 0 without.
        optimizer: Bytes of the optimizer's state.
        kept: Bytes of activations kept from forward to backward: the input of every layer.
        temporary: All other bytes at the worst moment, gradients among them.
        flops: Operations of a step, recomputation included.
        moved: Bytes received from other chips in a step.
        collectives: By kind, how many a step runs and the bytes received; empty for an estimate.
        compiled: Whether the compiler said so, or a formula.
    """

    weights: int
    adapters: int
    optimizer: int
    kept: int
    temporary: int
    flops: int
    moved: int
    collectives: Mapping[str, tuple[int, int]]
    compiled: bool

    @property
    def memory(self) -> int:
        """Bytes at the worst moment."""
        return self.weights + self.adapters + self.optimizer + self.kept + self.temporary


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step needs on each chip. Printing it gives the table; `as_dict` is for JSON.

    Attributes:
        config: The model.
        topology: The chips.
        mesh: How they are arranged.
        batch: Sequences in a step, over all chips.
        seq: Their length.
        rank: Of the adapters.
        mfu: The share of the chip's peak at which the time is stated.
        lora: LoRA.
        full: Full fine-tuning, by formula.
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
    lora: Side
    full: Side
    seconds: float
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether LoRA fits."""
        return self.lora.memory <= self.topology.chip.usable

    @property
    def tokens(self) -> int:
        """Tokens in a step, over all chips."""
        return self.batch * self.seq

    @property
    def moved_per_token(self) -> float:
        """Bytes that a chip receives for each token that it works on."""
        return self.lora.moved * self.topology.chips / self.tokens

    def step_seconds(self, side: Side) -> float:
        """The time of a step: its operations at the stated share of the peak, or its traffic if that takes longer."""
        chip = self.topology.chip
        return max(side.flops / (chip.flops * self.mfu), side.moved / chip.link)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        found = dataclasses.asdict(dataclasses.replace(self, topology=self.topology))
        found["topology"] = str(self.topology)
        derived = {"fits": self.fits, "moved_per_token": self.moved_per_token}
        for name, side in (("lora", self.lora), ("full", self.full)):
            found[name] |= {"memory": side.memory, "step_seconds": self.step_seconds(side)}
        return json.loads(json.dumps(found | derived))

    def __str__(self) -> str:
        chip = self.topology.chip
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        sides = (self.lora, self.full)
        fields = ("weights", "adapters", "optimizer", "kept", "temporary", "memory")
        names = ("weights", "adapters", "optimizer", "activations kept", "temporaries", "in all")
        rows = [
            (f"{name}, GB", *(f"{getattr(s, f) / 1e9:.3f}" for s in sides))
            for name, f in zip(names, fields, strict=True)
        ]
        fit = ["yes" if s.memory <= chip.usable else "NO" for s in sides]
        rows.append((f"fits in {chip.usable / 1e9:.2f} GB", *fit))
        rows.append(("operations, T", *(f"{s.flops / 1e12:.2f}" for s in sides)))
        rows.append(("received, GB", *(f"{s.moved / 1e9:.3f}" for s in sides)))
        rows.append((f"step at {self.mfu:.0%} of peak, s", *(f"{self.step_seconds(s):.3f}" for s in sides)))
        rows.append(("counted by", *("compiler" if s.compiled else "formula" for s in sides)))
        lines = [
            f"{self.config.parameters / 1e9:.1f}B parameters on {self.topology} ({self.topology.chips} chips; {mesh}), "
            f"batch {self.batch} × {self.seq}, rank {self.rank}; per chip:",
            table(("", "LoRA", "full fine-tuning"), rows),
        ]
        if self.lora.collectives:
            kinds = [(k, f"{n:,}", f"{b / 1e9:.3f}") for k, (n, b) in self.lora.collectives.items()]
            lines += ["", table(("collective (LoRA)", "runs a step", "GB a chip"), kinds)]
        rate = self.tokens / self.step_seconds(self.lora)
        lines += ["", f"{rate:,.0f} tokens a second; {self.moved_per_token:,.0f} bytes received a chip and token"]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def open_config(config: Any) -> DecoderConfig:
    """A configuration from itself, the name of a preset, or the path of a ``config.json``."""
    if isinstance(config, DecoderConfig):
        return config
    if isinstance(config, str) and config not in PRESETS and not Path(config).exists():
        return preset(config)  # says what there is
    return PRESETS[config] if isinstance(config, str) and config in PRESETS else read_config(os.fspath(config))


def plan(
    config: Any,
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
) -> Plan:
    """What one LoRA step of a Llama-style decoder needs on each chip of a slice that nobody has rented yet.

    The real step (scanned layers, full rematerialization, bfloat16 weights, float32 adapters, Adam) is compiled
    ahead of time with libtpu; no TPU is needed.

    Args:
        config: A `DecoderConfig`, the name of a preset, or the path of a Hugging Face ``config.json``.
        topology: The slice, such as ``"v5e:16x16"``.
        mesh: Its arrangement, such as ``"fsdp=16,tensor=16"``.
        seq: The length of the sequences.
        batch: Their number in a step, over all chips.
        rank: The rank of the adapters.
        targets: Which weights are adapted.
        mfu: The share of the chip's peak at which to state the time.
        spread: As in `lojax.sharding.shardings`.
        compiled: Whether to compile; None compiles where libtpu is installed.

    Returns:
        The `Plan`.

    Raises:
        ValueError: The topology is unknown, the configuration lacks fields, or the mesh does not divide the
            weights or the batch.
        RuntimeError: ``compiled`` is True and libtpu is missing.
    """
    began = time.monotonic()
    shape, where = open_config(config), parse_topology(topology)
    axes = parse_mesh(mesh, where.chips)
    check_batch(axes, batch, seq)
    compiled = has_compiler() if compiled is None else compiled
    decoder = Decoder(shape, topology_mesh(where, axes) if compiled else abstract_mesh(axes))
    model = wrap(decoder.total_loss, targets, rank=rank, alpha=2 * rank, strict=True)
    tx = optax.adam(1e-4)
    work = lora_work(model, decoder, tx, batch=batch, seq=seq, spread=spread)
    lora = estimate(shape, axes, work, batch, seq)
    if compiled:
        lora = _compiled(lora, work)
    full = estimate(shape, axes, full_work(decoder, tx, batch=batch, seq=seq), batch, seq)
    note = "" if compiled else HINT
    return Plan(shape, where, axes, batch, seq, rank, mfu, lora, full, time.monotonic() - began, note)


def check_batch(axes: Mapping[str, int], batch: int, seq: int) -> None:
    """Raises unless the batch and the sequences can be cut as the mesh asks."""
    rows = axes["data"] * axes["fsdp"]
    if batch % rows:
        raise ValueError(
            f"batch={batch} does not divide over data × fsdp = {rows} chips. Take a multiple of {rows}, or more tensor."
        )
    if seq % axes["tensor"]:
        raise ValueError(f"seq={seq} does not divide over tensor = {axes['tensor']} chips.")


def _compiled(estimated: Side, work: Work) -> Side:
    found = measure(work.lower())
    held = estimated.weights + estimated.adapters + estimated.optimizer
    kept = min(estimated.kept, max(0, found.peak - held))
    return dataclasses.replace(
        estimated,
        kept=kept,
        temporary=max(0, found.peak - held - kept),
        moved=found.traffic.moved if found.traffic else estimated.moved,
        collectives=found.traffic.by_kind() if found.traffic else {},
        compiled=True,
    )


def estimate(c: DecoderConfig, axes: Mapping[str, int], work: Work, batch: int, seq: int) -> Side:
    """The estimate by formula: exact for what is held and computed, rough for temporaries and traffic.

    Args:
        c: The model.
        axes: The mesh.
        work: The step; with adapters or without.
        batch: Sequences in a step, over all chips.
        seq: Their length.
    """
    chips = math.prod(axes.values())
    tensor, fsdp = axes["tensor"], axes["fsdp"]
    rows = batch // (axes["data"] * fsdp)
    held = {name: shard_bytes(tree) for name, tree in work.parts.items()}
    stream = rows * seq * c.width * 2
    layer = (c.parameters - c.vocab * c.width * (1 if c.tied else 2)) // c.layers * 2
    group = min(512, seq)
    heads, vocab = -(-c.heads // tensor), -(-c.vocab // tensor)
    working = 6 * stream + 4 * rows * seq * c.mlp // tensor * 2 + layer // tensor
    ends = 3 * rows * group * vocab * 4 + vocab * c.width * 2
    scores = 3 * rows * heads * group * seq * 4
    trained = held["adapters"] if "adapters" in held else held["weights"]
    gathers = 2 * (c.layers * layer + 4 * c.vocab * c.width) // tensor * (fsdp - 1) // fsdp
    exchanges = 14 * c.layers * stream * (tensor - 1) // tensor
    copies = axes["data"] * fsdp
    reduced = (
        2 * trained * (copies - 1) // copies if "adapters" in held else gathers // 2 + 2 * trained * (axes["data"] > 1)
    )
    return Side(
        weights=held["weights"],
        adapters=held.get("adapters", 0),
        optimizer=held["optimizer"],
        kept=c.layers * stream // tensor,
        temporary=trained + working + max(ends, scores),
        flops=count_flops(work.step, *_bare(work.args)) // chips,
        moved=gathers + exchanges + reduced,
        collectives={},
        compiled=False,
    )


def _bare(args: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)


def candidates(c: DecoderConfig, chip: str, batch: int, seq: int) -> list[tuple[Topology, dict[str, int]]]:
    """Every slice of a chip, smallest first, with every mesh that divides model and batch."""
    found = []
    for shape in CHIPS[chip].slices:
        where = parse_topology(f"{chip}:{shape}")
        for tensor in (2**i for i in range(int(math.log2(where.chips)) + 1)):
            fits = not (c.heads % tensor or c.mlp % tensor or c.vocab % tensor or seq % tensor)
            rest = where.chips // tensor
            for data in (2**i for i in range(rest.bit_length())) if fits and rest * tensor == where.chips else ():
                fsdp = rest // data
                divides = rest % data == 0 and not (batch % rest or c.width % fsdp or (c.heads * c.head_dim) % fsdp)
                if divides and (c.kv_heads * c.head_dim) % tensor == 0:
                    found.append((where, dict(zip(AXES, (data, fsdp, tensor), strict=True))))
    return found


def search(
    config: Any, *, chip: str = "v5e", seq: int = 4096, batch: int = 16, compiled: bool | None = None, **settings: Any
) -> Plan:
    """The smallest slice on which the model fits, and on it the mesh with the shortest step.

    Formulas choose the order in which to try; where libtpu is installed the compiler confirms.

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
    shape = open_config(config)
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}; expected one of {', '.join(CHIPS)}.")
    compiled = has_compiler() if compiled is None else compiled
    tried: Plan | None = None
    slices: dict[str, list[Plan]] = {}
    held = 2 * shape.parameters
    for where, axes in candidates(shape, chip, batch, seq):
        if held > where.chips * where.chip.usable * 1.05:  # the weights alone do not fit
            continue
        guess = plan(shape, topology=str(where), mesh=axes, seq=seq, batch=batch, compiled=False, **settings)
        tried = guess
        slices.setdefault(str(where), []).append(guess)
        if axes != _last_mesh(shape, chip, batch, seq, where):
            continue
        for best in sorted((p for p in slices[str(where)] if p.fits), key=lambda p: p.step_seconds(p.lora))[:2]:
            if not compiled:
                return best
            sure = plan(shape, topology=str(where), mesh=best.mesh, seq=seq, batch=batch, compiled=True, **settings)
            if sure.fits:
                return sure
    largest = f"{chip}:{CHIPS[chip].slices[-1]}"
    need = (
        f"{tried.lora.memory / 1e9:.1f} GB a chip on {tried.topology}" if tried else f"{held / 1e9:,.0f} GB of weights"
    )
    raise ValueError(
        f"The model ({shape.parameters / 1e9:,.1f}B parameters) fits on no slice of {chip} up to {largest} with batch "
        f"{batch} × {seq}: it takes {need}, and a chip has {CHIPS[chip].usable / 1e9:.1f} GB. "
        "Take a chip with more memory, a shorter sequence, or a batch that divides over more chips."
    )


def _last_mesh(c: DecoderConfig, chip: str, batch: int, seq: int, where: Topology) -> dict[str, int]:
    return [axes for found, axes in candidates(c, chip, batch, seq) if found == where][-1]
