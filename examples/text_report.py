"""What a person reads afterwards: curves of the training, a prediction, a table of methods.

Nothing here computes anything; it only shows what the run measured.
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
from lojax.quantized.quantized import Quantized


def write_json(file: Path, value: Any) -> None:
    """Writes a value as readable JSON, and creates the folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def prediction(logits: np.ndarray, classes: Sequence[str]) -> str:
    """One line a class, the most likely first: its probability and its name.

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
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind="stable")
    return "\n".join(f"{probabilities[i]:7.2%}  {classes[i]}" for i in order)


def read_prediction(text: str, classes: Sequence[str]) -> np.ndarray:
    """The probabilities ``[C]`` in the lines that `prediction` wrote, to 1e-4."""
    probabilities = {}
    for line in text.splitlines():
        percent, _, name = line.strip().partition("%  ")
        probabilities[name] = float(percent) / 100
    return np.array([probabilities[name] for name in classes])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of ``[C]``."""
    exponentials = np.exp(logits - np.max(logits))
    return exponentials / exponentials.sum()


def draw_curves(file: Path, history: History, *, chance: float) -> None:
    """Plots training and test loss and accuracy over the steps, as a PNG.

    Args:
        file: The PNG file.
        history: The history of the run.
        chance: The accuracy of guessing, drawn as a dotted line.
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
        numbers = np.arange(1, len(steps) + 1)
        axes.plot(numbers, steps, color="tab:blue", alpha=0.15)
        axes.plot(numbers[count - 1 :], mean, color="tab:blue", label=f"training, last {count} steps")
        tests = [record[name] for record in history.epochs]
        axes.plot(ends, tests, "o-", color="tab:orange", label="test, after each epoch")
        axes.set(title=title, xlabel="step")
    right.axhline(chance, color="grey", linestyle=":", label="guessing")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def base_size(variables: Any, kind: str) -> str:
    """One line: the bytes of the base, without the head, before it was quantized and after."""
    base = {name: tree for name, tree in variables["params"].items() if name != "classifier"}
    before = sum(leaf.size * leaf.dtype.itemsize for leaf in _weights(base))
    after = sum(leaf.nbytes for leaf in _weights(base))
    return f"The base in {kind}: {before:,} bytes before, {after:,} after ({after / before:.1%})."


def record(settings: Settings, run: Run, folder: Path) -> dict[str, Any]:
    """The row of `--compare` for a run. Writes its checkpoint, to measure the size.

    Args:
        settings: The settings of the run.
        run: The finished run.
        folder: Overwritten with the checkpoint.

    Returns:
        The row. ``trained`` and ``parameters`` are numbers of parameters, sizes are in bytes; ``frozen_bytes`` is what
        is stored of the frozen base.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if settings.method == "full":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve(), run.state.trained)
    else:
        lojax.save(folder, run.state.trained, frozen=run.frozen)
    return {
        "method": settings.method if settings.quantize is None else f"{settings.method}-{settings.quantize}",
        "seed": settings.seed,
        "learning_rate": settings.learning_rate,
        "training_loss": run.history.epochs[-1]["loss"],
        "test_accuracy": run.history.epochs[-1]["test_accuracy"],
        "trained": _count(run.state.trained),
        "parameters": _count(run.state.trained) + _count(run.frozen),
        "frozen_bytes": sum(leaf.nbytes for leaf in _weights(run.frozen)),
        "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(run.state.optimizer)),
        "step_seconds": run.step_seconds,
        "checkpoint_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    }


def comparison(records: list[dict[str, Any]]) -> str:
    """The table of `--compare`, one line a method, as Markdown.

    Args:
        records: Those of `record`, one for each method and seed.

    Returns:
        The table. The accuracy is a mean over the seeds, with its standard deviation.
    """
    lines = [
        "| method | learning rate | test accuracy | trained parameters | frozen base | optimizer | step | checkpoint |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(record["method"] for record in records):
        runs = [record for record in records if record["method"] == method]
        scores = np.array([record["test_accuracy"] for record in runs])
        deviation = f" ± {scores.std(ddof=1):.2%} ({len(runs)} seeds)" if len(runs) > 1 else ""
        one = runs[0]
        step = np.median([record["step_seconds"] for record in runs])
        lines.append(
            f"| {method} | {one['learning_rate']:g} | {scores.mean():.2%}{deviation} "
            f"| {one['trained']:,} ({one['trained'] / one['parameters']:.2%}) "
            f"| {one['frozen_bytes'] / 1e6:.2f} MB "
            f"| {one['optimizer_bytes'] / 1e6:.2f} MB | {step * 1e3:.0f} ms "
            f"| {one['checkpoint_bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def tuning(records: list[dict[str, Any]]) -> str:
    """The table of `--tune`, one line a method, as Markdown: mean accuracy on held-out rows by learning rate."""
    lines = ["| method | held-out accuracy by learning rate | chosen |", "|---|---|---|"]
    for method in dict.fromkeys(record["method"] for record in records):
        runs = [record for record in records if record["method"] == method]
        scores = {
            rate: np.mean([record["test_accuracy"] for record in runs if record["learning_rate"] == rate])
            for rate in sorted({record["learning_rate"] for record in runs})
        }
        tried = ", ".join(f"{rate:g}: {score:.2%}" for rate, score in scores.items())
        lines.append(f"| {method} | {tried} | {max(scores, key=scores.__getitem__):g} |")
    return "\n".join(lines)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in _weights(tree))


def _weights(tree: Any) -> list[Any]:
    """The leaves, a quantized weight as one: its size and dtype are those of the weight, its bytes what is stored."""
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Quantized))
