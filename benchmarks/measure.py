"""How every benchmark measures and reports: XLA's own counts, alternated clocks, one JSON and one table.

XLA counts the floating-point operations, the bytes accessed and the temporary memory of a compiled program; a busy
machine does not change them. Clocks are only for what XLA cannot count. Then all programs run in turn in every round,
and the reported number is the median over the rounds of the ratio within a round, which a busy machine disturbs far
less than a ratio of medians.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax.sharding import Sharding
from jax.stages import Compiled

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
"""A tree of arrays, of shapes, or of what else JAX can flatten."""
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "lojax", "qwix", "quax", "keras", "torch", "peft", "transformers", "libtpu")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What XLA counts in one compiled program.

    Attributes:
        flops: Floating-point operations; the body of a scan counts once.
        bytes: Bytes accessed, as XLA estimates them.
        temporaries: Bytes of temporary memory.
        outputs: Bytes of results, gradients among them; XLA may use their memory before they are written.
        kernels: Instructions of the entry computation that launch something (fusions, products, loops, copies).
    """

    flops: float
    bytes: float
    temporaries: int
    outputs: int
    kernels: int


def compiled_cost(compiled: Compiled) -> Cost:
    """The `Cost` of a compiled program."""
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return Cost(
        flops=analysis.get("flops", float("nan")),
        bytes=analysis.get("bytes accessed", float("nan")),
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        kernels=_kernels(compiled.as_text()),
    )


def cost(f: Callable[..., Any], *args: PyTree, sharding: Sharding | None = None) -> Cost:
    """Compiles ``f`` for arguments of these shapes and counts.

    Args:
        f: Any function of arrays.
        *args: Trees of arrays or `jax.ShapeDtypeStruct`.
        sharding: Where to compile for, such as one device of a described topology; None for the default device.
    """

    def describe(x: Array) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return compiled_cost(jax.jit(f).lower(*jax.tree.map(describe, args)).compile())


# Instructions that launch no kernel.
_FREE = ("parameter(", "constant(", "tuple(", "get-tuple-element(", "bitcast(", "copy-done(", "after-all(")


def _kernels(text: str) -> int:
    entry = text[text.index("\nENTRY") :]
    body = entry[: entry.index("\n}")].splitlines()[2:]
    return sum(" = " in line and not any(f" {free}" in line for free in _FREE) for line in body)


def topology(name: str) -> tuple[str, Any]:
    """The kind and sharding of one device of a described TPU slice such as ``v5e:2x2``; needs libtpu, not a TPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    return device.device_kind, jax.sharding.SingleDeviceSharding(device)


def alternated(programs: Mapping[str, Callable[[], Any]], *, rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every program in each round. A round runs every program once, and every other round in reverse."""
    for _ in range(warm):
        for run in programs.values():
            jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds):
        for name in list(programs)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """The median over the rounds of the time of ``name`` over that of ``to`` in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def environment(device: str | None = None) -> dict[str, Any]:
    """What a result was measured on: versions, device and load, but no machine and no path."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device is None:
        device = jax.devices()[0].device_kind
    return {
        "load": os.getloadavg()[1],
        "device": f"{device}, {os.cpu_count()} cores" if device == "cpu" else device,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
    }


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a markdown table; floats get three digits."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_format(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _format(value: PyTree) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write(
    name: str,
    title: str,
    text: str,
    data: PyTree,
    *,
    device: str | None = None,
    clocks: bool = True,
    folder: Path = RESULTS,
) -> None:
    """Writes ``name.json`` and ``name.md`` and prints the latter.

    Args:
        name: The file's stem.
        title: The heading.
        text: Markdown: tables and comments.
        data: The measurements, as JSON.
        device: The device that programs were compiled for, if not the default device.
        clocks: Whether clocks were read, so that the page warns if the machine was busy.
        folder: Where to write.
    """
    setup = environment(device)
    versions = ", ".join(f"{package} {version}" for package, version in setup["versions"].items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"environment": setup, "data": data}, indent=1) + "\n")
    busy = clocks and setup["load"] > 2 * (os.cpu_count() or 1)
    note = f"**The machine was busy (load {setup['load']:.0f}): ignore milliseconds and "
    note += "distrust ratios; counts are exact.**\n\n"
    page = f"# {title}\n\n{setup['device']}; Python {setup['python']}, {versions}.\n\n{note * busy}{text}\n"
    (folder / f"{name}.md").write_text(page)
    print(page)


def bars(name: str, groups: Mapping[str, Mapping[str, float]], *, label: str, floor: float = 1.0) -> None:
    """A PNG of horizontal bars, a panel for each group, with a line at ``floor``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, panels = plt.subplots(
        1, len(groups), figsize=(4.2 * len(groups) + 1, 0.34 * len(names) + 1.4), sharey=True, squeeze=False
    )
    for panel, (title, group) in zip(panels[0], groups.items(), strict=True):
        values = [group.get(name, float("nan")) for name in names]
        patches = panel.barh(names, values, color=["#1b6ca8" if "lojax" in name else "#b8b8b8" for name in names])
        panel.bar_label(patches, fmt="%.2f", padding=2, fontsize=8)
        panel.axvline(floor, color="#c0392b", linewidth=1)
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.supxlabel(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    plt.close(figure)
