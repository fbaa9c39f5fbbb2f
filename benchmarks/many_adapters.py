"""Claims: a batch of many adapters costs the base plus the low-rank products, and a swap compiles nothing.

A batch whose rows use different adapters of a bank (``model.apply(frozen, bank, x, adapter=ids)``), counted by XLA
against base + low-rank products, against merged copies of the weights, and timed against one adapter at a time. The two
forms, *gathered* and *wide* (see `lojax.lowrank.bank_value`), are each forced, and `jax.lax.ragged_dot` is written here
for comparison.

    python benchmarks/many_adapters.py               # this device: counts, swaps, clocks
    python benchmarks/many_adapters.py --no-time     # counts and swaps only
    python benchmarks/many_adapters.py --tpu v5e     # gathered and wide ahead of time for a TPU (needs libtpu, no TPU)

Letters: B rows, T tokens a row, m in, n out, r rank, N adapters, L layers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from measure import Array, Cost, PyTree, alternated, compiled_cost, ratio, table, topology, write

import lojax
from lojax.rewrite import mixed_batch

RANK, LAYERS, WIDTH = 16, 2, 1024
MIB = 2**20
FORMS = ("gathered", "wide")


class Case(NamedTuple):
    """B rows of T tokens, N adapters of rank r, a stack of L layers of one width."""

    rows: int
    tokens: int
    adapters: int
    scanned: bool = False
    width: int = WIDTH
    layers: int = LAYERS
    rank: int = RANK
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        stack = "scanned" if self.scanned else "unrolled"
        return f"N={self.adapters} B={self.rows} T={self.tokens} L={self.layers} m=n={self.width}, {stack}"

    @property
    def forward_floor(self) -> int:
        """The operations of the base and of the low-rank products: L(2Tmn + 2Tr(m + n)) for all rows."""
        return self.layers * self.rows * self.tokens * 2 * (self.width**2 + self.rank * 2 * self.width)

    @property
    def gradient_floor(self) -> int:
        """The operations of the gradients of A, B and x: L(4Tmn + 6Tr(m + n)) for all rows."""
        return self.layers * self.rows * self.tokens * (4 * self.width**2 + 6 * self.rank * 2 * self.width)


# --- the programs ---


def net(case: Case) -> Callable[..., Any]:
    """A stack of dense layers ``(params, x) -> y``, ``[..., m] -> [..., m]``."""

    def unrolled(params: PyTree, x: Array) -> Any:
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    def scanned(params: PyTree, x: Array) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    return scanned if case.scanned else unrolled


def make_model(case: Case) -> tuple[Any, Any, Any]:
    """``(model, frozen, bank)``, the trees as shapes; every alpha of the bank is another one."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=case.dtype)
    square = case.width, case.width
    params = (
        {"w": shape((case.layers, *square))} if case.scanned else {f"w{i}": shape(square) for i in range(case.layers)}
    )
    axes = ("stack",) * case.scanned + ("in", "out")

    def init() -> Any:
        loras = []
        for alpha in range(1, case.adapters + 1):
            model = lojax.wrap(net(case), "*", rank=case.rank, alpha=alpha, axes=axes)
            frozen, lora = model.init(jax.random.key(0), params)
            loras.append(lora)
        return frozen, lojax.stack(loras)

    frozen, bank = jax.eval_shape(init)
    return lojax.wrap(net(case), "*", rank=case.rank, axes=axes), frozen, bank


@contextlib.contextmanager
def forced(form: str) -> Iterator[None]:
    """Mixed batches are traced in this form, whatever the width and the device."""
    with mock.patch.object(mixed_batch, "prefers_wide", lambda width, platform: form == "wide"):
        yield


def inputs(case: Case) -> tuple[Any, Any]:
    """``x [B, T, m]`` and the number of the adapter of each row, as shapes."""
    x = jax.ShapeDtypeStruct((case.rows, case.tokens, case.width), case.dtype)
    return x, jax.ShapeDtypeStruct((case.rows,), jnp.int32)


def mixed(model: Any) -> Callable[..., Any]:
    """The net on a batch of mixed adapters."""
    return lambda frozen, bank, x, ids: model.apply(frozen, bank, x, adapter=ids)


