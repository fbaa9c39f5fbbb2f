"""Claim: what a LoRA run needs on a TPU pod is known before renting it, and LoRA adds next to nothing to it.

Compiles the real train steps of Llama 3 for TPU slices ahead of time, and writes a table, the numbers as JSON, and a
plot. Needs libtpu (``pip install "jax[tpu]"``) but no TPU. Cases that are already in the JSON are not compiled again,
so an interrupted run resumes; ``--fresh`` starts over, ``--draw`` only writes table and plot.

    python benchmarks/plan.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, environment

JSON = RESULTS / "plan.json"
Results = dict[str, Any]

CASES = {
    "70B": ("70B", "v5e:16x16", "fsdp=16,tensor=16", 16),
    "8B, smallest slice": ("8B", "v5e:2x2", "fsdp=4", 4),
    "405B": ("405B", "v5p:4x4x4", "fsdp=16,tensor=4", 16),
    "8B on 16": ("8B", "v5e:4x4", "fsdp=16", 16),
    "8B on 64": ("8B", "v5e:8x8", "data=4,fsdp=16", 64),
    "8B on 256": ("8B", "v5e:16x16", "data=16,fsdp=16", 256),
    "70B, q and v at rank 8": ("70B", "v5e:16x16", "fsdp=16,tensor=16", 16),
}
SETTINGS = {"70B, q and v at rank 8": {"rank": 8, "targets": ["**/q_proj/kernel", "**/v_proj/kernel"]}}
"""Settings other than rank 16 on every linear layer."""
SCALING = ("8B on 16", "8B on 64", "8B on 256")
BASELINES = ("70B", "8B, smallest slice", "8B on 16")
"""Cases whose frozen forward and backward are compiled too, to see what LoRA adds."""
LIMIT = 600
"""Seconds of CPU time after which a case is abandoned; the JSON then says so."""
KINDS = ("weights", "adapters", "optimizer", "saved_activations", "temporaries")
"""What memory is counted for."""


def run_case(name: str, frozen: bool) -> Results:
    """One case in this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from lojax.planner.aot import compile_cost, topology_mesh
    from lojax.planner.chips import parse_mesh, parse_topology
    from lojax.planner.decoder import Decoder
    from lojax.planner.decoder_config import PRESETS
    from lojax.planner.plan import plan
    from tests.planner.frozen_step import frozen_step

    model, topology, mesh, batch = CASES[name]
    if not frozen:
        return plan(model, topology=topology, mesh=mesh, batch=batch, compiled=True, **SETTINGS.get(name, {})).as_dict()
    tpu_slice = parse_topology(topology)
    decoder = Decoder(PRESETS[model], topology_mesh(tpu_slice, parse_mesh(mesh, tpu_slice.devices)))
    cost = compile_cost(frozen_step(decoder, batch=batch, seq=4096).lower())
    return {"memory": cost.peak_memory, "bytes_received": cost.traffic.bytes_received if cost.traffic else None}


def measure_all(results: Results) -> Results:
    """Every missing case, each in a process of its own."""
    cases = [(name, frozen) for name in CASES for frozen in (False, True) if not frozen or name in BASELINES]
    for i, (name, frozen) in enumerate(cases):
        key = f"{name}, frozen" if frozen else name
        is_done = key in results and key not in results.get("outdated", [])
        print(f"[{i + 1}/{len(cases)}] {key}", "(done)" if is_done else "…", flush=True)
        if is_done:
            continue
        start = time.monotonic()
        command = [sys.executable, __file__, "--case", name, *(["--frozen"] if frozen else [])]
        process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        if process.returncode == -signal.SIGXCPU:
            results.setdefault("abandoned", {})[key] = f"not compiled within {LIMIT} s of CPU time"
        elif process.returncode:
            print(process.stderr[-2000:])
            continue
        else:
            results[key] = json.loads(process.stdout.splitlines()[-1])
            results.get("abandoned", {}).pop(key, None)
            results["outdated"] = [name for name in results.get("outdated", []) if name != key]
        results["versions"] = environment("")["versions"]
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
        JSON.write_text(json.dumps(results, indent=2) + "\n")
    return results


