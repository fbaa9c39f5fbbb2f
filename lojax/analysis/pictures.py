"""Pictures of an `Analysis` and of a `Similarity`, for a report: wide as a page, and readable when printed small."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lojax.analysis.layers import Grid, layer_grid
from lojax.analysis.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

WIDTH = 6.5
"""Of a figure, in inches: a page of text."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's colors, which readers with any color vision can tell apart."""
STYLE: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "savefig.dpi": 200, "legend.frameon": False, "lines.linewidth": 1.2}
MOST_NUMBERS = 16
"""The most layers for which the numbers stand in the cells of a heat map."""
FLOOR = 1e-3
"""Where the spectra end: what is below is nothing beside the largest value."""

Panel = tuple[float, Callable[["SubFigure"], None]]
"""A part of a figure: its height in inches, and what draws it."""


def plot_analysis(rows: Sequence[Row], path: str | os.PathLike[str] | None, *, top: int) -> Figure:
    """The updates by layer and kind, the intruders, and the spectra; see `lojax.Analysis.plot`."""
    rows = [row for row in rows if row.spectrum is not None]
    if not rows:
        raise ValueError("There is no adapter to draw: every row is a parameter trained in full.")
    grid = layer_grid([row.name for row in rows])
    if any(row.ratio is not None for row in rows):
        values = grid.fill([None if row.ratio is None else 100 * row.ratio for row in rows])
        title = "Size of the update, ‖ΔW‖ / ‖W₀‖ in %"
    else:
        values, title = grid.fill([row.norm for row in rows]), "Size of the update, ‖ΔW‖"
    height = _grid_height(grid)
    panels: list[Panel] = [(height, lambda part: _heat_map(part, grid, values, title, "Blues"))]
    if any(row.intruders is not None for row in rows):
        counts = grid.fill([row.intruders for row in rows], total=True)
        title_of_counts = f"Intruders among the top {top} directions"
        panels.append((height, lambda part: _heat_map(part, grid, counts, title_of_counts, "Oranges", limits=(0, 3))))
    panels.append((2.4, lambda part: _spectra(part, grid, rows)))
    return _draw(panels, path)


def plot_similarity(
    rows: Sequence[tuple[str, np.ndarray, float, int]], of: str, path: str | os.PathLike[str] | None
) -> Figure:
    """``phi(i, j)`` and the cosines; see `lojax.Similarity.plot`.

    Args:
        rows: For each matrix its name, ``phi``, the cosine of the updates, and the length of the directions.
        of: Whose directions they are.
        path: The file to write; None for none.
    """
    grid = layer_grid([name for name, *_ in rows])
    cosines = grid.fill([cosine for _, _, cosine, _ in rows])
    phis = [(phi, width) for _, phi, _, width in rows if phi.size]
    panels: list[Panel] = []
    if phis:
        whose = {"a": "A", "b": "B", "in": "the updates, inputs", "out": "the updates, outputs"}[of]
        panels.append((2.7, lambda part: _subspaces(part, phis, f"φ(i, j) of {whose}")))
    title = "Cosine of the updates"
    panels.append((_grid_height(grid), lambda part: _heat_map(part, grid, cosines, title, "RdBu_r", limits=(-1, 1))))
    return _draw(panels, path)


