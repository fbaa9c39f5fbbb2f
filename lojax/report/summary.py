"""The table of what trains."""

from __future__ import annotations

import dataclasses

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.trees import check_pair
from lojax.report.table import table
from lojax.types import Params, Path, Shape


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path, shape, rank (None if it has no adapter), and how many numbers train and are there."""

    path: Path
    shape: Shape
    rank: int | None
    trainable: int
    total: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What trains, row by row. Printing it gives the table."""

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

    @property
    def line(self) -> str:
        """The closing line, as Hugging Face PEFT prints it."""
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"

    def text(self, *, frozen: bool = True) -> str:
        """The table and the closing line; with ``frozen=False`` only the rows of what trains."""
        rows = [
            (
                row.path,
                str(row.shape),
                "" if row.rank is None else str(row.rank),
                f"{row.trainable:,}",
                f"{row.total:,}",
            )
            for row in self.rows
            if frozen or row.trainable
        ]
        return table(("parameter", "shape", "rank", "trainable", "all"), rows) + "\n" + self.line


def summary(frozen: Params, lora: Params) -> Summary:
    """How many parameters train and how many there are, one row a parameter.

    Args:
        frozen: The frozen tree: arrays, or shapes (`jax.eval_shape`).
        lora: The trained tree, likewise.

    Returns:
        A `Summary`: its ``rows`` are data, and printing it gives the table.

    Raises:
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
        rank = trained.rank if is_adapter(trained) else None
        if rank is not None:
            rows.append(Row(path, tuple(weight.shape), rank, trained.parameters, trained.parameters + weight.size))
        elif trained is not None:
            rows.append(Row(path, tuple(trained.shape), None, trained.size, trained.size))
        elif weight is not None:
            rows.append(Row(path, tuple(weight.shape), None, 0, weight.size))
    return Summary(tuple(rows))