def format_results(results: Results) -> str:
    """The table, the versions, and the cases that were abandoned."""
    from lojax.report.table import table

    rows = []
    for name in CASES:
        if name not in results:
            continue
        r = results[name]
        lora, full, devices = r["lora"], r["full"], r["mesh"]["data"] * r["mesh"]["fsdp"] * r["mesh"]["tensor"]
        base = results.get(f"{name}, frozen", results.get(f"{name.partition(',')[0]}, frozen"))
        memory_increase = f"{100 * (lora['memory'] / base['memory'] - 1):+.1f}" if base else ""
        own = f"{100 * (2 * lora['adapters'] + lora['optimizer']) / base['memory']:.1f}" if base else ""
        received = lora["bytes_received"]
        has_traffic = base and base["bytes_received"]
        traffic_increase = f"{100 * (received / base['bytes_received'] - 1):+.1f}" if has_traffic else ""
        mesh = " ".join(f"{axis}={size}" for axis, size in r["mesh"].items() if size > 1)
        sizes = [f"{lora[kind] / 1e9:.3f}" for kind in (*KINDS, "memory")]
        rows.append(
            (
                *(name, r["topology"], str(devices), mesh, f"{r['batch']} × {r['seq']}", *sizes, memory_increase, own),
                *(f"{full['memory'] / 1e9:.2f}", f"{lora['flops'] / 1e12:.1f}", f"{received / 1e9:.2f}"),
                *(traffic_increase, f"{r['bytes_received_per_token']:,.0f}"),
                *(f"{lora['step_seconds']:.2f}", f"{r['seconds']:.0f}"),
            )
        )
    header = ("case", "slice", "devices", "mesh", "batch", *(kind.replace("_", " ") for kind in KINDS))
    header += ("LoRA GB", "over frozen %", "own %", "full FT GB", "TFLOP", "received GB", "over frozen %")
    header += ("bytes/device/token", "step s at 40%", "plan s")
    lines = [
        table(header, rows),
        "",
        "Everything per device. own: adapters, their gradients and moments, which the frozen step does not have.",
        f"Compiled ahead of time, no TPU: {versions(results)}.",
    ]
    if results.get("outdated"):
        lines.append(f"Compiled by an earlier version of the step, and not since: {'; '.join(results['outdated'])}.")
    return "\n".join(lines + [f"{name}: {why}." for name, why in results.get("abandoned", {}).items()])


def versions(results: Results) -> str:
    """The versions that the cases were compiled with."""
    names = ("jax", "jaxlib", "libtpu", "lojax")
    return ", ".join(f"{name} {results['versions'][name]}" for name in names if name in results.get("versions", {}))


def draw(results: Results) -> None:
    """Memory by kind, and bytes per device and token as devices are added."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    names = [name for name in CASES if name in results]
    colors = ("#4c72b0", "#c44e52", "#dd8452", "#55a868", "#937860")
    start = [0.0] * len(names)
    for kind, color in zip(KINDS, colors, strict=True):
        values = [results[name]["lora"][kind] / 1e9 for name in names]
        left.barh(names, values, left=start, color=color, label=kind.replace("_", " "))
        start = [a + b for a, b in zip(start, values, strict=True)]
    for i, name in enumerate(names):
        left.plot(
            results[name]["full"]["memory"] / 1e9, i, "k|", markersize=16, label="full fine-tuning" if not i else ""
        )
    left.invert_yaxis()
    left.set_xlabel("GB per device")
    left.set_title("Memory of one LoRA step")
    left.legend(fontsize=8)
    points = [name for name in SCALING if name in results]
    devices = [int(name.rpartition(" ")[2]) for name in points]
    right.plot(devices, [results[name]["bytes_received_per_token"] / 1e6 for name in points], "o-")
    right.set_xscale("log", base=2)
    right.set_xticks(devices, [str(n) for n in devices])
    right.set_ylim(bottom=0)
    right.set_xlabel("devices (v5e, batch grows with them)")
    right.set_ylabel("MB received per device and token")
    right.set_title("Llama-3-8B: traffic as devices are added")
    right.set_visible(bool(points))
    figure.savefig(RESULTS / "plan.png", dpi=120)


def main() -> None:
    """Measures what is missing, then writes table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.frozen)))
        return
    RESULTS.mkdir(exist_ok=True)
    results = json.loads(JSON.read_text()) if JSON.exists() and not args.fresh else {}
    results = results if args.draw else measure_all(results)
    text = format_results(results)
    print(text)
    (RESULTS / "plan.txt").write_text(text + "\n")
    draw(results)


if __name__ == "__main__":
    main()
