"""Claim: a checkpoint costs its adapter's bytes and almost no training time, and hashing runs at memory speed.

Prints and writes to ``results/checkpoint.{json,md}``:

1. the bytes on disk and the bytes of the adapter;
2. how long ``lojax.save`` blocks a training loop for a 20 MB adapter, with ``wait=False`` and without,
   and how long ``lojax.restore`` takes;
3. the speed of `lojax.checkpoint.digest`, of copying the same memory, and of the standard library's hashes.

    python benchmarks/checkpoint.py
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lojax
from lojax.checkpoint.digest import digest

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20


def adapter(layers: int, width: int, rank: int, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """``(frozen, lora)`` with adapters on query and value of every layer, b not zero."""
    kernel = jax.ShapeDtypeStruct((width, width), jnp.float32)
    layer = {"attention": {"self": {name: {"kernel": kernel} for name in ("query", "key", "value")}}}
    params = {"params": {"encoder": {f"layer_{i}": layer for i in range(layers)}}}
    make = lambda key: lojax.init(key, params, ["**/query/kernel", "**/value/kernel"], rank=rank, dtype=dtype)
    shapes = jax.eval_shape(lambda key: make(key)[1], jax.random.key(0))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    weight = jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)
    return jax.tree.map(lambda _: weight + 0, params), lora


def size_on_disk(path: Path) -> int:
    """The bytes of all files under ``path``."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def seconds(f: Callable[[], Any], times: int = 7) -> list[float]:
    """The times of several calls, after one to warm up."""
    f()
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        durations.append(time.perf_counter() - start)
    return durations


def sizes(folder: Path) -> list[dict[str, Any]]:
    """Bytes of checkpoints and of their adapters."""
    rows = []
    for name, settings in {
        "6 layers of 384, r=8 (MiniLM)": (6, 384, 8),
        "12 layers of 768, r=8 (BERT-base)": (12, 768, 8),
        "48 layers of 768, r=34 (20 MB)": (48, 768, 34),
        "48 layers of 768, r=34, bfloat16": (48, 768, 34, jnp.bfloat16),
        "80 layers of 1024, r=16": (80, 1024, 16),
    }.items():
        frozen, lora = adapter(*settings)
        lojax.save(folder / "sizes", lora, frozen=frozen)
        adapter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
        total = size_on_disk(folder / "sizes")
        rows.append({"adapter": name, "adapter bytes": adapter_bytes, "checkpoint bytes": total})
        rows[-1] |= {"over": total - adapter_bytes, "at most 64 KiB over": total <= adapter_bytes + (64 << 10)}
    return rows


def times(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds that a training loop waits for an adapter of 20 MB. CPU time does not depend on the load."""
    frozen, lora = adapter(48, 768, 34)
    path, blocked, blocked_cpu, complete = folder / "times", [], [], []
    lojax.save(path, lora, frozen=frozen)  # the base is hashed only once
    for _ in range(15):
        start, start_cpu = time.perf_counter(), time.thread_time()
        saving = lojax.save(path, lora, frozen=frozen, wait=False)
        blocked.append(time.perf_counter() - start)
        blocked_cpu.append(time.thread_time() - start_cpu)
        saving.result()
        complete.append(time.perf_counter() - start)
    measurements = {
        "save(wait=False) blocks": blocked,
        "save(wait=False) blocks, CPU time": blocked_cpu,
        "save(wait=False) until complete": complete,
        "save": seconds(lambda: lojax.save(path, lora, frozen=frozen)),
        "restore, base checked": seconds(lambda: jax.block_until_ready(lojax.restore(path, frozen=frozen))),
        "a copy of the arrays in memory": seconds(lambda: jax.tree.map(np.array, lora)),
    }
    return {
        name: {"best": 1e3 * min(values), "median": 1e3 * statistics.median(values), "worst": 1e3 * max(values)}
        for name, values in measurements.items()
    }


def speeds() -> dict[str, float]:
    """GB a second over 256 MiB, the best of several runs."""
    array = np.random.default_rng(0).integers(0, 1 << 32, 64 * MIB, np.uint32)
    target = np.empty_like(array)
    calls = {
        "memory copy": lambda: np.copyto(target, array),
        "memory read (np.max)": array.max,
        "digest, float32": lambda: digest(array.view(np.float32)),
        "digest, bfloat16": lambda: digest(array.view(jnp.bfloat16)),
        "zlib.crc32": lambda: zlib.crc32(array.data),
        "hashlib.blake2b": lambda: hashlib.blake2b(array.data),
        "hashlib.sha256": lambda: hashlib.sha256(array.data),
    }
    return {name: array.nbytes / 1e9 / min(seconds(f)) for name, f in calls.items()}


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    names = ("lojax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load before": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    lines = [
        "# Adapter checkpoints",
        "",
        ", ".join(f"{name} {value}" for name, value in results["machine"].items()),
        "",
    ]
    lines += ["| adapter | its bytes | on disk | over | at most 64 KiB over |", "|---|---:|---:|---:|---|"]
    for row in results["sizes"]:
        name, size, total, over, fits = row.values()
        lines.append(f"| {name} | {size:,} | {total:,} | {over:+,} | {'yes' if fits else 'no'} |")
    lines += ["", "| 20 MB adapter of 192 arrays, ms | best | median | worst |", "|---|---:|---:|---:|"]
    for name, values in results["milliseconds"].items():
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values.values())} |")
    copy = results["GB/s"]["memory copy"]
    lines += ["", "| 256 MiB | GB/s | of a memory copy |", "|---|---:|---:|"]
    lines += [f"| {name} | {value:.2f} | {value / copy:.0%} |" for name, value in results["GB/s"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes."""
    results: dict[str, Any] = {"machine": machine()}
    folder = Path(tempfile.mkdtemp())
    try:
        results |= {"sizes": sizes(folder), "milliseconds": times(folder), "GB/s": speeds()}
    finally:
        shutil.rmtree(folder)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "checkpoint.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
