"""The user's own task: a CSV or JSON-lines file with a column of texts and a column of labels.

The one idea: a file is checked whole before anything is trained, and every complaint names the
lines and columns it is about.
"""

import csv
import json
import random
from collections import Counter
from pathlib import Path

from docstring_data import Row


def load(
    file: str | Path, *, text: str, label: str, test_share: float = 0.2, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Reads a labelled table and splits it.

    Args:
        file: ``.csv`` with a header line, or ``.jsonl`` / ``.json`` with one object a line.
        text: the column of texts.
        label: the column of labels; numbers are read as their text.
        test_share: the share of each label's rows that is kept for the test.
        seed: of the split.

    Returns:
        ``(train, test)``. A text that occurs more than once is kept once; every label is in both.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown kind of file, a missing column, empty cells, a text under two
            labels, fewer than two labels, or a label with a single row.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"--data {file}: no such file.")
    rows = _unique(file, _checked(file, _read(file), text, label))
    counts = Counter(row.label for row in rows)
    if len(counts) < 2:
        raise ValueError(
            f"{file}: column {label!r} has one class only ({next(iter(counts), 'no rows')!r}); "
            "a classifier needs two or more. Is --label the right column?"
        )
    if single := sorted(name for name, count in counts.items() if count < 2):
        raise ValueError(
            f"{file}: {_few(single)} in column {label!r} have one row each; every label needs two "
            "or more, one to train on and one to test. Is --label the right column?"
        )
    train, test = [], []
    for name in sorted(counts):
        mine = [row for row in rows if row.label == name]
        random.Random(f"{seed} {name}").shuffle(mine)
        size = min(len(mine) - 1, max(1, round(test_share * len(mine))))
        test += mine[:size]
        train += mine[size:]
    return train, test


def _read(file: Path) -> list[tuple[int, dict]]:
    """``(line, record)`` of every row."""
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            return [(reader.line_num, record) for record in reader]
    if file.suffix not in (".jsonl", ".json"):
        raise ValueError(f"--data {file}: the name ends in {file.suffix!r}; use .csv or .jsonl.")
    records = []
    for line, string in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not string.strip():
            continue
        try:
            record = json.loads(string)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {line}: not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{file}, line {line}: expected one JSON object a line, such as "
                f'{{"text": "...", "label": "..."}}; got {type(record).__name__}.'
            )
        records.append((line, record))
    return records


def _checked(file: Path, records: list[tuple[int, dict]], text: str, label: str) -> list[tuple[int, Row]]:
    """The rows, once no column and no cell is missing."""
    if not records:
        raise ValueError(f"{file}: no rows. A CSV needs a header line and rows below it.")
    columns = list(dict.fromkeys(name for _, record in records for name in record if name))
    for option, name in (("--text", text), ("--label", label)):
        if name not in columns:
            raise ValueError(f"{file}: no column {name!r} ({option}). Its columns: {', '.join(columns)}.")
    rows, empty = [], []
    for line, record in records:
        cells = [record.get(name) for name in (text, label)]
        cells = ["" if cell is None else str(cell).strip() for cell in cells]
        if all(cells):
            rows.append((line, Row(cells[0], cells[1], f"line {line}")))
        else:
            empty.append(str(line))
    if empty:
        raise ValueError(
            f"{file}: {len(empty)} rows with an empty {text!r} or {label!r}, at lines "
            f"{_few(empty)}. Fill or delete them."
        )
    return rows


def _unique(file: Path, rows: list[tuple[int, Row]]) -> list[Row]:
    """Each text once; the same text under two labels is an error."""
    first: dict[str, tuple[int, Row]] = {}
    for line, row in rows:
        line_before, before = first.setdefault(row.text, (line, row))
        if before.label != row.label:
            raise ValueError(
                f"{file}: lines {line_before} and {line} hold the same text under two labels, "
                f"{before.label!r} and {row.label!r}. Keep one of them."
            )
    return [row for _, row in first.values()]


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
