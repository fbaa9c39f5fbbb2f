"""A row of an `Analysis`: what is known of one matrix."""

from __future__ import annotations

import dataclasses

import numpy as np

from lojax.adapters.single_matrices import Index
from lojax.adapters.spectrum import effective_rank, stable_rank
from lojax.types import Path

ROUNDING = 1e-6
"""A change of a matrix below this share of it is float32 rounding, where the sum itself was computed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """What is known of one matrix, or of one parameter trained in full.

    ``dW`` is the update, ``W0`` the pretrained matrix, ``[m, n]`` with ``m`` the product of its in axes and ``n`` that
    of its out axes. What needs a base is None without one.

    Attributes:
        path: The path of the parameter.
        index: The place in its stack, a number for each stack axis; empty without a stack.
        ins: The lengths of the in axes; None for one that the adapter does not know (token rows without a base).
        outs: The lengths of the out axes. For a parameter trained in full, all of its axes.
        rank: The rank of the adapter here; None for a parameter trained in full.
        scale: The scale of the adapter here.
        parameters: How many numbers train.
        spectrum: The singular values of ``dW``, largest first, as many as its factors have columns. Under DoRA, with a
            base, all ``min(m, n)`` of them.
        ratio: ``||dW||_F / ||W0||_F``.
        top_ratio: The largest singular value of ``dW`` over that of ``W0``.
        amplification: ``||dW||_F / ||U^T W0 V||_F``, with ``U`` and ``V`` the singular vectors of ``dW`` (Hu et al.
            2021, section 7.3); None for an update of zero.
        cosines: For each of the top singular vectors of ``W0 + dW`` on the side of the outputs, the largest ``|cos|``
            with any of those of ``W0``.
        intruders: How many of these are below the threshold (Shuttleworth et al. 2024, arXiv:2410.21228).
        lost: The share of the entries that ``dW`` moves and a merge in bfloat16 leaves as they were.
        note: What the reader must know of these numbers, or "".
    """

    path: Path
    index: Index = ()
    ins: tuple[int | None, ...] = ()
    outs: tuple[int | None, ...] = ()
    rank: int | None = None
    scale: float | None = None
    parameters: int = 0
    spectrum: np.ndarray | None = None
    ratio: float | None = None
    top_ratio: float | None = None
    amplification: float | None = None
    cosines: np.ndarray | None = None
    intruders: int | None = None
    lost: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The path, with the place in the stack: ``blocks/query/kernel[3]``."""
        return self.path + (f"[{', '.join(map(str, self.index))}]" if self.index else "")

    @property
    def norm(self) -> float | None:
        """``||dW||_F``."""
        return None if self.spectrum is None else float(np.linalg.norm(self.spectrum))

    @property
    def stable_rank(self) -> float | None:
        """``||dW||_F^2`` over the square of its largest singular value: how many directions matter, at the least."""
        return None if self.spectrum is None else stable_rank(self.spectrum)

    @property
    def effective_rank(self) -> float | None:
        """``exp`` of the entropy of the normalized spectrum (Roy and Vetterli 2007)."""
        return None if self.spectrum is None else effective_rank(self.spectrum)

    @property
    def idle(self) -> bool:
        """Whether there is an adapter and it does nothing: ``b`` never moved from zero."""
        return self.norm is not None and (self.norm == 0 or (self.ratio is not None and self.ratio < ROUNDING))
