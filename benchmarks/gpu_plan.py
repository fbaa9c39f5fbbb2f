"""Claim: what a fine-tuning run needs on GPUs is known before renting them, in minutes and without one.

Plans of Llama 3 on cards and hosts: LoRA, QLoRA with an NF4 base, and full fine-tuning. Needs jax-cuda12-plugin.

    python benchmarks/gpu_plan.py
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from measure import write

from lojax.planner import plan_gpus
from lojax.planner.gpu_aot import HINT, has_gpu_compiler

CASES: dict[str, dict[str, Any]] = {
    "8B on one card of 24 GB": {"config": "8B", "gpu": "rtx4090", "seq": 2048},
    "8B on eight of 80 GB": {"config": "8B", "gpu": "h100", "count": 8, "seq": 4096},
    "70B on one card of 80 GB": {"config": "70B", "gpu": "h100", "seq": 2048},
    "70B on eight of 80 GB": {"config": "70B", "gpu": "h100", "count": 8, "seq": 2048},
    "70B on two hosts of eight": {"config": "70B", "gpu": "h100", "count": 8, "hosts": 2, "seq": 2048},
}


def main() -> None:
    """Plans and writes."""
    if not has_gpu_compiler():
        sys.exit(HINT)
    text, data = [], {}
    for title, settings in CASES.items():
        print(title, flush=True)
        found = plan_gpus(**settings)
        data[title] = found.as_dict()
        text.append(f"## {title} ({found.seconds:.0f} s)\n\n```\n{found}\n```")
    note = "Compiled ahead of time on a machine without a GPU; nothing was run."
    write("gpu_plan", "What a step needs on GPUs", "\n\n".join([note, *text]), data, device="GPUs", clocks=False)


if __name__ == "__main__":
    main()
