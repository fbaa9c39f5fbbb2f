"""What a person reads afterwards: a picture of the training, a prediction, a table of methods.

The one idea: nothing here computes anything that was not measured by the run.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from matplotlib.figure import Figure
from text_training import History, Run, Settings

import lojax


def write_json(file: Path, value: Any) -> None:
    """Writes a value as readable JSON; the folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def prediction(logits: np.ndarray, classes: Sequence[str]) -> str:
    """One line a class, the likeliest first: its probability and its name.

    Args:
        logits: ``[C]``.
        classes: C names.

    Returns:
        The lines.

    Example:
        >>> print(prediction(np.log([0.25, 0.75]), ["cat", "dog"]))
         75.00%  dog
         25.00%  cat
    """
    chances = shares(logits)
    order = np.argsort(-chances, kind="stable")
    return "\n".join(f"{chances[i]:7.2%}  {classes[i]}" for i in order)


def read_prediction(text: str, classes: Sequence[str]) -> np.ndarray:
    """The probabilities ``[C]`` in the lines that `prediction` wrote, to 1e-4."""
    found = {}
    for line in text.splitlines():
        share, _, name = line.strip().partition("%  ")
        found[name] = float(share) / 100
    return np.array([found[name] for name in classes])


def shares(logits: np.ndarray) -> np.ndarray:
    """Softmax of ``[C]``."""
    powers = np.exp(logits - np.max(logits))
    return powers / powers.sum()


def draw_curves(file: Path, history: History, *, chance: float) -> None:
    """Draws loss and accuracy over the steps, training and test, into a PNG.

    Args:
        file: the picture.
        history: of the run.
        chance: the accuracy of guessing, drawn as a dotted line.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends = [record["step"] for record in history.epochs]
    for axes, title, steps, name in (
        (left, "loss", history.losses, "test_loss"),
        (right, "accuracy", history.accuracies, "test_accuracy"),
    ):
        count = min(20, len(steps))
        mean = np.convolve(steps, np.ones(count) / count, mode="valid")
        places = np.arange(1, len(steps) + 1)
        axes.plot(places, steps, color="tab:blue", alpha=0.15)
        axes.plot(places[count - 1 :], mean, color="tab:blue", label=f"training, last {count} steps")
        tests = [record[name] for record in history.epochs]
        axes.plot(ends, tests, "o-", color="tab:orange", label="test, after each epoch")
        axes.set(title=title, xlabel="step")
    right.axhline(chance, color="grey", linestyle=":", label="guessing")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def record(settings: Settings, run: Run, folder: Path) -> dict[str, Any]:
    """What `--compare` says of a run; its checkpoint is written to be weighed.

    Args:
        settings: of the run.
        run: finished.
        folder: overwritten with the run's checkpoint.

    Returns:
        A row of the comparison. ``trained`` counts parameters, sizes are in bytes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if settings.method == "full":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve(), run.state.trained)
    else:
        lojax.save(folder, run.state.trained, frozen=run.frozen)
    return {
        "method": settings.method,
        "seed": settings.seed,
        "learning_rate": settings.learning_rate,
        "training_loss": run.history.epochs[-1]["loss"],
        "test_accuracy": run.history.epochs[-1]["test_accuracy"],
        "trained": _count(run.state.trained),
        "parameters": _count(run.state.trained) + _count(run.frozen),
        "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(run.state.optimizer)),
        "step_seconds": run.step_seconds,
        "checkpoint_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    }


def comparison(records: list[dict[str, Any]]) -> str:
    """The table of `--compare`, one line a method, as Markdown.

    Args:
        records: as `record` makes them, one a method and seed.

    Returns:
        The table. The accuracy is a mean over the seeds, with its standard deviation.
    """
    lines = [
        "| method | learning rate | test accuracy | trained parameters | optimizer state | step | checkpoint |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == method]
        scores = np.array([record["test_accuracy"] for record in mine])
        spread = f" ± {scores.std(ddof=1):.2%} ({len(mine)} seeds)" if len(mine) > 1 else ""
        one = mine[0]
        step = np.median([record["step_seconds"] for record in mine])
        lines.append(
            f"| {method} | {one['learning_rate']:g} | {scores.mean():.2%}{spread} "
            f"| {one['trained']:,} ({one['trained'] / one['parameters']:.2%}) "
            f"| {one['optimizer_bytes'] / 1e6:.2f} MB | {step * 1e3:.0f} ms "
            f"| {one['checkpoint_bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def tuning(records: list[dict[str, Any]]) -> str:
    """The table of `--tune`, one line a method, as Markdown: mean accuracy on held-out rows by learning rate."""
    lines = ["| method | held-out accuracy by learning rate | chosen |", "|---|---|---|"]
    for method in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == method]
        scores = {
            rate: np.mean([record["test_accuracy"] for record in mine if record["learning_rate"] == rate])
            for rate in sorted({record["learning_rate"] for record in mine})
        }
        tried = ", ".join(f"{rate:g}: {score:.2%}" for rate, score in scores.items())
        lines.append(f"| {method} | {tried} | {max(scores, key=scores.__getitem__):g} |")
    return "\n".join(lines)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
