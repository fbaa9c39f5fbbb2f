"""Claim: lojax adds little to tracing and compiling, against the base net and against LoRA written by hand.

Times are CPU seconds of the process (`time.process_time`), which a busy machine disturbs less than a clock. Each
repeat runs every program after `jax.clear_caches`, and ratios are taken within a repeat. The numbers of equations and
of HLO lines are exact.

    python benchmarks/trace_compile.py [--rounds 7] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import io
import itertools
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered, Traced
from measure import Array, PyTree, table, write
from nets import Net, draw, insert_by_hand, minilm, minilm_by_hand, minilm_by_hand_variables

import lojax

STAGES = ("trace", "lower", "compile", "total")
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def bert_programs() -> dict[str, Program]:
    """MiniLM with adapters on query and value, and the head trained in full."""
    net, variables = minilm()
    tokens = jnp.ones((16, 64), jnp.int32)
    targets = ["**/query/kernel", "**/value/kernel"]
    model = lojax.wrap(net, targets, rank=8, alpha=16, train=["**/classifier/*"], strict=True)
    frozen, lora = model.init(jax.random.key(0), variables, tokens, tokens)
    by_hand = minilm_by_hand()

    def head_loss(logits: Array) -> Any:
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    return steps(
        lambda params: head_loss(net.apply(params, tokens, tokens)),
        lambda trained, frozen: head_loss(by_hand(minilm_by_hand_variables(frozen, trained), tokens, tokens)),
        lambda trained, frozen: head_loss(model.apply(frozen, trained, tokens, tokens)),
        variables,
        frozen,
        lora,
    )


def stack_programs(scanned: bool) -> dict[str, Program]:
    """A 12-layer GPT-2-like net with every weight of its layers adapted."""
    net = Net("gpt2", layers=12, width=64, heads=4, inner=256, vocabulary=128, scanned=scanned)
    params = draw(net.shapes())
    x, labels = jnp.ones((2, 16, 64)), jnp.zeros((2, 16), jnp.int32)
    targets = ["**/qkv", "**/out", "**/up", "**/down"]
    model = lojax.wrap(net.loss, targets, rank=8, alpha=16, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x, labels)
    return steps(
        lambda params: net.loss(params, x, labels),
        lambda trained, frozen: net.loss(insert_by_hand(frozen, trained), x, labels),
        lambda trained, frozen: model.apply(frozen, trained, x, labels),
        params,
        frozen,
        lora,
    )


def steps(base: PyTree, by_hand: Any, adapted: Any, params: PyTree, frozen: PyTree, lora: PyTree) -> dict[str, Program]:
    """The forward pass and value_and_grad of the base net, of LoRA by hand, and of lojax."""
    return {
        "base, forward": (base, (params,)),
        "by hand, forward": (by_hand, (lora, frozen)),
        "lojax, forward": (adapted, (lora, frozen)),
        "base, step": (jax.value_and_grad(base), (params,)),
        "by hand, step": (jax.value_and_grad(by_hand), (lora, frozen)),
        "lojax, step": (jax.value_and_grad(adapted), (lora, frozen)),
    }


def sizes(f: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, int]:
    """The numbers of equations and of HLO lines of a program, which are exact."""
    return _sizes(traced := jax.jit(lambda *args: f(*args)).trace(*args), traced.lower())


def _sizes(traced: Traced, lowered: Lowered) -> dict[str, int]:
    return {"equations": len(traced.jaxpr.eqns), "HLO lines": len(lowered.as_text().splitlines())}


def time_stages(f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[dict[str, float], dict[str, int]]:
    """CPU seconds of each stage from cold caches, and the exact sizes of the program."""
    jax.clear_caches()
    marks = [time.process_time()]
    traced = jax.jit(lambda *args: f(*args)).trace(*args)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    lowered.compile()
    marks.append(time.process_time())
    seconds = dict(zip(STAGES, (b - a for a, b in itertools.pairwise(marks)), strict=False))
    return seconds | {"total": marks[-1] - marks[0]}, _sizes(traced, lowered)


def measure_programs(programs: dict[str, Program], rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each program, and the raw seconds."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    size: dict[str, dict[str, int]] = {}
    for i in range(rounds):
        for name in list(programs)[:: 1 if i % 2 == 0 else -1]:
            stages, size[name] = time_stages(*programs[name])
            seconds[name].append(stages)

    def median_ratio(name: str, other: str, stage: str) -> float:
        pairs = zip(seconds[name], seconds[other], strict=True)
        return statistics.median(a[stage] / b[stage] for a, b in pairs)

    rows = []
    for name in programs:
        method, part = name.split(", ")
        row: dict[str, Any] = {"program": part, "method": method}
        row |= {f"{stage} s": statistics.median(s[stage] for s in seconds[name]) for stage in STAGES}
        if method != "base":
            row["total / base"] = median_ratio(name, f"base, {part}", "total")
        if method == "lojax":
            row["trace / hand"] = median_ratio(name, f"by hand, {part}", "trace")
            row["total / hand"] = median_ratio(name, f"by hand, {part}", "total")
        rows.append(row | size[name])
    return rows, {"seconds": seconds, "sizes": size}


def profile_trace(programs: dict[str, Program], lines: int = 30) -> str:
    """The functions of lojax in which tracing its step spends its time."""
    jax.clear_caches()
    f, args = programs["lojax, step"]
    profile = cProfile.Profile()
    profile.runcall(jax.jit(f).trace, *args)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats("lojax/(adapters|lowrank|rewrite|nets)", lines)
    root = str(Path(lojax.__file__).parents[1])
    return text.getvalue().replace(root + "/", "")


def main() -> None:
    """Measures the three nets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="only print where tracing spends its time")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # jax.clear_caches leaves a cache on disk
    nets = {
        "BERT (MiniLM), LoRA on query and value": bert_programs,
        "12 layers unrolled, LoRA on every weight": lambda: stack_programs(False),
        "12 layers scanned, LoRA on every weight": lambda: stack_programs(True),
    }
    text, data = [], {}
    for title, make in nets.items():
        programs = make()
        if options.profile:
            print(title, profile_trace(programs))
            continue
        rows, data[title] = measure_programs(programs, options.rounds)
        text.append(f"## {title}\n\n{table(rows)}")
    if text:
        head = f"CPU seconds from cold caches, medians of {options.rounds} alternated repeats; ratios within a repeat."
        goal = "Goals: total / base at most 1.3 (BERT), total / hand at most 1.15."
        write("trace_compile", "The cost of tracing and compiling", "\n\n".join([head, goal, *text]), data)


if __name__ == "__main__":
    main()
