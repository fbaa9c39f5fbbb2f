"""Counts of programs compiled for a GPU that is not there: what moves at the borders of kernels, and a roofline time.

Each program is compiled twice: as XLA does without a device to time kernels on, with Triton for its products, and with
cuBLAS. A real run times both for each product and takes the faster one. Nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from measure import PyTree, table

from lojax.planner.gpu_aot import HINT, compiler_options, gpu_sharding, has_gpu_compiler, lower_for_gpu
from lojax.planner.gpus import GPUS, Gpu
from lojax.planner.kernels import gpu_cost, read_kernels

GEMMS = {"Triton": True, "cuBLAS": False}
"""The kernels of products, and whether they are Triton's."""
MIB = 2**20
NOTE = (
    "Compiled for the GPU, not run on it. Bytes: operands and results of every kernel, with the iterations of loops; a "
    "cuBLAS call has its workspace among its results, of which it may use nothing. Time: for each kernel the largest "
    "of operations and bytes over their peak rates, summed, without workspaces; a floor, not a measurement. XLA "
    "does not say how many operations a Pallas kernel has: for `lojax kernel` the time is that of its bytes alone."
)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The argument ``--gpu``."""
    parser.add_argument("--gpu", choices=list(GPUS), help="compile ahead of time for this GPU instead (no GPU needed)")


def find(name: str) -> Gpu:
    """The GPU; ends the program where its compiler is missing."""
    if not has_gpu_compiler():
        sys.exit(HINT)
    return GPUS[name]


def count(f: Callable[..., Any], args: PyTree, gpu: Gpu, scope: str | None = None) -> dict[str, dict[str, Any]]:
    """What one step of ``f(*args)`` costs, by the kernels of its products.

    Args:
        f: The step.
        args: Trees of arrays or shapes.
        gpu: The GPU.
        scope: A `jax.named_scope` whose kernels are counted on their own as well.
    """
    sharding = gpu_sharding(gpu)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    lowered = lower_for_gpu(jax.jit(f), *shapes)
    counts = {}
    for name, triton in GEMMS.items():
        compiled = lowered.compile(compiler_options(triton=triton))
        counts[name] = dataclasses.asdict(gpu_cost(compiled, gpu))
        if scope is not None:
            inside = [k for k in read_kernels(compiled.as_text() or "") if scope in k.scope]
            counts[name][f"bytes in {scope}"] = sum(k.runs * k.bytes for k in inside)
            counts[name][f"seconds in {scope}"] = sum(k.runs * k.seconds(gpu) for k in inside)
    return counts


def rows_of(
    programs: Mapping[str, tuple[Callable[..., Any], PyTree]], gpu: Gpu, *, scope: str | None = None, **labels: Any
) -> list[dict[str, Any]]:
    """A row for each program and kind of products: labels, method, gemms and counts."""
    rows = []
    for method, (f, args) in programs.items():
        for gemms, counts in count(f, args, gpu, scope).items():
            rows.append({**labels, "method": method, "gemms": gemms, **counts})
    return rows


def counts_table(rows: Sequence[Mapping[str, Any]], floor: str) -> str:
    """The rows of one layer or net as a table: a line for each method, over the method ``floor``."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line: dict[str, Any] = {"method": method}
        for gemms in GEMMS:
            (row,) = [r for r in rows if (r["method"], r["gemms"]) == (method, gemms)]
            (base,) = [r for r in rows if (r["method"], r["gemms"]) == (floor, gemms)]
            line[f"{gemms}: MiB"] = round(row["bytes"] / MIB)
            line[f"{gemms}: / frozen"] = f"{row['bytes'] / base['bytes']:.2f}"
            if not GEMMS[gemms]:
                line["workspaces"] = round(row["workspace"] / MIB)
            line[f"{gemms}: kernels"] = row["kernels"]
            line[f"{gemms}: temporaries, MiB"] = f"{row['temporaries'] / MIB:.1f}"
            line[f"{gemms}: ms"] = f"{1e3 * row['seconds']:.3f}"
            line[f"{gemms}: time / frozen"] = f"{row['seconds'] / base['seconds']:.3f}"
        lines.append(line)
    return table(lines)


def over_floor(rows: Iterable[Mapping[str, Any]], floor: str, column: str, gemms: str) -> dict[str, float]:
    """One count of every method over that of ``floor``, for a figure."""
    values = {row["method"]: row[column] for row in rows if row["gemms"] == gemms}
    return {method: value / values[floor] for method, value in values.items()}
