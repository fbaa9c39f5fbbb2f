"""Tables in plain text, and the same tables in HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header; columns whose cells are all numbers are right-aligned.

    >>> print(table(("name", "size"), [("a", "1"), ("bb", "20")]))
    name  size
    ----------
    a        1
    bb      20
    """
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = _numeric_columns(header, rows)

    def render(line: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([render(header), rule, *map(render, rows)])


def rank_text(rank: int, requested_rank: int | None) -> str:
    """A rank as tables show it, with the one that was asked for where it was lowered.

    >>> rank_text(3, 8), rank_text(3, None)
    ('8 → 3', '3')
    """
    return f"{requested_rank} → {rank}" if requested_rank else str(rank)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """The same table as HTML, with a paragraph below it for each note.

    >>> print(html_table(("name", "size"), [("a<b", "1")], ["one row"]))
    <table>
    <tr><th style="text-align: left">name</th><th style="text-align: right">size</th></tr>
    <tr><td style="text-align: left">a&lt;b</td><td style="text-align: right">1</td></tr>
    </table>
    <p>one row</p>
    """
    sides = ["right" if numeric else "left" for numeric in _numeric_columns(header, rows)]

    def render(line: Sequence[str], tag: str) -> str:
        cells = (
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(line, sides, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    lines = ["<table>", render(header, "th"), *(render(row, "td") for row in rows), "</table>"]
    return "\n".join([*lines, *(f"<p>{html.escape(note)}</p>" for note in notes)])


def _numeric_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    return [all(_is_number(row[i]) for row in rows) for i in range(len(header))]


def _is_number(cell: str) -> bool:
    return not cell or cell.replace(",", "").replace(".", "").replace("%", "").replace("+", "").strip().isdigit()
