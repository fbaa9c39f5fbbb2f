"""Claim: what a LoRA run needs on a TPU pod is known before renting it, and LoRA adds next to nothing to it.

Compiles the real train steps of Llama 3 for TPU slices that are not there, and writes a table, the numbers as JSON,
and a picture. Needs libtpu (``pip install "jax[tpu]"``) and no TPU. Cases that are already in the JSON are kept, so
a run that was stopped goes on; ``--fresh`` starts over, ``--draw`` only draws.

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

from measure import RESULTS, environment

JSON = RESULTS / "plan.json"

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
"""What differs from rank 16 on every linear layer."""
SCALING = ("8B on 16", "8B on 64", "8B on 256")
FLOORS = ("70B", "8B, smallest slice", "8B on 16")
"""Cases of which the frozen forward and backward are compiled too, for what LoRA adds to them."""
LIMIT = 600
"""Seconds of CPU time after which a case is given up; the JSON then says so."""


def run_case(name: str, floor: bool) -> dict:
    """One case in this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
    from lojax.planner.aot import measure, topology_mesh
    from lojax.planner.chips import parse_mesh, parse_topology
    from lojax.planner.decoder import Decoder
    from lojax.planner.decoder_config import preset
    from lojax.planner.plan import plan
    from lojax.planner.train_step import floor_work

    model, topology, mesh, batch = CASES[name]
    if not floor:
        return plan(model, topology=topology, mesh=mesh, batch=batch, compiled=True, **SETTINGS.get(name, {})).as_dict()
    where = parse_topology(topology)
    decoder = Decoder(preset(model), topology_mesh(where, parse_mesh(mesh, where.chips)))
    found = measure(floor_work(decoder, batch=batch, seq=4096).lower())
    return {"memory": found.peak, "moved": found.traffic.moved if found.traffic else None}


def measure_all(results: dict) -> dict:
    """Every missing case, each in a process of its own."""
    wanted = [(name, floor) for name in CASES for floor in (False, True) if not floor or name in FLOORS]
    for i, (name, floor) in enumerate(wanted):
        key = f"{name}, frozen" if floor else name
        kept = key in results and key not in results.get("earlier", [])
        print(f"[{i + 1}/{len(wanted)}] {key}", "(kept)" if kept else "…", flush=True)
        if kept:
            continue
        began = time.monotonic()
        command = [sys.executable, __file__, "--case", name, *(["--floor"] if floor else [])]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        if done.returncode == -signal.SIGXCPU:
            results.setdefault("given up", {})[key] = f"not compiled within {LIMIT} s of CPU time"
        elif done.returncode:
            print(done.stderr[-2000:])
            continue
        else:
            results[key] = json.loads(done.stdout.splitlines()[-1])
            results.get("given up", {}).pop(key, None)
            results["earlier"] = [name for name in results.get("earlier", []) if name != key]
        results["versions"] = environment("")["versions"]
        print(f"    {time.monotonic() - began:.0f} s", flush=True)
        JSON.write_text(json.dumps(results, indent=2) + "\n")
    return results


def written(results: dict) -> str:
    """The table, the versions, and the cases that were given up."""
    from lojax.report.table import table

    rows = []
    for name in CASES:
        if name not in results:
            continue
        r = results[name]
        lora, full, chips = r["lora"], r["full"], r["mesh"]["data"] * r["mesh"]["fsdp"] * r["mesh"]["tensor"]
        floor = results.get(f"{name}, frozen", results.get(f"{name.partition(',')[0]}, frozen"))
        more = f"{100 * (lora['memory'] / floor['memory'] - 1):+.1f}" if floor else ""
        own = f"{100 * (2 * lora['adapters'] + lora['optimizer']) / floor['memory']:.1f}" if floor else ""
        sent = f"{100 * (lora['moved'] / floor['moved'] - 1):+.1f}" if floor and floor["moved"] else ""
        mesh = " ".join(f"{k}={v}" for k, v in r["mesh"].items() if v > 1)
        sizes = [f"{lora[k] / 1e9:.3f}" for k in ("weights", "adapters", "optimizer", "kept", "temporary", "memory")]
        rows.append(
            (
                *(name, r["topology"], str(chips), mesh, f"{r['batch']} × {r['seq']}", *sizes, more, own),
                *(f"{full['memory'] / 1e9:.2f}", f"{lora['flops'] / 1e12:.1f}", f"{lora['moved'] / 1e9:.2f}", sent),
                *(f"{r['moved_per_token']:,.0f}", f"{lora['step_seconds']:.2f}", f"{r['seconds']:.0f}"),
            )
        )
    header = ("case", "slice", "chips", "mesh", "batch", "weights", "adapters", "optimizer", "kept", "temporary")
    header += ("LoRA GB", "over frozen %", "own %", "full FT GB", "TFLOP", "received GB", "over frozen %")
    header += ("bytes/chip/token", "step s at 40%", "plan s")
    lines = [
        table(header, rows),
        "",
        "All of one chip. own: adapters, their gradients and moments, which the frozen step has not.",
        f"Compiled ahead of time, no TPU: {versions(results)}.",
    ]
    if results.get("earlier"):
        lines.append(
            f"Compiled by an earlier version of the step, and not again since: {'; '.join(results['earlier'])}."
        )
    return "\n".join(lines + [f"{name}: {why}." for name, why in results.get("given up", {}).items()])


def versions(results: dict) -> str:
    """The versions that the cases were compiled with, in words."""
    names = ("jax", "jaxlib", "libtpu", "lojax")
    return ", ".join(f"{name} {results['versions'][name]}" for name in names if name in results.get("versions", {}))


def draw(results: dict) -> None:
    """Memory by what holds it, and bytes a chip and token as chips are added."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    names = [name for name in CASES if name in results]
    colours = ("#4c72b0", "#c44e52", "#dd8452", "#55a868", "#937860")
    start = [0.0] * len(names)
    for part, colour in zip(("weights", "adapters", "optimizer", "kept", "temporary"), colours, strict=True):
        values = [results[name]["lora"][part] / 1e9 for name in names]
        left.barh(names, values, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    for i, name in enumerate(names):
        left.plot(
            results[name]["full"]["memory"] / 1e9, i, "k|", markersize=16, label="full fine-tuning" if not i else ""
        )
    left.invert_yaxis()
    left.set_xlabel("GB a chip")
    left.set_title("Memory of one LoRA step")
    left.legend(fontsize=8)
    points = [name for name in SCALING if name in results]
    chips = [int(name.rpartition(" ")[2]) for name in points]
    right.plot(chips, [results[name]["moved_per_token"] / 1e6 for name in points], "o-")
    right.set_xscale("log", base=2)
    right.set_xticks(chips, [str(n) for n in chips])
    right.set_ylim(bottom=0)
    right.set_xlabel("chips (v5e, batch grows with them)")
    right.set_ylabel("MB received a chip and token")
    right.set_title("Llama-3-8B: traffic as chips are added")
    right.set_visible(bool(points))
    figure.savefig(RESULTS / "plan.png", dpi=120)


def main() -> None:
    """Measures what is missing, then writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.floor)))
        return
    RESULTS.mkdir(exist_ok=True)
    results = json.loads(JSON.read_text()) if JSON.exists() and not args.fresh else {}
    results = results if args.draw else measure_all(results)
    text = written(results)
    print(text)
    (RESULTS / "plan.txt").write_text(text + "\n")
    draw(results)


if __name__ == "__main__":
    main()
