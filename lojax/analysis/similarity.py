"""`similarity`: which directions two adapters share (Hu et al. 2021, arXiv:2106.09685, section 7.2)."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.paths import check_same_structure
from lojax.adapters.single_matrices import Index, single_adapters
from lojax.adapters.spectrum import NEGLIGIBLE, thin_svd
from lojax.adapters.trees import refuse_bank
from lojax.report.table import table
from lojax.text import printable, suggest
from lojax.types import Params, Path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = ("a", "b", "in", "out")
"""Whose directions are compared: those of the factors, as in the paper, or of the updates, on either side."""


@dataclasses.dataclass(frozen=True, eq=False)
class Overlap:
    """How much two adapters of one matrix share.

    Attributes:
        path: The path of the weight.
        index: The place in its stack; empty without one.
        phi: ``[r1, r2]``: ``phi[i-1, j-1]`` is the share of the smaller of the spaces of the top ``i`` directions of
            the first adapter and of the top ``j`` of the second that lies in the other, from 0 to 1.
        cosine: ``<dW1, dW2> / (||dW1|| ||dW2||)``, from -1 to 1: 1 where the updates differ in strength alone; 0 where
            one of them is zero.
        width: The length of the directions. ``phi[i-1, j-1]`` of random ones is ``max(i, j) / width``.
    """

    path: Path
    index: Index
    phi: np.ndarray
    cosine: float
    width: int

    @property
    def name(self) -> str:
        """The path, with the place in the stack."""
        return self.path + (f"[{', '.join(map(str, self.index))}]" if self.index else "")

    @property
    def random(self) -> float:
        """What all directions of both would share if they were random."""
        return max(self.phi.shape, default=0) / self.width


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """What two adapters share, matrix by matrix. It shows as a table, printed or in a REPL.

    Attributes:
        rows: A row for each matrix that both adapt.
        of: Whose directions `Overlap.phi` compares.
        alone: The paths that one of them adapts alone.
    """

    rows: tuple[Overlap, ...]
    of: str
    alone: tuple[Path, ...] = ()

    @property
    def text(self) -> str:
        """The table: for each matrix the cosine, ``phi`` of the top direction and of all, and what chance gives."""
        cells = []
        for row in self.rows:
            values = (row.cosine, row.phi[0, 0], row.phi[-1, -1], row.random) if row.phi.size else (row.cosine,)
            ranks = " and ".join(map(str, row.phi.shape))
            cells.append((printable(row.name), ranks, *(f"{x:.3f}" for x in values), *[""] * (4 - len(values))))
        lines = [table(("weight", "ranks", "cosine", "phi(1, 1)", "phi(all)", "random"), cells)]
        if self.alone:
            shown = ", ".join(map(printable, self.alone[:3])) + ("..." if len(self.alone) > 3 else "")
            lines += ["", f"Adapted by one of them alone: {shown}."]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A picture for a report: ``phi(i, j)``, the mean over the matrices, and the cosines by layer and matrix.

        Args:
            path: The file to write, by its ending a PNG, PDF or SVG; None for none.

        Returns:
            The figure of matplotlib.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from lojax.analysis.pictures import plot_similarity

        return plot_similarity([(row.name, row.phi, row.cosine, row.width) for row in self.rows], self.of, path)


def similarity(lora1: Params, lora2: Params, *, of: str = "a") -> Similarity:
    """Are these two adapters the same thing? The directions that they share, for two seeds, ranks or tasks.

    ``phi(i, j) = ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j)``, with ``U1`` and ``U2`` the singular vectors, largest
    first (Hu et al. 2021, arXiv:2106.09685, eq. 4). Two random spaces have ``max(i, j) / width``, not 0.

    Args:
        lora1: A ``lora`` tree.
        lora2: Another one for the same net, of any rank.
        of: Whose singular vectors: those of the factor ``"a"``, as in the paper, or of ``"b"``; or of the update, on
            the side of its inputs (``"in"``) or outputs (``"out"``). Two adapters that started with the same ``a``
            still share much of it, which says little of what they learned.

    Returns:
        A `Similarity`; printing it gives the table, `Similarity.plot` the picture. Adapters that are zero have no
        directions, and their ``phi`` is empty. Of DoRA adapters and token rows the factors ``a`` and ``b`` are
        compared, without the rest.

    Raises:
        ValueError: The trees do not fit together, or no matrix is adapted by both.

    >>> import jax, jax.numpy as jnp, lojax
    >>> loras = [lojax.init(jax.random.key(i), {"w": jnp.ones((64, 3))}, "w", rank=2)[1] for i in range(2)]
    >>> print(similarity(loras[0], loras[0]))
    weight  ranks    cosine  phi(1, 1)  phi(all)  random
    ----------------------------------------------------
    w       2 and 2   0.000      1.000     1.000   0.031
    >>> float(similarity(*loras).rows[0].phi[-1, -1].round(1))
    0.0
    """
    for tree, name in ((lora1, "lora1"), (lora2, "lora2")):
        refuse_bank(tree, name)
    if of not in SIDES:
        raise ValueError(f"of={of!r}; expected one of {', '.join(map(repr, SIDES))}.{suggest(of, SIDES)}")
    first, second = check_same_structure(lora1, lora2, name="lora1", other="lora2")
    adapted = [
        {path for path, leaf in tree.items() if is_adapter(leaf) and leaf.a is not None} for tree in (first, second)
    ]
    rows: list[Overlap] = []
    for path in first:
        if path in adapted[0] & adapted[1]:
            _check_same_weight(path, first[path], second[path])
            pairs = zip(single_adapters(path, first[path]), single_adapters(path, second[path]), strict=True)
            rows += [_overlap(path, index, one, two, of) for (index, one), (_, two) in pairs]
    if not rows:
        raise ValueError("No matrix is adapted by both, so there is nothing to compare.")
    return Similarity(tuple(rows), of, tuple(sorted(adapted[0] ^ adapted[1])))


def _overlap(path: Path, index: Index, one: Adapter, two: Adapter, of: str) -> Overlap:
    spaces = [_directions(adapter, of) for adapter in (one, two)]
    (a1, b1), (a2, b2) = ((x.a.astype(np.float64), x.b) for x in (one, two))
    norms = [float(np.linalg.norm(thin_svd(a, b)[1])) for a, b in ((a1, b1), (a2, b2))]
    # <a1 b1, a2 b2> = <a1^T a2, b1 b2^T>: no update is formed.
    inner = float(np.sum((a1.T @ a2) * (b1 @ b2.T)))
    cosine = inner / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
    return Overlap(path, index, subspace_similarity(*spaces), cosine, spaces[0].shape[0])


def subspace_similarity(u1: np.ndarray, u2: np.ndarray) -> np.ndarray:
    """``phi`` ``[r1, r2]`` of orthonormal directions ``[width, r1]`` and ``[width, r2]``, the strongest first.

    >>> subspace_similarity(np.eye(3)[:, :2], np.eye(3)[:, 1:]).tolist()
    [[0.0, 0.0], [1.0, 0.5]]
    """
    squares = np.cumsum(np.cumsum(np.square(u1.T @ u2), 0), 1)
    counts = np.minimum(np.arange(1, squares.shape[0] + 1)[:, None], np.arange(1, squares.shape[1] + 1))
    return squares / counts


def _directions(adapter: Adapter, of: str) -> np.ndarray:
    """The singular vectors ``[width, p]`` of what is compared, without those of zeros."""
    if of in ("a", "b"):
        factor = adapter.a.astype(np.float64) if of == "a" else adapter.b.T
        u, s, _ = thin_svd(factor, np.eye(factor.shape[1]))
    else:
        u, s, vt = thin_svd(adapter.a, adapter.b)
        u = u if of == "in" else vt.T
    return u[:, ~(s <= NEGLIGIBLE * s.max(initial=0))]  # NaN stays


def _check_same_weight(path: Path, one: Adapter, two: Adapter) -> None:
    if (one.axes, one.weight_shape) != (two.axes, two.weight_shape):
        raise ValueError(
            f"{path}: the adapters are of different weights: {one.weight_shape} with axes {one.axes} and "
            f"{two.weight_shape} with axes {two.axes}."
        )
