"""Names of matrices as a grid of layers and kinds: what heat maps have on their sides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LAYER_WORD = re.compile(r"(?i)(?:.*(?:layers?|blocks?|stages?)|h)_?(\d+)")
"""A part of a path that is a layer by its word: ``layer_3``, ``EncoderBlock_3``, ``h_3``."""
ORDER = (
    *("qkv", "q_proj", "query", "k_proj", "key", "v_proj", "value", "o_proj", "attn_out", "out_proj"),
    *("gate_proj", "up_proj", "fc1", "intermediate", "wi", "down_proj", "fc2", "output", "wo"),
)
"""Names in the order in which a block uses them, which a tree sorts by letter."""
LEAVES = {"kernel", "weight", "w", "embedding"}
"""What a leaf is called in every layer, and so says nothing."""


class Grid(NamedTuple):
    """Where matrices are among layers and kinds.

    Attributes:
        layers: The numbers of the layers, in order; one empty text where names have no such numbers.
        kinds: What the matrices are called in their layer, in the order of a block where they are known.
        cells: For each name, the place of its kind and of its layer.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]

    def fill(self, values: Sequence[float | None], *, total: bool = False) -> np.ndarray:
        """The values as ``[kinds, layers]``: where several share a cell their mean, or their sum; NaN for none."""
        sums, counts = (np.zeros((len(self.kinds), len(self.layers))) for _ in range(2))
        for cell, value in zip(self.cells, values, strict=True):
            if value is not None:
                sums[cell] += value
                counts[cell] += 1
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(counts > 0, sums if total else sums / counts, np.nan)


def layer_grid(names: Sequence[str]) -> Grid:
    """The grid of names such as ``encoder/layer_3/query/kernel``, ``model.layers.3.q_proj`` or ``blocks/query[3]``.

    A layer is a number that is a part of its own, or that ends a word for layers. Without one in the path, the first
    number of the place in a stack is the layer.

    >>> layer_grid(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up"])
    Grid(layers=('0', '1'), kinds=('q_proj', 'up'), cells=((0, 0), (0, 1), (1, 0)))
    """
    split = [_split(name) for name in names]
    layers = sorted({layer for layer, _ in split}, key=lambda layer: tuple(map(int, filter(None, layer.split(".")))))
    parts = sorted(dict.fromkeys(kind for _, kind in split), key=_place_in_block)
    shown = dict(zip(parts, _shorten(parts), strict=True))
    kinds = list(shown.values())
    cells = tuple((kinds.index(shown[kind]), layers.index(layer)) for layer, kind in split)
    return Grid(tuple(layers), tuple(kinds), cells)


def _split(name: str) -> tuple[str, tuple[str, ...]]:
    path, _, place = name.partition("[")
    numbers, kind = [], []
    for part in re.split(r"[/.]", path):
        layer = LAYER_WORD.fullmatch(part)
        if part.isdecimal() or layer:
            numbers.append(part if layer is None else layer[1])
        else:
            kind.append(part)
    while len(kind) > 1 and kind[-1] in LEAVES:
        kind.pop()
    if not numbers and place:
        numbers = [re.split(r"[,\]]", place)[0]]
    return ".".join(numbers), tuple(kind)


def _place_in_block(kind: tuple[str, ...]) -> int:
    """Where a matrix comes in its block; what is not known comes last, in the order of the tree."""
    known = [ORDER.index(part.lower()) for part in kind if part.lower() in ORDER]
    is_attention = any("att" in part.lower() for part in kind)
    if not known:
        return len(ORDER)
    # "output" is that of attention in the one block and that of the feed-forward layer in the other.
    return min(known[-1], ORDER.index("out_proj")) if is_attention else known[-1]


def _shorten(kinds: Sequence[tuple[str, ...]]) -> list[str]:
    """The last parts of each, as many as it takes to tell them apart."""
    for count in range(1, max(map(len, kinds), default=1)):
        if len({kind[-count:] for kind in kinds}) == len(kinds):
            return ["/".join(kind[-count:]) for kind in kinds]
    return ["/".join(kind) for kind in kinds]
