"""The table of what trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.bank import Bank
from lojax.adapters.bank_shapes import check_bank_pair, entry_adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.trees import check_pair
from lojax.report.table import html_table, rank_text, table
from lojax.types import Params, Path, Shape

_HEADER = ("parameter", "shape", "rank", "trainable", "all")
_SHOWN = 8
"""How many adapters of a bank the text names."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path, shape, rank (None if it has no adapter), and how many numbers train and are there.

    ``requested_rank`` is the rank that was asked for, where it was above min(m, n): the table says ``8 → 3``. For a
    bank, ``ranks`` are those of its adapters that adapt this weight, and ``rank`` is the largest.
    """

    path: Path
    shape: Shape
    rank: int | None
    trainable: int
    total: int
    requested_rank: int | None = None
    ranks: tuple[int, ...] = ()

    @property
    def rank_text(self) -> str:
        """The rank as the table shows it, ``2-8`` where those of a bank differ."""
        if len(set(self.ranks)) > 1:
            return f"{min(self.ranks)}-{max(self.ranks)}"
        return "" if self.rank is None else rank_text(self.rank, self.requested_rank)


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """One adapter of a bank: its name or number, its ranks, and how many of its numbers train."""

    name: str
    ranks: tuple[int, ...]
    trainable: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What trains, row by row. It shows as a table, printed, in a REPL and in a notebook.

    ``adapters`` are those of a bank. The rows then count over all of them, each with its own rank and no padding.
    """

    rows: tuple[Row, ...]
    adapters: tuple[AdapterRow, ...] = ()

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
        return html_table(_HEADER, self._cells(), self._lines())

    @property
    def line(self) -> str:
        """The closing line, as Hugging Face PEFT prints it."""
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"

    def text(self, *, frozen: bool = True) -> str:
        """The table and the closing line; with ``frozen=False`` only the rows of what trains."""
        return "\n".join([table(_HEADER, self._cells(frozen=frozen)), *self._lines()])

    def _lines(self) -> list[str]:
        if not self.adapters:
            return [self.line]
        shown = [f"{row.name} (rank {_ranks_text(row.ranks)})" for row in self.adapters[:_SHOWN]]
        more = [f"and {len(self.adapters) - _SHOWN} more"] * (len(self.adapters) > _SHOWN)
        return [f"{len(self.adapters)} adapters: {', '.join([*shown, *more])}", self.line]

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


def summary(frozen: Params, lora: Params | Bank) -> Summary:
    """How many parameters train and how many there are, one row a parameter.

    Args:
        frozen: The frozen tree: arrays, or shapes (`jax.eval_shape`).
        lora: The trained tree, likewise, or a bank: then what trains is counted over all of its adapters.

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
    if isinstance(lora, Bank):
        return _summarize_bank(frozen, lora)
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


def _summarize_bank(frozen: Params, bank: Bank) -> Summary:
    """The `summary` of a bank."""
    weights, trained = check_bank_pair(frozen, bank)
    sizes, ranks = [0] * len(bank), [set[int]() for _ in range(len(bank))]
    rows = []
    for path in weights:
        weight, leaf = unbox(weights[path]), unbox(trained[path])
        base = 0 if weight is None else np.size(weight)
        if leaf is None:
            rows += [Row(path, np.shape(weight), None, 0, base)] if weight is not None else []
            continue
        if not is_adapter(leaf):
            own = np.size(leaf) // len(bank)
            sizes = [size + own for size in sizes]
            rows.append(Row(path, np.shape(leaf)[1:], None, own * len(bank), own * len(bank) + base))
            continue
        assert weight is not None, "check_bank_pair has seen to it"
        found = [None if entry is None else entry_adapter(leaf, entry) for entry in leaf.entries or ()]
        for i, adapter in enumerate(found):
            sizes[i] += 0 if adapter is None else adapter.parameters
            ranks[i] |= {adapter.rank} - {0} if adapter is not None else set()
        rows.append(_bank_row(path, np.shape(weight), [adapter for adapter in found if adapter is not None], base))
    names = bank.names or tuple(map(str, range(len(bank))))
    adapters = zip(names, (tuple(sorted(of)) for of in ranks), sizes, strict=True)
    return Summary(tuple(rows), tuple(AdapterRow(*row) for row in adapters))


def _bank_row(path: Path, shape: Shape, adapters: Sequence[Adapter], base: int) -> Row:
    ranks = tuple(adapter.rank for adapter in adapters)
    requested = {adapter.requested_rank for adapter in adapters}
    trainable = sum(adapter.parameters for adapter in adapters)
    requested_rank = requested.pop() if len(requested) == 1 else None
    return Row(path, shape, max(ranks), trainable, trainable + base, requested_rank, ranks)


def _ranks_text(ranks: Sequence[int]) -> str:
    return "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
