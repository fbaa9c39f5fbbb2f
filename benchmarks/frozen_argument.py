"""Claim: pass ``frozen`` to a jitted step as an argument; captured, the base becomes constants of the program.

One step (value_and_grad of two adapted products) is compiled twice: with ``frozen`` as an argument of the jitted
function, and with ``frozen`` captured from outside. Times are CPU seconds from cold caches, medians of alternated
repeats; the size of the program is exact.

    python benchmarks/frozen_argument.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Array, PyTree, table, write

import lojax

WIDTHS = (512, 1024, 2048)


def make_steps(width: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The same step with ``frozen`` as an argument and captured, with its arguments."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(width, width)), jnp.float32) for name in ("up", "down")}
    model = lojax.wrap(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], ["up", "down"], rank=8, strict=True)
    x = jnp.ones((16, width))
    frozen, lora = model.init(jax.random.key(0), params, x)

    def step(frozen: PyTree, lora: PyTree, x: Array) -> Any:
        return jax.value_and_grad(lambda lora: jnp.mean(model.apply(frozen, lora, x) ** 2))(lora)

    return {"argument": (step, (frozen, lora, x)), "captured": (lambda lora, x: step(frozen, lora, x), (lora, x))}


def compile_once(f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[dict[str, float], float]:
    """CPU seconds of tracing with lowering and of compiling, and the megabytes of the program's text."""
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(f).lower(*args)
    traced = time.process_time()
    lowered.compile()
    seconds = {"trace and lower": traced - start, "compile": time.process_time() - traced}
    return seconds | {"total": sum(seconds.values())}, len(str(lowered.as_text())) / 1e6


def measure_width(width: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row for each way to pass ``frozen``, and the raw seconds."""
    steps = make_steps(width)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    sizes = {}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            stages, sizes[name] = compile_once(*steps[name])
            seconds[name].append(stages)
    rows = []
    for name in steps:
        row = {
            "weights": f"2 × {width}²",
            "MiB": 2 * width**2 * 4 / 2**20,
            "frozen": name,
            "MB of program": sizes[name],
        }
        row |= {f"{stage} s": statistics.median(s[stage] for s in seconds[name]) for stage in seconds[name][0]}
        pairs = zip(seconds[name], seconds["argument"], strict=True)
        row["total / argument"] = statistics.median(a["total"] / b["total"] for a, b in pairs)
        rows.append(row)
    return rows, {"seconds": seconds, "megabytes of program": sizes}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    warnings.filterwarnings("ignore", message="frozen .* is captured")
    rows, data = [], {}
    for width in WIDTHS:
        width_rows, data[str(width)] = measure_width(width, options.rounds)
        rows += width_rows
    text = (
        f"value_and_grad of two adapted products, 16 rows, rank 8, float32. CPU seconds from cold caches, medians of "
        f"{options.rounds} alternated repeats; ratios within a repeat.\n\n{table(rows)}\n\n"
        "A captured array is copied into the program's text, into the compiled program and, as a constant, into every "
        "optimization pass. So pass `frozen` as an argument of every jitted function."
    )
    write("frozen_argument", "A captured base becomes constants of the program", text, data)


if __name__ == "__main__":
    main()
