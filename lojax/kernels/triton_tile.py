"""What the kernels for a GPU share: tiles that may run over the edge, read and written, and the order of programs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lojax.types import Array, Ref


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of one axis, as a tile covers it.

    Attributes:
        start: Where it starts, a multiple of the length.
        length: A power of two.
        end: The length of the axis.
    """

    start: Array | int
    length: int
    end: int

    def inside(self) -> Array | None:
        """``bool [length]``, which of its entries exist; None for all, known from the shapes alone."""
        # No mask where none is needed: a mask costs registers, and a test of each address.
        return None if self.end % self.length == 0 else self.start + lax.iota(jnp.int32, self.length) < self.end


def mask(rows: Span, columns: Span) -> Array | None:
    """``bool [rows, columns]``, which entries of a tile exist; None for all."""
    down, across, shape = rows.inside(), columns.inside(), (rows.length, columns.length)
    if down is None:
        return None if across is None else jnp.broadcast_to(across[None, :], shape)
    down = jnp.broadcast_to(down[:, None], shape)
    return down if across is None else down & across[None, :]


def load(ref: Ref, rows: Span, columns: Span) -> Array:
    """The tile ``[rows, columns]`` of ``ref``, zero over the edge."""
    exists = mask(rows, columns)
    tile = ref.at[pl.ds(rows.start, rows.length), pl.ds(columns.start, columns.length)]
    return plgpu.load(tile) if exists is None else plgpu.load(tile, mask=exists, other=0)


def store(ref: Ref, rows: Span, columns: Span, value: Array) -> None:
    """Writes ``value`` ``[rows, columns]``, cast, where ``ref`` has entries."""
    tile = ref.at[pl.ds(rows.start, rows.length), pl.ds(columns.start, columns.length)]
    plgpu.store(tile, value.astype(ref.dtype), mask=mask(rows, columns))


def grouped_tile(program: Array, rows: int, columns: int, group: int) -> tuple[Array, Array]:
    """Which tile, down and across, a program computes, of ``rows`` by ``columns`` tiles.

    ``group`` tiles down come one after the other before the next across. So the programs that run at one time read few
    tiles of both operands, most of them from the L2 cache (the order of the matrix product in Triton's tutorials).
    """
    # The last group is lower where the rows are no multiple of it.
    first = program // (group * columns) * group
    height = jnp.minimum(rows - first, group)
    place = program % (group * columns)
    return first + place % height, place // height


def contract(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two tiles, summed in float32 along one axis of each."""
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