def ragged(frozen: PyTree, bank: PyTree, x: Array, ids: Array) -> Any:
    """The unrolled net with `jax.lax.ragged_dot`: rows sorted by adapter, one group for each."""
    rows, tokens, _ = x.shape
    order = jnp.argsort(ids)
    groups = jnp.bincount(ids, length=len(bank)) * tokens
    h = x[order].reshape(rows * tokens, -1)
    adapters = bank.for_vmap()
    for name, w in frozen.items():
        a, b = adapters[name].a, adapters[name].b
        h = jnp.tanh(h @ w + jax.lax.ragged_dot(jax.lax.ragged_dot(h, a, groups), b, groups))
    return jnp.zeros_like(x).at[order].set(h.reshape(x.shape))


def merged_copies(case: Case) -> Callable[..., Any]:
    """The net with a merged copy of every weight for each adapter, picked by row."""
    f = net(case)
    return lambda copies, x, ids: jax.vmap(lambda i, x: f(jax.tree.map(lambda w: w[i], copies), x))(ids, x)


# --- counts ---


def compiled(f: Callable[..., Any], *args: PyTree, sharding: Sharding | None = None) -> Any:
    """``f`` compiled for these shapes."""

    def describe(x: Array) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.jit(f).lower(*jax.tree.map(describe, args)).compile()


def weight_copies(text: str, case: Case) -> list[str]:
    """The arrays of a compiled program that are as large as a copy of a weight for each adapter."""
    found = []
    for dims in set(re.findall(r"\[([\d,]+)\]", text)):
        shape = [int(d) for d in dims.split(",")]
        if shape.count(case.width) >= 2 and math.prod(shape) >= min(case.adapters, case.rows) * case.width**2:
            found.append(f"[{dims}]")
    return found


def whole(case: Case, counts: Cost, floor: int) -> float:
    """The operations of all layers: XLA counts the body of a scan once."""
    return counts.flops + (floor * (case.layers - 1) / case.layers if case.scanned else 0)


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all arrays or shapes of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def count_row(case: Case, method: str, program: Any, floor: int, arrays: PyTree) -> dict[str, Any]:
    """One row of a table of counts; ``arrays`` is what the method keeps on the device."""
    counts = compiled_cost(program)
    return {
        "case": str(case),
        "method": method,
        "GFLOP": whole(case, counts, floor) / 1e9,
        "/ floor": whole(case, counts, floor) / floor,
        "MiB accessed": counts.bytes / MIB,
        "MiB temporaries": counts.temporaries / MIB,
        "MiB of weights": tree_bytes(arrays) / MIB,
        "weight-sized copies": len(weight_copies(program.as_text(), case)),
    }


def count_forward(case: Case) -> list[dict[str, Any]]:
    """The counts of a forward pass, one row for each method."""
    print(f"counting {case}", flush=True)
    model, frozen, bank = make_model(case)
    x, ids = inputs(case)
    rows = []
    base = compiled(net(case), frozen, x)
    rows.append(count_row(case, "base alone", base, case.forward_floor, frozen))
    for form in FORMS:
        with forced(form):
            program = compiled(mixed(model), frozen, bank, x, ids)
        rows.append(count_row(case, form, program, case.forward_floor, (frozen, bank)))
    if not case.scanned:
        program = compiled(ragged, frozen, bank, x, ids)
        rows.append(count_row(case, "ragged_dot", program, case.forward_floor, (frozen, bank)))
    copies = jax.tree.map(lambda w: jax.ShapeDtypeStruct((case.adapters, *w.shape), w.dtype), frozen)
    program = compiled(merged_copies(case), copies, x, ids)
    rows.append(count_row(case, "merged copies", program, case.forward_floor, copies))
    return rows


