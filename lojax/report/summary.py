"""The table of what trains."""

from __future__ import annotations

import dataclasses

import numpy as np

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.trees import check_pair
from lojax.report.table import html_table, rank_text, table
from lojax.types import Params, Path, Shape

_HEADER = ("parameter", "shape", "rank", "trainable", "all")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path, shape, rank (None if it has no adapter), and how many numbers train and are there.

    ``requested_rank`` is the rank that was asked for, where it was above min(m, n): the table says ``8 → 3``.
    """

    path: Path
    shape: Shape
    rank: int | None
    trainable: int
    total: int
    requested_rank: int | None = None

    @property
    def rank_text(self) -> str:
        """The rank as the table shows it."""
        return "" if self.rank is None else rank_text(self.rank, self.requested_rank)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What trains, row by row. It shows as a table, printed, in a REPL and in a notebook."""

    rows: tuple[Row, ...]

    @property
    def trainable(self) -> int:
        """The number of parameters that train."""
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        """The number of all parameters, adapters included."""
        return sum(row.total for row in self.rows)

    @property
    def percent(self) -> float:
        """The share that trains, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._cells(), [self.line])

    @property
    def line(self) -> str:
        """The closing line, as Hugging Face PEFT prints it."""
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"

    def text(self, *, frozen: bool = True) -> str:
        """The table and the closing line; with ``frozen=False`` only the rows of what trains."""
        return table(_HEADER, self._cells(frozen=frozen)) + "\n" + self.line

    def _cells(self, *, frozen: bool = True) -> list[tuple[str, ...]]:
        return [
            (
                row.path,
                str(row.shape),
                row.rank_text,
                f"{row.trainable:,}",
                f"{row.total:,}",
            )
            for row in self.rows
            if frozen or row.trainable
        ]


def summary(frozen: Params, lora: Params) -> Summary:
    """How many parameters train and how many there are, one row a parameter.

    Args:
        frozen: The frozen tree: arrays, or shapes (`jax.eval_shape`).
        lora: The trained tree, likewise.

    Returns:
        A `Summary`: its ``rows`` are data, and printing it gives the table.

    Raises:
        TypeError: A leaf is neither an array nor a number, or ``frozen`` holds an adapter.
        ValueError: The trees do not fit together.

    >>> import numpy as np
    >>> from lojax import Adapter
    >>> adapter = Adapter(a=np.ones((30, 2)), b=np.ones((2, 50)), scale=1.0, axes=("in", "out"))
    >>> print(summary({"kernel": np.ones((30, 50)), "bias": np.ones(50)}, {"kernel": adapter, "bias": None}))
    parameter  shape     rank  trainable    all
    -------------------------------------------
    bias       (50,)                   0     50
    kernel     (30, 50)     2        160  1,660
    trainable params: 160 || all params: 1,710 || trainable%: 9.3567
    """
    frozen_leaves, lora_leaves = check_pair(frozen, lora)
    rows = []
    for path in frozen_leaves:
        weight, trained = unbox(frozen_leaves[path]), unbox(lora_leaves[path])
        if is_adapter(trained):
            size = trained.parameters
            shape = np.shape(weight)
            rows.append(Row(path, shape, trained.rank, size, size + np.size(weight), trained.requested_rank))
            continue
        if trained is not None:
            rows.append(Row(path, np.shape(trained), None, np.size(trained), np.size(trained)))
        elif weight is not None:
            rows.append(Row(path, np.shape(weight), None, 0, np.size(weight)))
    return Summary(tuple(rows))
