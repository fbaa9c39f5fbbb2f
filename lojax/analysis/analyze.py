"""`analyze`: what an adapter does to its base, matrix by matrix."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.algebra import moved_paths
from lojax.adapters.axes import Role, positions
from lojax.adapters.intruders import THRESHOLD, TOP
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import check_same_structure, flatten
from lojax.adapters.rule import is_finite, is_integer
from lojax.adapters.single_matrices import Index, single_adapters, single_weight, update_factors
from lojax.adapters.spectrum import thin_svd
from lojax.adapters.trees import check_pair, refuse_bank
from lojax.analysis.measures import Decomposition, Measures, measure
from lojax.analysis.rows import Row
from lojax.analysis.text import analysis_text
from lojax.lowrank.frozen import DenseWeight
from lojax.lowrank.value import from_adapter
from lojax.quantized.quantized import dense
from lojax.types import Leaf, Params, Path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What an adapter does, matrix by matrix. It shows as a table, printed or in a REPL.

    Attributes:
        rows: A row for each matrix, layer by layer in a stack, and for each parameter trained in full.
        top: How many directions were searched for intruders.
        threshold: The cosine below which one is an intruder.
    """

    rows: tuple[Row, ...]
    top: int = TOP
    threshold: float = THRESHOLD

    @property
    def matrices(self) -> tuple[Row, ...]:
        """The rows with an adapter."""
        return tuple(row for row in self.rows if row.spectrum is not None)

    @property
    def text(self) -> str:
        """The table, and what stands out in it."""
        return analysis_text(self.rows, self.top, self.threshold)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A picture for a report: the updates by layer and matrix, their spectra, and the intruders.

        Args:
            path: The file to write, by its ending a PNG, PDF or SVG; None for none.

        Returns:
            The figure of matplotlib.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: There is no adapter to draw.
        """
        from lojax.analysis.pictures import plot_analysis

        return plot_analysis(self.rows, path, top=self.top)


def analyze(
    frozen: Params | None,
    lora: Params,
    *,
    start: Params | None = None,
    top: int = TOP,
    threshold: float = THRESHOLD,
) -> Analysis:
    """Did it learn, where, is the rank too large, and will merging harm? A row for each matrix.

    Matrix by matrix on the host, in float64. The spectrum comes from the factors alone; with a base, the search for
    intruders takes most of the time: two decompositions of the whole matrix.

    Args:
        frozen: The frozen tree, its weights quantized or not; None to leave out what needs it.
        lora: The trained tree, of any variant; of a bank one adapter, ``bank[0]``.
        start: The `lora` tree as init returned it, for adapters whose start was taken out of the weight (PiSSA, OLoRA,
            MiLoRA, LoftQ, LoRA-GA): the update is then the difference from it. Without it, their rows have no more
            than the spectrum of the whole product, and say so.
        top: How many of the largest directions of each sum are searched for intruders; 0 leaves the search out.
        threshold: The cosine below which a direction is an intruder.

    Returns:
        An `Analysis`; printing it gives the table, `Analysis.plot` the picture.

    Raises:
        ValueError: The trees do not fit together, lora is a bank, or it is called under `jit`.

    >>> import jax, lojax
    >>> frozen = {"w": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
    >>> a, b = jnp.eye(4)[:, 3:], 8 * jnp.eye(4)[3:]
    >>> print(analyze(frozen, {"w": lojax.Adapter(a, b, scale=1.0, axes=("in", "out"))}))
    weight  in -> out  rank  norm  ratio  top ratio  stable rank  effective rank  amplification  intruders  lost
    ------------------------------------------------------------------------------------------------------------
    w       4 -> 4        1     8  1.461          2         1.00            1.00              8          0  0.0%
    <BLANKLINE>
    1 matrix; ||dW|| / ||W0|| 1.461.
    """
    if not is_integer(top) or top < 0:
        raise ValueError(f"top={top!r}; expected an integer of at least 0.")
    if not is_finite(threshold) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r}; expected a cosine, between 0 and 1.")
    refuse_bank(lora)
    if frozen is None:
        trained, weights = flatten(lora), {}
    else:
        weights, trained = check_pair(frozen, lora)
    starts: Mapping[Path, Leaf] = {}
    if start is not None:
        moved = moved_paths(lora)
        if not moved:
            raise ValueError("start= is for adapters whose start was taken out of their weight, and lora holds none.")
        starts = check_same_structure(start, lora, name="start")[0]
    leaves = ((path, leaf, weights.get(path)) for path, leaf in trained.items() if leaf is not None)
    return analyze_leaves(leaves, starts=starts, top=top, threshold=threshold)


def analyze_leaves(
    leaves: Iterable[tuple[Path, Leaf, Leaf]],
    *,
    starts: Mapping[Path, Leaf] | None = None,
    top: int = TOP,
    threshold: float = THRESHOLD,
) -> Analysis:
    """The analysis of trained leaves, each with its weight, or None where there is no base.

    Args:
        leaves: ``(path, trained leaf, weight)``, taken one after another.
        starts: The adapters as init returned them, by path.
        top: As in `analyze`.
        threshold: As in `analyze`.
    """
    rows: list[Row] = []
    for path, leaf, weight in leaves:
        if not is_adapter(leaf):
            shape = np.shape(unbox(leaf))
            rows.append(Row(path, outs=shape, parameters=math.prod(shape), note="trained in full"))
            continue
        begin = (starts or {}).get(path) if leaf.moved_base else None
        for index, rest in _updates(path, leaf, unbox(weight), begin):
            rows.append(_row(path, leaf, index, rest, top=top, threshold=threshold))
    return Analysis(tuple(rows), top, threshold)


@dataclasses.dataclass(frozen=True)
class _Update:
    """One matrix: its pretrained values ``[m, n]`` if they are known, and its update, decomposed."""

    single: Adapter
    weight: np.ndarray | None
    update: Decomposition
    directions: int
    note: str


def _updates(path: Path, adapter: Adapter, weight: Leaf, begin: Adapter | None) -> Iterator[tuple[Index, _Update]]:
    """The matrices of a weight, one after another."""
    note = ""
    if adapter.moved_base and begin is None:
        note = f"with its start ({adapter.moved_base}) in it; pass start= for what was learned"
    elif weight is not None and not jnp.issubdtype(weight.dtype, jnp.floating):
        note = "its base are codes that the net dequantizes, which cannot be read here"
    values = dense(weight) if weight is not None and not note else None  # a quantized weight, whole: one at a time
    starts = iter(()) if begin is None else single_adapters(path, begin)
    for index, single in single_adapters(path, adapter):
        before = next(starts, (index, None))[1]
        w = None if values is None else single_weight(path, values, adapter.axes, index)
        yield index, _one_update(path, single, w, before, note)


def _one_update(path: Path, single: Adapter, w: np.ndarray | None, before: Adapter | None, note: str) -> _Update:
    """The update of a single matrix, whose frozen values are ``w``."""
    factors = update_factors(single, None if w is None else w.shape[0])
    frozen = w
    if before is not None and w is not None:
        w = w + before.a @ before.b  # what the net started with
    if factors is None and frozen is None:
        plain = dataclasses.replace(single, **dict.fromkeys(single.arrays.keys() - {"a", "b", "rows"}))
        factors = update_factors(plain, None)
        note = note or f"of a and b alone: what its {single.variant} part does needs the base"
    if factors is None:
        assert frozen is not None and w is not None
        merged = from_adapter(path, DenseWeight(jnp.asarray(frozen, jnp.float32)), _to_device(single)).dense()
        u, s, vt = np.linalg.svd(np.asarray(merged, np.float64) - w, full_matrices=False)
        return _Update(single, w, (u, s, vt), single.rank, note)
    a, b = factors
    if before is not None:
        a, b = np.concatenate([a, -before.a], 1), np.concatenate([b, before.b], 0)
    return _Update(single, w, thin_svd(a, b), a.shape[1], note)


def _to_device(single: Adapter) -> Adapter:
    return dataclasses.replace(single, **{name: jnp.asarray(x, jnp.float32) for name, x in single.arrays.items()})


def _row(path: Path, adapter: Adapter, index: Index, one: _Update, *, top: int, threshold: float) -> Row:
    stack = [n for n, role in zip(adapter.weight_shape, adapter.axes, strict=True) if role == "stack"]
    entry = int(np.ravel_multi_index(index, stack)) if index else 0  # type: ignore[arg-type]
    arrays = {name: x for name, x in one.single.arrays.items() if name in adapter.trained_arrays}
    row = Row(
        path=path,
        index=index,
        ins=_lengths(adapter, "in"),
        outs=_lengths(adapter, "out"),
        rank=one.single.rank,
        scale=adapter.scale[entry] if isinstance(adapter.scale, tuple) else adapter.scale,
        parameters=sum(x.size for x in arrays.values()),
        spectrum=one.update[1],
        note=one.note,
    )
    if one.weight is None:
        return row
    if row.ins == (None,):
        row = dataclasses.replace(row, ins=one.weight.shape[:1])
    return _with_base(row, measure(one.weight, one.update, one.directions, top=top), threshold)


def _with_base(row: Row, measures: Measures, threshold: float) -> Row:
    cosines = measures.cosines
    # A direction of the pretrained matrix alone is none that an update brought.
    count = None if cosines is None else int((cosines < threshold).sum())
    return dataclasses.replace(row, **measures._asdict(), intruders=count)


def _lengths(adapter: Adapter, role: Role) -> tuple[int | None, ...]:
    return tuple(adapter.weight_shape[axis] for axis in positions(adapter.axes, role))