def count_gradient(case: Case) -> list[dict[str, Any]]:
    """The counts of the gradients of all adapters and of x, one row for each form."""
    print(f"counting the gradient, {case}", flush=True)
    model, frozen, bank = make_model(case)
    rows = []
    for form in FORMS:

        def loss(bank: PyTree, x: Array, frozen: PyTree, ids: Array) -> Any:
            return jnp.sum(model.apply(frozen, bank, x, adapter=ids) ** 2) / 2

        x, ids = inputs(case)
        with forced(form):
            program = compiled(jax.grad(loss, argnums=(0, 1)), bank, x, frozen, ids)
        rows.append(count_row(case, form, program, case.gradient_floor, (frozen, bank)))
    return rows


# --- swaps ---


def measure_swaps() -> tuple[list[dict[str, Any]], Any]:
    """Twenty adapters of other ranks and scales through one jitted function: compilations, errors and times."""
    case = Case(rows=4, tokens=16, adapters=1)
    frozen = draw(make_model(case)[1])
    x = draw(inputs(case)[0])
    loras, alone = [], []
    for i in range(20):
        model = lojax.wrap(net(case), "*", rank=2 + (i * 14) // 19, alpha=(1, 4, 8, 16, 32)[i % 5], axes=("in", "out"))
        lora = draw(jax.eval_shape(model.init, jax.random.key(i), frozen)[1], seed=i)
        loras.append(lora)
        alone.append(np.asarray(jax.jit(model.apply)(frozen, lora, x)))
    like = draw(
        jax.eval_shape(
            lojax.wrap(net(case), "*", rank=16, alpha=24, axes=("in", "out")).init, jax.random.key(0), frozen
        )[1]
    )
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: events.append(name) if name.endswith("backend_compile_duration") else None
    )
    bank = lojax.stack([like] * 4)
    ids = [jnp.full(case.rows, i, jnp.int32) for i in range(4)]
    one, many = jax.jit(model.apply), jax.jit(mixed(model))
    rows = []
    for title, swap, run in (
        ("lojax.conform", lambda i: lojax.conform(loras[i], like), lambda lora, i: one(frozen, lora, x)),
        (
            "bank.replace",
            lambda i: bank.replace(i % 4, loras[i]),
            lambda swapped, i: many(frozen, swapped, x, ids[i % 4]),
        ),
    ):
        errors, seconds, compilations = [], [], 0
        for _ in range(5):
            for i in range(20):
                start = time.perf_counter()
                swapped = jax.block_until_ready(swap(i))
                seconds.append(time.perf_counter() - start)
                events.clear()
                y = np.asarray(run(swapped, i))
                compilations += len(events)
                errors.append(float(np.max(np.abs(y - alone[i])) / np.max(np.abs(alone[i]))))
        rows.append(
            {
                "swap": title,
                "adapters": 20,
                "programs": (one if title == "lojax.conform" else many)._cache_size(),
                "compilations while running": compilations,
                "max relative error": f"{max(errors):.1e}",
                "ms, first time": 1e3 * statistics.median(seconds[:20]),
                "ms, again": 1e3 * statistics.median(seconds[20:]),
                "ms, the net": 1e3 * _seconds(lambda: one(frozen, like, x)),
            }
        )
    return rows, rows


def _seconds(run: Callable[[], Any], rounds: int = 10) -> float:
    return statistics.median(alternated({"run": run}, rounds=rounds)["run"])


# --- clocks ---


