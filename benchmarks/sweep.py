"""Claim: eight runs in one `lojax.sweep` take no longer than 1.2 times eight separate runs, with the base there once.

One step of eight runs (two learning rates, two ranks, two seeds) against eight separate jitted steps, each at its own
rank and with its own gradient, AdamW and clipping. Both update the same adapters from the same data. XLA's counts, and
a clock that runs both in turn. The separate steps may use fused products (``execution="auto"``); the sweep does not.

    python benchmarks/sweep.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Array, PyTree, alternated, compiled_cost, ratio, table, write
from nets import minilm

import lojax

RUNS = [
    {"learning_rate": rate, "rank": rank, "alpha": 2.0 * rank, "seed": seed}
    for rate, rank, seed in itertools.product((1e-3, 3e-3), (4, 8), (0, 1))
]


class Case(NamedTuple):
    """A net, its data, and whether the runs share them."""

    title: str
    net: Any
    params: PyTree
    targets: Any
    train: Any
    loss: Callable[[Any, PyTree], Any]
    data: tuple[Array, ...]
    shared: bool


def bert_case(shared: bool) -> Case:
    """The main job's net: rank on query and value, the head in full, 8 rows of 32 tokens a run."""
    net, variables = minilm()
    rng = np.random.default_rng(0)
    shape = (8, 32) if shared else (len(RUNS), 8, 32)
    tokens, mask = rng.integers(1000, 20000, shape), np.ones(shape)
    data = tuple(jnp.asarray(x, jnp.int32) for x in (tokens, mask, rng.integers(0, 7, shape[:-1])))

    def loss(apply: Any, data: PyTree) -> Any:
        tokens, mask, labels = data
        return optax.softmax_cross_entropy_with_integer_labels(apply(tokens, mask), labels).mean()

    title = "MiniLM, query and value, " + ("shared data" if shared else "data of each run")
    return Case(title, net, variables, ["**/query/kernel", "**/value/kernel"], ["**/classifier/*"], loss, data, shared)


def mlp_case(width: int, rows: int, shared: bool) -> Case:
    """Three layers, all adapted."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    params = {f"layer_{i}": jax.random.normal(next(keys), (width, width)) / width**0.5 for i in range(3)}
    shape = (rows, width) if shared else (len(RUNS), rows, width)
    data = jax.random.normal(next(keys), shape), jax.random.normal(next(keys), shape)

    def net(params: PyTree, x: Array) -> Array:
        return functools.reduce(lambda x, w: jnp.tanh(x @ w), params.values(), x)

    def loss(apply: Any, data: PyTree) -> Any:
        return jnp.mean((apply(data[0]) - data[1]) ** 2)

    title = f"3 layers of {width}, {rows} rows, " + ("shared data" if shared else "data of each run")
    return Case(title, net, params, "layer_*", (), loss, data, shared)


def make_optimizer(run: Mapping[str, Any]) -> optax.GradientTransformation:
    """AdamW, clipped by the norm of one run."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(run["learning_rate"]))


