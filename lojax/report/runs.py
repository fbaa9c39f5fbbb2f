"""What many runs came to: their scores by setting, the best of them, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from lojax.report.table import table
from lojax.text import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Sequence[Mapping[str, Any]]
"""The settings of each run, by name; the same names in all."""


def runs_table(runs: Runs, scores: Mapping[str, ArrayLike], *, over: str | None = "seed") -> str:
    """A line for each setting, with the mean and the standard deviation of its scores over one of the settings.

    >>> print(runs_table([{"rank": 1}, {"rank": 2}], {"loss": [0.5, 0.25]}))
    rank  loss
    ----------
       1   0.5
       2  0.25
    """
    columns = {name: _check_scores(name, values, len(runs)) for name, values in scores.items()}
    groups, over = group_runs(runs, over)
    settings = [name for name in runs[0] if name != over]
    counted = ["runs"] if over else []
    rows = [
        [_text(runs[group[0]][name]) for name in settings]
        + [str(len(group)) for _ in counted]
        + [_mean_text(values[group]) for values in columns.values()]
        for group in groups
    ]
    return table([*settings, *counted, *columns], rows)


def best_run(runs: Runs, scores: ArrayLike, *, maximize: bool, over: str | None = "seed") -> int:
    """The number of the best run of the setting with the best mean; means that are not finite never win.

    >>> runs = [{"rank": 1, "seed": 0}, {"rank": 1, "seed": 1}, {"rank": 2, "seed": 0}, {"rank": 2, "seed": 1}]
    >>> best_run(runs, [0.9, 0.1, 0.6, 0.7], maximize=True), best_run(runs, [0.9, 0.1, 0.6, 0.7], maximize=False)
    (3, 1)
    """
    values = _check_scores("scores", scores, len(runs)) * (1 if maximize else -1)
    groups, _ = group_runs(runs, over)
    means = np.array([values[group].mean() for group in groups])
    if not np.isfinite(means).any():
        raise ValueError("No setting has a finite mean score: every run diverged. Try smaller learning rates.")
    group = groups[int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))]
    return group[int(np.argmax(values[group]))]


def plot_runs(
    runs: Runs, scores: ArrayLike, *, x: str = "learning_rate", label: str = "score", over: str | None = "seed"
) -> Figure:
    """The mean scores against the setting ``x``, with a line for each choice of the others."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot needs matplotlib: pip install matplotlib", name=error.name) from None
    values = _check_scores("scores", scores, len(runs))
    _check_name(runs, x)
    groups, over = group_runs(runs, over)
    others = [name for name in runs[0] if name not in (x, over) and len({repr(run[name]) for run in runs}) > 1]
    lines: dict[str, list[list[int]]] = {}
    for group in groups:
        run = runs[group[0]]
        lines.setdefault(", ".join(f"{name} {_text(run[name])}" for name in others), []).append(group)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, own in lines.items():
        means, spreads = (np.array([f(values[group]) for group in own]) for f in (np.mean, _spread))
        axes.errorbar([runs[group[0]][x] for group in own], means, yerr=spreads, marker="o", capsize=3, label=name)
    places = [run[x] for run in runs]
    if all(_is_number(place) for place in places) and min(places) > 0 and max(places) >= 4 * min(places):
        axes.set_xscale("log")
        axes.set_xticks(sorted({*places}), [_text(place) for place in sorted({*places})])
        axes.set_xticks([], minor=True)  # whose labels would overlap
    axes.set(xlabel=x.replace("_", " "), ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    if others:
        axes.legend(frameon=False)
    return figure


def group_runs(runs: Runs, over: str | None) -> tuple[list[list[int]], str | None]:
    """The numbers of the runs that differ in the setting ``over`` alone, and ``over``; None where it is not there.

    >>> group_runs([{"rank": 1, "seed": 0}, {"rank": 2, "seed": 0}, {"rank": 1, "seed": 1}], "seed")
    ([[0, 2], [1]], 'seed')
    """
    if over == "seed" and over not in runs[0]:  # the default
        over = None
    if over is not None:
        _check_name(runs, over)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(tuple(repr(value) for name, value in run.items() if name != over), []).append(i)
    return list(groups.values()), over


def _check_name(runs: Runs, name: str) -> None:
    if name not in runs[0]:
        raise ValueError(f"The runs have no setting {name!r}; they have {[*runs[0]]}.{suggest(name, runs[0])}")


def _check_scores(name: str, scores: ArrayLike, size: int) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.shape != (size,):
        raise ValueError(f"{name} has shape {values.shape}; expected one number for each of the {size} runs.")
    return values


def _spread(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _mean_text(values: np.ndarray) -> str:
    mean = f"{np.mean(values):.4g}"
    return f"{mean} ± {_spread(values):.4g}" if len(values) > 1 else mean


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number))
