"""Question: which weights, which rank, which variant? The rank table of the LoRA paper on our main job.

The data and net of ``examples/finetune_text.py`` (docstrings of installed packages, test modules unseen in training;
all-MiniLM-L6-v2), a few hundred steps, and one learning rate for all: the one chosen for rank 8 on query and value on
held-out training rows. First ranks against targets (Hu et al. 2021, table 6), then one row for each variant, start, or
optimizer at rank 8 on query and value. Rows in the JSON are not run again, so an interrupted run resumes; ``--fresh``
starts over.

    python benchmarks/lora_study.py [--seeds 0,1,2] [--steps 300]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from measure import RESULTS, Array, PyTree, table, write
from nets import examples

import lojax

bert, model_files = examples()
import docstring_data  # noqa: E402  (a module of examples/)
import text_data  # noqa: E402
import text_training as training  # noqa: E402

NAME = "lora_study"
RATE, ALPHA, LENGTH = 1e-3, 16.0, 32
RANKS = (1, 2, 4, 8, 64)
KERNELS = {
    "q": ("**/query/kernel",),
    "q, v": ("**/query/kernel", "**/value/kernel"),
    "q, k, v, o": ("**/query/kernel", "**/key/kernel", "**/value/kernel", "**/attention/output/kernel"),
    "all": ("**/layer_*/**/kernel",),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"scaling": "rslora"},
    "DoRA": {"variant": "dora"},
    "LoRA-FA": {"variant": "lora-fa"},
    "LoRA+ (ratio 16)": {"b_ratio": 16.0},
    "dropout 0.1": {"dropout": 0.1},
    "biases of the adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "orthogonal": {"init": "orthogonal"},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
    "MiLoRA": {"init": "milora"},
    "EVA": {"start": "eva"},
    "EVA, rho 2": {"start": "eva", "rho": 2.0},
    "LoRA-GA": {"start": "lora_ga"},
}


def train_seeds(
    settings_of_row: Mapping[str, Any], seeds: Sequence[int], steps: int, data: PyTree, classes: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Trains once for each seed, compiled once; yields test accuracy and the number of trained parameters."""
    options = {"targets": KERNELS["q, v"], "rank": 8} | dict(settings_of_row)
    start, rho, ratio = options.pop("start", None), options.pop("rho", 1.0), options.pop("b_ratio", 1.0)
    settings = training.Settings("lora", RATE, rank=options["rank"], max_steps=steps, length=LENGTH, classes=classes)
    net, _ = bert.load(model_files.find(), len(classes), key=jax.random.key(0), dropout=0.0)
    model = lojax.wrap(net, alpha=ALPHA, train="**/classifier/**", **options)

    def loss(frozen: PyTree, lora: PyTree, batch: PyTree) -> Any:
        logits = model.apply(frozen, lora, batch.tokens, batch.mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def init(key: Array, params: PyTree, *example: PyTree, seed: int) -> Any:
        frozen, lora = model.init(key, params, *example)
        batches = [training.batch_at(data[0], dataclasses.replace(settings, seed=seed), i) for i in range(8)]
        if start == "eva":
            lora = lojax.eva(loss, frozen, lora, batches, rho=rho)
        if start == "lora_ga":
            frozen, lora = lojax.lora_ga(loss, frozen, lora, batches)
        return frozen, lora

    def apply(frozen: PyTree, lora: PyTree, *args: PyTree, **kwargs: Any) -> Any:
        key = kwargs.get("rngs", {}).get("dropout") if options.get("dropout") else None
        return model.apply(frozen, lora, *args, dropout_key=key, **kwargs)

    method = training.Method(model.init, apply, functools.partial(lojax.optimizer, b_ratio=ratio))
    program = training.build(method, settings, len(data[0].labels))
    for seed in seeds:
        _, variables = bert.load(model_files.find(), len(classes), key=jax.random.key(seed), dropout=0.0)
        seeded = program._replace(init=functools.partial(init, seed=seed))
        run = training.train(seeded, variables, data, dataclasses.replace(settings, seed=seed))
        adapters = [x for x in jax.tree.leaves(run.state.trained, is_leaf=_is_adapter) if _is_adapter(x)]
        yield {
            "seed": seed,
            "test_accuracy": run.history.epochs[-1]["test_accuracy"],
            "training_loss": float(np.mean(run.history.losses[-50:])),
            "adapter_parameters": sum(adapter.parameters for adapter in adapters),
        }


def _is_adapter(node: Any) -> bool:
    return isinstance(node, lojax.Adapter)


def rows() -> dict[str, dict[str, Any]]:
    """The settings of every row, by name."""
    grid = {f"{name}; r={rank}": {"targets": t, "rank": rank} for name, t in KERNELS.items() for rank in RANKS}
    return grid | VARIANTS


def format_accuracy(records: list[dict[str, Any]]) -> str:
    """The mean accuracy over the seeds, with its standard deviation, in percent."""
    scores = 100 * np.array([one["test_accuracy"] for one in records])
    return f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else f"{scores.mean():.1f}"


def report(results: Mapping[str, list[dict[str, Any]]], steps: int, seeds: tuple[int, ...]) -> None:
    """Writes the tables, the numbers and the plot."""
    done = {name: records for name, records in results.items() if len(records) == len(seeds)}
    grid = [
        {"targets": name}
        | {f"r={rank}": format_accuracy(done[row]) for rank in RANKS if (row := f"{name}; r={rank}") in done}
        for name in KERNELS
    ]
    variants = [
        {
            "rank 8 on query and value": name,
            "test accuracy": format_accuracy(done[name]),
            "training loss": float(np.mean([one["training_loss"] for one in done[name]])),
            "adapter parameters": f"{done[name][0]['adapter_parameters']:,}",
        }
        for name in VARIANTS
        if name in done
    ]
    text = (
        f"{steps} steps of 8 rows, two per update; AdamW at {RATE:g} with warm-up and cosine decay, alpha {ALPHA:g}; "
        f"{len(seeds)} seeds: mean ± standard deviation of the test accuracy in percent. No row was tuned.\n\n"
        f"{table(grid)}\n\n{table(variants)}"
    )
    write(NAME, "Which weights, which rank, which variant", text, {"steps": steps, "runs": results})
    if all(f"{name}; r={rank}" in done for name in KERNELS for rank in RANKS):
        draw(done)


def draw(done: Mapping[str, list[dict[str, Any]]]) -> None:
    """Accuracy by rank, a line for each choice of targets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in KERNELS:
        scores = 100 * np.array([[one["test_accuracy"] for one in done[f"{name}; r={rank}"]] for rank in RANKS])
        axes.errorbar(RANKS, scores.mean(1), scores.std(1, ddof=1), marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set_xlabel("rank")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(KERNELS), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main() -> None:
    """Runs the missing rows and writes the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    texts = docstring_data.load()
    classes = tuple(sorted({row.label for row in texts[0]}))
    data = tuple(
        text_data.encode_rows(part, list(classes), model_files.find() / "tokenizer.json", LENGTH) for part in texts
    )
    file = RESULTS / f"{NAME}.json"
    earlier = json.loads(file.read_text())["data"] if file.exists() and not options.fresh else {}
    results: dict[str, list[dict[str, Any]]] = earlier.get("runs", {}) if earlier.get("steps") == options.steps else {}
    for name, settings in rows().items():
        records = results.setdefault(name, [])
        missing = [seed for seed in options.seeds if all(record["seed"] != seed for record in records)]
        records += train_seeds(settings, missing, options.steps, data, classes) if missing else []
        report(results, options.steps, options.seeds)


if __name__ == "__main__":
    main()
