"""Runs every benchmark that works on this machine, one after the other, each in its own process.

python benchmarks/run_all.py            # everything, some tens of minutes on two cores
python benchmarks/run_all.py --counts   # only what needs no clock
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = [["remat.py"], ["coverage.py"]]
"""Counted on shapes; nothing is compiled or run."""
COUNTS = [["layer_cost.py", "--no-time"], ["net_cost.py", "--no-time"], ["many_adapters.py", "--no-time"], *SHAPES]
CLOCKS = [
    ["layer_cost.py"],
    ["net_cost.py"],
    ["shared_pass.py"],
    *SHAPES,
    ["trace_compile.py"],
    ["merge_and_switch.py"],
    ["many_adapters.py"],
    ["minilm_step.py"],
    ["sweep.py"],
    ["checkpoint.py"],
    ["quantized_base.py"],
]
TPU = [
    ["layer_cost.py", "--tpu", "v5e"],
    ["layer_cost.py", "--tpu", "v6e"],
    ["net_cost.py", "--tpu", "v5e"],
    ["shared_pass.py", "--tpu", "v5e"],
    ["many_adapters.py", "--tpu", "v5e"],
    ["plan.py"],
]
FOR_GPU = [
    ["layer_cost.py", "--gpu", "h100"],
    ["net_cost.py", "--gpu", "h100"],
    ["shared_pass.py", "--gpu", "h100"],
    ["remat.py", "--gpu", "h100"],
    ["gpu_plan.py"],
]
"""Compiled for a GPU that is not there."""
GPU = [["gpu.py"]]


def main() -> None:
    """Runs the scripts, and fails if any of them did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", action="store_true", help="only what needs no clock")
    options = parser.parse_args()
    commands = list(COUNTS if options.counts else CLOCKS)
    if importlib.util.find_spec("libtpu"):
        commands += TPU
    if importlib.util.find_spec("jax_cuda12_plugin") or importlib.util.find_spec("jax_cuda13_plugin"):
        commands += FOR_GPU
    if not options.counts and _has_gpu():
        commands += GPU
    failed = []
    for command in commands:
        print(f"=== {' '.join(command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=False).returncode
        print(f"=== {' '.join(command)}: {'done' if code == 0 else f'failed ({code})'}", end=" ")
        print(f"in {time.perf_counter() - start:.0f} s", flush=True)
        failed += [command[0]] * (code != 0)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _has_gpu() -> bool:
    """Whether JAX finds a GPU. Another process looks, because looking allocates GPU memory."""
    script = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