def start(case: Case, run: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
    """``(frozen, lora)`` of one run."""
    settings: dict[str, Any] = {"rank": run["rank"], "alpha": run["alpha"], "train": case.train}
    return lojax.init(jax.random.key(run["seed"]), case.params, case.targets, **settings)


def make_loss(case: Case) -> Callable[..., Any]:
    """``loss(frozen, lora, *data)`` of one run."""
    model = lojax.wrap(case.net, case.targets, train=case.train)
    return lambda frozen, lora, *data: case.loss(functools.partial(model.apply, frozen, lora), data)


class AtOnce:
    """All runs in one step; calling it makes one."""

    def __init__(self, case: Case) -> None:
        sweep = lojax.sweep(RUNS, make_loss(case), make_optimizer, in_axes=None if case.shared else 0)
        self.frozen, self.state = sweep.init(functools.partial(start, case))
        self.data = case.data
        before = time.perf_counter()
        self.compiled = sweep.step.lower(self.frozen, self.state, *self.data).compile()
        self.seconds = time.perf_counter() - before
        self.costs = [compiled_cost(self.compiled)]
        self.arguments = self.compiled.memory_analysis().argument_size_in_bytes

    def __call__(self) -> Array:
        """The losses."""
        self.state, losses = self.compiled(self.frozen, self.state, *self.data)
        return losses


class Separate:
    """Each run by itself, one after the other; calling it makes a step of each."""

    def __init__(self, case: Case) -> None:
        loss, self.steps, self.costs, self.seconds, self.arguments = make_loss(case), [], [], 0.0, 0
        for i, run in enumerate(RUNS):
            frozen, lora = start(case, run)
            tx = make_optimizer(run)

            def step(frozen: PyTree, lora: PyTree, state: PyTree, *data: Array, tx: Any = tx) -> Any:
                value, grads = jax.value_and_grad(loss, argnums=1)(frozen, lora, *data)
                updates, state = tx.update(grads, state, lora)
                return optax.apply_updates(lora, updates), state, value

            data = case.data if case.shared else tuple(x[i] for x in case.data)
            state = tx.init(lora)
            before = time.perf_counter()
            compiled = jax.jit(step).lower(frozen, lora, state, *data).compile()
            self.seconds += time.perf_counter() - before
            self.costs.append(compiled_cost(compiled))
            self.arguments += compiled.memory_analysis().argument_size_in_bytes
            self.steps.append([compiled, frozen, lora, state, data])

    def __call__(self) -> list[Array]:
        """The losses."""
        losses = []
        for one in self.steps:
            compiled, frozen, lora, state, data = one
            one[2], one[3], value = compiled(frozen, lora, state, *data)
            losses.append(value)
        return losses


def measure_case(case: Case, rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The row of a case, and its clocks."""
    print(f"{case.title}", flush=True)
    at_once, separate = AtOnce(case), Separate(case)
    distance = float(np.max(np.abs(np.asarray(at_once()) - np.asarray(separate()))))
    for _ in range(3):
        distance = max(distance, float(np.max(np.abs(np.asarray(at_once()) - np.asarray(separate())))))
    seconds = alternated({"sweep": at_once, "separate": separate}, rounds=rounds, warm=2)
    total = lambda runs, name: sum(getattr(cost, name) for cost in runs.costs)
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(at_once.frozen))
    row = {
        "eight runs": case.title,
        "time / separate": ratio(seconds, "sweep", "separate"),
        "ms a step": 1e3 * statistics.median(seconds["sweep"]),
        "ms separate": 1e3 * statistics.median(seconds["separate"]),
        "FLOPs / separate": total(at_once, "flops") / total(separate, "flops"),
        "arguments MiB": at_once.arguments / 2**20,
        "of them frozen": frozen / 2**20,
        "temporaries / one run": at_once.costs[0].temporaries / max(c.temporaries for c in separate.costs),
        "compile s": at_once.seconds,
        "compile s separate": separate.seconds,
        "largest difference of losses": f"{distance:.1e}",
    }
    return row, seconds


def main() -> None:
    """Measures every case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # the seconds of a compilation are measured too
    makers = [functools.partial(bert_case, shared) for shared in (False, True)]
    makers += [functools.partial(mlp_case, 512, 128, shared) for shared in (False, True)]
    rows, clocks = [], {}
    for make in makers:
        case = make()
        row, clocks[case.title] = measure_case(case, options.rounds)
        rows.append(row)
    text = (
        "Runs: two learning rates, ranks 4 and 8 (padded to 8 in the sweep), two seeds; clipped AdamW, float32. One "
        "step of all eight in a `lojax.sweep` against eight separate jitted steps, medians of "
        f"{options.rounds} alternated rounds; the ratio is the median within a round. The separate runs compile one "
        "program each, as a loop over settings does. With shared data, what the net computes before its first adapted "
        "weight, and the frozen product of that weight, are computed once for all runs: there the operations are fewer."
    )
    write("sweep", "Eight runs at once against eight separate runs", f"{text}\n\n{table(rows)}", [rows, clocks])


if __name__ == "__main__":
    main()
