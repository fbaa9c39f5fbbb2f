"""An `Analysis` as text: the table, and the lines below it that say what stands out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lojax.analysis.rows import Row
from lojax.report.table import table
from lojax.text import printable

MOST_ROWS = 500
"""Above this many, a stack is one line with the means of its rows."""

Column = tuple[str, Callable[[Row], float | None], str]
"""The name of a column, its number in a row, and the format of that number."""

UPDATE: tuple[Column, ...] = (
    ("norm", lambda row: row.norm, ".4g"),
    ("stable rank", lambda row: row.stable_rank, ".2f"),
    ("effective rank", lambda row: row.effective_rank, ".2f"),
)
BASE: tuple[Column, ...] = (
    ("norm", lambda row: row.norm, ".4g"),
    ("ratio", lambda row: row.ratio, ".4g"),
    ("top ratio", lambda row: row.top_ratio, ".4g"),
    ("stable rank", lambda row: row.stable_rank, ".2f"),
    ("effective rank", lambda row: row.effective_rank, ".2f"),
    ("amplification", lambda row: row.amplification, ".4g"),
    ("intruders", lambda row: row.intruders, "d"),
    ("lost", lambda row: row.lost, ".1%"),
)


def analysis_text(rows: Sequence[Row], top: int, threshold: float) -> str:
    """The table and the lines below it."""
    has_base = any(row.ratio is not None for row in rows)
    columns = [column for column in BASE if column[0] != "intruders" or top] if has_base else list(UPDATE)
    fixed = ("weight", "in -> out", "rank") + (() if has_base else ("scale", "parameters"))
    cells = []
    for line in _lines_of(rows):
        cells.append((*_fixed_cells(line)[: len(fixed)], *(_cell(line, column) for column in columns)))
    header = (*fixed, *(name for name, _, _ in columns))
    return "\n".join([table(header, cells), "", *summary_lines(rows, top, threshold)])


def _lines_of(rows: Sequence[Row]) -> Iterable[Sequence[Row]]:
    """The rows that share a line: each by itself, or those of one stack where there are too many."""
    if len(rows) <= MOST_ROWS:
        return [[row] for row in rows]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.path, []).append(row)
    return groups.values()


def _fixed_cells(rows: Sequence[Row]) -> tuple[str, ...]:
    first = rows[0]
    many = len(rows) > 1
    name = f"{first.path} (mean of {len(rows)})" if many else first.name
    if first.rank is None:
        return printable(name), str(tuple(first.outs)), "full", "", f"{sum(row.parameters for row in rows):,}"
    ranks, scales = ({getattr(row, field) for row in rows} for field in ("rank", "scale"))
    shape = " -> ".join("*".join("?" if n is None else str(n) for n in side) for side in (first.ins, first.outs))
    parameters = f"{sum(row.parameters for row in rows):,}"
    return printable(name), shape, range_text(ranks), range_text(scales), parameters


def range_text(values: Iterable[float | None], joint: str = "-") -> str:
    """The smallest and the largest of some numbers.

    >>> range_text({8, 2, 4}), range_text({0.5}), range_text(())
    ('2-8', '0.5', '')
    """
    known = [value for value in values if value is not None]
    return joint.join(f"{value:.4g}" for value in sorted({min(known), max(known)})) if known else ""


def _cell(rows: Sequence[Row], column: Column) -> str:
    _, read, form = column
    values = [value for row in rows if (value := read(row)) is not None]
    if not values:
        return ""
    if form == "d":
        return str(sum(map(int, values)))
    return format(float(np.mean(values)), form)


def summary_lines(every: Sequence[Row], top: int, threshold: float) -> list[str]:
    """What stands out, a line each."""
    rows = [row for row in every if row.spectrum is not None]
    lines = [_ratios_line(rows)] if rows else []
    idle = [row.name for row in rows if row.idle]
    if idle:
        lines.append(f"{_some(idle)}: b never moved from zero, so the adapter does nothing there.")
    found = [row for row in rows if row.intruders]
    if found:
        total = sum(row.intruders or 0 for row in found)
        lines.append(
            f"{total} intruder dimensions in {len(found)} of {len(rows)} matrices (cosine < {threshold:g} "
            f"among the top {top}): directions that the base did not have. lojax.tame reduces them."
        )
    lost = [row.lost for row in rows if row.lost is not None and not row.idle]
    if lost and max(lost) > 0.1:
        lines.append(
            f"A merge in bfloat16 would leave {min(lost):.0%} to {max(lost):.0%} of the entries as they were: merge "
            "in float32, or serve the adapter beside its base."
        )
    notes: dict[str, list[str]] = {}
    for row in every:
        if row.note and row.rank is not None:
            notes.setdefault(row.note, []).append(row.name)
    return lines + [f"{_some(names)}: {note}." for note, names in notes.items()]


def _ratios_line(rows: Sequence[Row]) -> str:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    count = f"{len(rows)} matri{'x' if len(rows) == 1 else 'ces'}"
    return f"{count}; ||dW|| / ||W0|| {range_text(ratios, ' to ')}." if ratios else f"{count}."


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
