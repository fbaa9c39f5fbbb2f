"""The user's own task: a CSV or JSON-lines file with a column of texts and a column of labels.

The whole file is checked before anything is trained, and every error names the lines and columns.
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
        text: The column of texts.
        label: The column of labels; numbers are read as text.
        test_share: The fraction of each label's rows that becomes test rows.
        seed: The seed of the split.

    Returns:
        ``(train, test)`` without repeated texts; every label is in both.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown kind of file, a missing column, empty cells, a text with two labels, fewer than two
            labels, or a label with a single row.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"--data {file}: no such file.")
    rows = _deduplicate(file, _check_rows(file, _read(file), text, label))
    counts = Counter(row.label for row in rows)
    if len(counts) < 2:
        raise ValueError(
            f"{file}: column {label!r} has one class only ({next(iter(counts), 'no rows')!r}); "
            "a classifier needs two or more. Is --label the right column?"
        )
    if single := sorted(name for name, count in counts.items() if count < 2):
        raise ValueError(
            f"{file}: {_first_names(single)} in column {label!r} have one row each; every label needs two "
            "or more, one to train on and one to test. Is --label the right column?"
        )
    train, test = [], []
    for name in sorted(counts):
        members = [row for row in rows if row.label == name]
        random.Random(f"{seed} {name}").shuffle(members)
        size = min(len(members) - 1, max(1, round(test_share * len(members))))
        test += members[:size]
        train += members[size:]
    return train, test


def _read(file: Path) -> list[tuple[int, dict]]:
    """The line number and the record of every row."""
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


def _check_rows(file: Path, records: list[tuple[int, dict]], text: str, label: str) -> list[tuple[int, Row]]:
    """The rows; raises if a column or a cell is missing."""
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
            f"{_first_names(empty)}. Fill or delete them."
        )
    return rows


def _deduplicate(file: Path, rows: list[tuple[int, Row]]) -> list[Row]:
    """The rows without repeated texts; raises if a text has two labels."""
    first: dict[str, tuple[int, Row]] = {}
    for line, row in rows:
        line_before, before = first.setdefault(row.text, (line, row))
        if before.label != row.label:
            raise ValueError(
                f"{file}: lines {line_before} and {line} have the same text with two labels, "
                f"{before.label!r} and {row.label!r}. Keep one of them."
            )
    return [row for _, row in first.values()]


def _first_names(names: list[str]) -> str:
    text = ", ".join(names[:10])
    return text if len(names) <= 10 else f"{text} and {len(names) - 10} more"