def draw(shapes: PyTree, seed: int = 0) -> Any:
    """Random arrays of these shapes, each product of about the size of its input."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / np.sqrt(s.shape[-2]), s.dtype), shapes)


def measure_times(case: Case, rounds: int) -> tuple[dict[str, Any], Any]:
    """One row: the time of each method over that of the base alone on the whole batch."""
    print(f"timing {case}", flush=True)
    model, *shapes = make_model(case)
    frozen, bank = (draw(tree) for tree in shapes)
    x = draw(inputs(case)[0])
    ids = jnp.asarray(np.random.default_rng(1).permutation(max(case.rows, case.adapters))[: case.rows] % case.adapters)
    programs: dict[str, Any] = {}
    for form in FORMS:
        with forced(form):
            run = jax.jit(mixed(model))
            jax.block_until_ready(run(frozen, bank, x, ids))
        programs[form] = functools.partial(run, frozen, bank, x, ids)
    programs["ragged_dot"] = functools.partial(jax.jit(ragged), frozen, bank, x, ids)
    chosen = np.asarray(ids)
    own_x = {int(i): x[np.flatnonzero(chosen == i)] for i in np.unique(chosen)}
    like = bank[0]
    alone = {i: lojax.conform(bank[i], like) for i in own_x}
    merged = {i: lojax.merge(frozen, bank[i]) for i in own_x}
    one, base = jax.jit(model.apply), jax.jit(net(case))
    programs["one adapter at a time"] = lambda: [one(frozen, alone[i], x) for i, x in own_x.items()]
    programs["merged copies"] = lambda: [base(merged[i], x) for i, x in own_x.items()]
    programs["base alone"] = functools.partial(base, frozen, x)
    expected = np.empty(x.shape, np.float32)
    for (i, _), y in zip(own_x.items(), programs["one adapter at a time"](), strict=True):
        expected[np.flatnonzero(chosen == i)] = y
    for name in (*FORMS, "ragged_dot"):
        np.testing.assert_allclose(programs[name](), expected, rtol=1e-4, atol=1e-4)
    seconds = alternated(programs, rounds=rounds, warm=1)
    row = {"case": str(case), "base alone": f"{1e3 * statistics.median(seconds['base alone']):.1f} ms"}
    row |= {name: ratio(seconds, name, "base alone") for name in programs if name != "base alone"}
    return row, {"case": str(case), "adapters in the batch": len(own_x), "seconds": seconds}


# --- a TPU that is not there ---


def optimal_seconds(program: Any) -> float:
    """XLA's estimate; an instruction without one counts as -1 there, and as nothing here."""
    seconds = program.cost_analysis().get("optimal_seconds", float("nan"))
    return seconds + math.ceil(-seconds) if seconds < 0 else seconds


def count_for_tpu(sharding: Sharding) -> list[dict[str, Any]]:
    """One row for each case: the bytes, operations and estimated time of wide over those of gathered."""
    rows = []
    for width in (1024, 4096):
        for batch, tokens in ((8, 1), (32, 1), (64, 1), (8, 256), (64, 256)):
            for count in (2, 4, 8, 16, 32, 64):
                case = Case(batch, tokens, count, width=width, layers=1, dtype=jnp.bfloat16)
                print(f"compiling {case}", flush=True)
                model, frozen, bank = make_model(case)
                programs = {"base": compiled(net(case), frozen, inputs(case)[0], sharding=sharding)}
                for form in FORMS:
                    with forced(form):
                        programs[form] = compiled(mixed(model), frozen, bank, *inputs(case), sharding=sharding)
                rows.append(_tpu_row(case, programs))
    return rows


def _tpu_row(case: Case, programs: dict[str, Any]) -> dict[str, Any]:
    counts = {name: compiled_cost(program) for name, program in programs.items()}
    seconds = {name: optimal_seconds(program) for name, program in programs.items()}
    row: dict[str, Any] = {"m=n": case.width, "B": case.rows, "T": case.tokens, "N·r": case.adapters * case.rank}
    for name in programs:
        row[f"{name}, MiB"] = counts[name].bytes / MIB
    for name in programs:
        row[f"{name}, µs"] = 1e6 * seconds[name]
    gathered, wide = counts["gathered"], counts["wide"]
    row["wide / gathered, FLOPs"] = wide.flops / gathered.flops
    row["bytes"] = wide.bytes / gathered.bytes
    row["time"] = seconds["wide"] / seconds["gathered"]
    return row


# --- the page ---

COUNTED = [Case(n, t, n, scanned) for scanned in (False, True) for n in (8, 64) for t in (256, 1)]
LARGER = [Case(8, 1, 64), Case(8, 1, 512), Case(8, 1, 64, width=2048)]
GRADIENTS = [Case(8, 256, 8), Case(8, 256, 8, scanned=True), Case(8, 256, 8, layers=1)]
TIMED = [Case(8, 256, 8), Case(16, 256, 16), Case(8, 1, 8), Case(64, 1, 64), Case(8, 1, 64)]


