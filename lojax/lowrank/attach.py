"""The update of a weight that a program makes of codes, brought to where its axes are in the end (`code_layout`)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lojax.lowrank import carriers
from lojax.lowrank.code_layout import Layout, Piece
from lojax.lowrank.frozen import FrozenWeight
from lojax.lowrank.named_array import RANK, NamedArray
from lojax.lowrank.value import LowRank
from lojax.types import Array, Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ZeroWeight:
    """A frozen weight of zeros that is not there: a product with it is a product with the update alone."""

    aval: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """The shape of the value."""
        return self.aval.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        return self.aval.dtype

    def dense(self) -> Array:
        """The zeros."""
        return jnp.zeros(self.shape, self.dtype)

    def map(self, f: Callable[[Array], Array]) -> ZeroWeight:
        """Zeros in the shape of ``f(value)``."""
        return ZeroWeight(jax.eval_shape(f, self.aval))

    def entries(self) -> FrozenWeight:
        """The weight itself."""
        return self

    def product(self, f: Callable[..., Array], *operands: Array) -> Array:
        """Zeros in the shape of the product."""
        result = jax.eval_shape(f, self.aval, *operands)
        return jnp.zeros(result.shape, result.dtype)


def attach(value: LowRank, layout: Layout) -> LowRank | None:
    """The value with its update on the axes that it has now; None if the axes of a matrix are mixed in one of them.

    Args:
        value: Its frozen part is in ``layout``, and its update on the axes of the codes, in their unpacked lengths.
        layout: Where the axes of the codes are.
    """
    sizes = {d: x.size(d) for term in value.terms for x in term for d in x.dims if isinstance(d, int)}
    axes = [_merge(axis, n) for axis, n in zip(layout, value.shape, strict=True)]
    pieces = [piece for piece in axes if piece is not None]
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i][0], -pieces[i][2]))
    lengths: dict[int, int] = {}
    for axis, n, _ in pieces:
        lengths[axis] = lengths.get(axis, 1) * n
    is_mixed = any(piece is None and n != 1 for piece, n in zip(axes, value.shape, strict=True))
    if is_mixed or lengths != {d: n for d, n in sizes.items() if n != 1}:
        return None
    # From the axes of the codes to the pieces in their order, to the order of the value, to axes of length one.
    before = jax.ShapeDtypeStruct(tuple(sizes.get(d, 1) for d in range(max(sizes) + 1)), value.frozen.dtype)
    moved = carriers.reshape(value.with_frozen(ZeroWeight(before)), [pieces[i][1] for i in order])
    moved = carriers.transpose(moved, [order.index(i) for i in range(len(pieces))])
    return carriers.reshape(moved, value.shape).with_frozen(value.frozen)


def _merge(axis: tuple[Piece, ...], length: int) -> tuple[int, int, int] | None:
    """The one piece that an axis is; None if it is none, or made of several."""
    own = [(origin, n, stride) for origin, n, stride in axis if origin is not None]
    if len({origin for origin, _, _ in own}) != 1:
        return None
    # From slow to fast, each step must go over all of what follows.
    if any(stride != n * after for (_, _, stride), (_, n, after) in itertools.pairwise(own)):
        return None
    return own[0][0], length, own[-1][2]


def resize_probe(value: LowRank, sizes: dict[int, int]) -> tuple[LowRank, dict[int, int]]:
    """A probe with factors of other lengths along some axes, and these lengths by the axis of the parameter."""
    (factors,) = value.terms
    found: dict[int, int] = {}
    resized = []
    for axis, factor in enumerate(factors):
        own = [d for d in factor.dims if d != RANK]
        changed = {d: sizes[d] for d in own if d in sizes and sizes[d] != factor.size(d)}  # type: ignore[index]
        if changed and len(own) == 1:
            found[axis] = changed[own[0]]
            factor = NamedArray(jnp.ones([1 if d == RANK else changed[d] for d in factor.dims]), factor.dims)
        resized.append(factor)
    return value.with_terms((tuple(resized),)), found