def _draw(panels: Sequence[Panel], path: str | os.PathLike[str] | None) -> Figure:
    """The panels one below another, each with a layout of its own, so that a legend of one narrows no other."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot needs matplotlib: pip install matplotlib", name=error.name) from None
    with matplotlib.rc_context(STYLE):
        heights = [height for height, _ in panels]
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        parts = np.ravel(np.array(figure.subfigures(len(panels), 1, height_ratios=heights), object))
        for part, (_, draw) in zip(parts, panels, strict=True):
            draw(part)
        if path is not None:
            figure.savefig(path)
    return figure


def _grid_height(grid: Grid) -> float:
    return 0.75 + 0.21 * len(grid.kinds)


def _heat_map(
    part: SubFigure, grid: Grid, values: np.ndarray, title: str, colors: str, *, limits: tuple[float, float] = (0, 0)
) -> None:
    """``[kinds, layers]`` as colors, with numbers in the cells where there is room; bars if there are no layers."""
    largest = max(limits[1], values[np.isfinite(values)].max(initial=0.0)) or 1.0
    axes = part.subplots()
    axes.set_title(title)
    axes.set_yticks(range(len(grid.kinds)), grid.kinds)
    axes.tick_params(axis="y", length=0)
    if grid.layers == ("",):
        bars = axes.barh(range(len(grid.kinds)), np.nan_to_num(values[:, 0]), color=COLORS[0])
        axes.bar_label(bars, [_number(value) for value in values[:, 0]], padding=3)
        axes.set(xlim=(1.1 * limits[0], 1.1 * largest), ylim=(len(grid.kinds) - 0.4, -0.6))
        return
    image = axes.imshow(values, cmap=colors, vmin=limits[0], vmax=largest, aspect="auto")
    step = -(-len(grid.layers) // 20)
    axes.set_xticks(range(0, len(grid.layers), step), grid.layers[::step])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(grid.layers) > MOST_NUMBERS:
        part.colorbar(image, ax=axes, pad=0.01, aspect=12).outline.set_visible(False)
        return
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(j, i, _number(value), ha="center", va="center", color="white" if is_dark else "black")


def _number(value: float) -> str:
    """Two digits of a number, without an exponent; no more than two after the point.

    >>> [_number(x) for x in (0.0123, 123.4, -0.0001, 2.0, 0.3)]
    ['0.01', '123', '0', '2', '0.3']
    """
    if not np.isfinite(value):
        return str(value)
    rounded = round(float(f"{value:.2g}") if abs(value) < 10 else value, 2 if abs(value) < 10 else 0)
    return np.format_float_positional(rounded + 0.0, trim="-")  # no -0


def _spectra(part: SubFigure, grid: Grid, rows: Sequence[Row]) -> None:
    """For each kind the spectra relative to the largest value, the median over its layers; behind them all of them."""
    by_kind: dict[int, list[np.ndarray]] = {}
    for (kind, _), row in zip(grid.cells, rows, strict=True):
        if row.spectrum is not None and row.spectrum.size and row.spectrum[0] > 0:
            by_kind.setdefault(kind, []).append(row.spectrum / row.spectrum[0])
    axes = part.subplots()
    longest = max((len(s) for spectra in by_kind.values() for s in spectra), default=1)
    places, every, has_layers = np.arange(1, longest + 1), [], grid.layers != ("",)
    for kind, spectra in sorted(by_kind.items()):
        padded = np.maximum([np.pad(s, (0, longest - len(s))) for s in spectra], FLOOR)
        color, line = COLORS[kind % len(COLORS)], ("-", "--", ":")[kind // len(COLORS) % 3]
        axes.plot(places, np.median(padded, 0), line, marker="o", markersize=2, color=color, label=grid.kinds[kind])
        every.append(padded)
    if every:
        stacked = np.concatenate(every)
        if has_layers:
            axes.fill_between(places, stacked.min(0), stacked.max(0), color="0.92", linewidth=0, zorder=0)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), ncol=1 + (len(by_kind) > 12))
    axes.set_title("Spectra of the updates" + (": median over the layers, and the range of all" if has_layers else ""))
    axes.set(xlabel="i", ylabel="σᵢ / σ₁", yscale="log", ylim=(FLOOR, 1.3))
    if longest <= 16:
        axes.set_xticks(range(1, longest + 1))


def _subspaces(part: SubFigure, phis: Sequence[tuple[np.ndarray, int]], title: str) -> None:
    """``phi`` as a map, the mean over the matrices; beside it ``phi(i, i)`` with its range, and what chance gives."""
    rows, columns = (min(phi.shape[axis] for phi, _ in phis) for axis in (0, 1))
    values = np.array([phi[:rows, :columns] for phi, _ in phis])
    left, right = part.subplots(1, 2)
    image = left.imshow(values.mean(0).T, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
    left.set(xlabel="i, first adapter", ylabel="j, second adapter")
    left.set_title(title)
    for axis, size in ((left.xaxis, rows), (left.yaxis, columns)):
        step = -(-size // 8)
        axis.set_ticks(range(0, size, step), [str(i + 1) for i in range(0, size, step)])
    part.colorbar(image, ax=left, pad=0.02).outline.set_visible(False)
    count = min(rows, columns)
    places = np.arange(1, count + 1)
    diagonal = values[:, places - 1, places - 1]
    right.plot(places, diagonal.mean(0), marker="o", markersize=2, color=COLORS[0], label="mean of the matrices")
    right.fill_between(
        places, diagonal.min(0), diagonal.max(0), color=COLORS[0], alpha=0.15, linewidth=0, label="range"
    )
    chance = np.mean([places / width for _, width in phis], 0)
    right.plot(places, chance, "--", color="0.4", label="random directions")
    right.set(xlabel="i", ylim=(0, 1.05))
    right.set_title("φ(i, i)")
    right.legend(loc="best")
    if count <= 16:
        right.set_xticks(places)