def write_tpu(chip: str, device: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the page of a TPU."""
    largest: dict[Any, dict[str, Any]] = {}
    for row in rows:
        key = {name: row[name] for name in ("m=n", "B", "T")}
        line = largest.setdefault(tuple(key.values()), {**key, "B·r": row["B"] * RANK, "largest N·r": 0})
        if row["time"] <= 1 and line["largest N·r"] in (0, row["N·r"] // 2):
            line["largest N·r"] = row["N·r"]
    text = (
        f"One dense layer, bfloat16, r = {RANK}; compiled ahead of time, with XLA's estimates of bytes and time. "
        "No clock. An instruction without an estimate counts as nothing in the time.\n\n"
        f"## The largest N·r up to which wide is estimated to be faster\n\n{table(list(largest.values()))}\n\n"
        f"## All counts\n\n{table(rows)}"
    )
    title = "A batch of mixed adapters on a TPU: gathered or wide"
    write(f"many_adapters_{chip}", title, text, {"rows": rows}, device=device, clocks=False)


def main() -> None:
    """Counts, swaps, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tpu", choices=["v5e", "v6e"], help="compile ahead of time for this chip instead")
    parser.add_argument("--no-time", action="store_true", help="no clocks")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.tpu:
        device, sharding = topology(f"{options.tpu}:2x2")
        write_tpu(options.tpu, device, count_for_tpu(sharding))
        return
    forward = [row for case in COUNTED for row in count_forward(case)]
    larger = [row for case in LARGER for row in count_forward(case) if row["method"] in ("base alone", "gathered")]
    gradients = [row for case in GRADIENTS for row in count_gradient(case)]
    swaps, _ = measure_swaps()
    data = {"forward": forward, "larger": larger, "gradients": gradients, "swaps": swaps}
    text = [
        f"Stacks of {LAYERS} dense layers, float32. The floor is base + low-rank products: 2Tmn + 2Tr(m + n) a layer.",
        f"## {judge(forward, gradients, swaps)}",
        "## Forward\n\n" + table(forward),
        "XLA counts the body of a scan once: the operations of the other layers are added here, the bytes are not.",
        "## While decoding, with a bank larger than the batch, or wider weights\n\n" + table(larger),
        "## Gradients of 8 adapters and of x, over 4Tmn + 6Tr(m + n) a layer\n\n" + table(gradients),
        "## Twenty adapters of ranks 2-16 and five alphas swapped into one jitted function\n\n" + table(swaps),
    ]
    if not options.no_time:
        rounds = {case: options.rounds * (10 if case.tokens == 1 else 1) for case in TIMED}
        timed = [measure_times(case, rounds[case]) for case in TIMED]
        data["seconds"] = [raw for _, raw in timed]
        load = os.getloadavg()[1]
        note = f"Medians of the ratio within a round, over {options.rounds} alternated rounds (decoding: ten times as "
        note += f"many); load {load:.1f}."
        text.append(
            f"## Time over that of the base alone on the same batch\n\n{note}\n\n" + table([r for r, _ in timed])
        )
    title = "A batch of many adapters: what it costs, and what a swap costs"
    write("many_adapters", title, "\n\n".join(text), data, clocks=not options.no_time)


def judge(forward: Sequence[Any], gradients: Sequence[Any], swaps: Sequence[Any]) -> str:
    """The claims, each with its worst row."""

    def worst(rows: Sequence[Any], marks: str) -> float:
        return max(row["/ floor"] for row in rows if row["method"] == "gathered" and marks in row["case"])

    copies = max(row["weight-sized copies"] for row in (*forward, *gradients) if row["method"] in FORMS)
    lines = [
        f"Forward over base + low-rank (gathered), sequences: {worst(forward, 'T=256'):.4f}.",
        f"The same for decoding, where each factor meets one token: {worst(forward, 'T=1 '):.4f}.",
        f"Gradients of 8 adapters over 4Tmn + 6Tr(m + n): {worst(gradients, ''):.4f}.",
        f"Arrays as large as a base weight for each adapter: {copies}.",
        f"Programs for twenty adapters: {max(row['programs'] for row in swaps)}.",
    ]
    return "The claims\n\n" + "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    main()
