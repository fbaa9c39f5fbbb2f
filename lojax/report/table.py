"""Plain-text tables."""

from __future__ import annotations

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
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def render(line: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([render(header), rule, *map(render, rows)])


def _is_number(cell: str) -> bool:
    return not cell or cell.replace(",", "").replace(".", "").replace("%", "").replace("+", "").strip().isdigit()
