"""The kinds of quantization: how the arrays of a quantized weight are computed, and undone.

A format is static: it holds settings and no arrays, and two of equal settings are equal. What it stores has the leading
axes of the weight wherever blocks do not run across them, so that a scan, a look-up of rows or a sharding over these
axes takes the stored arrays apart as it takes the weight apart.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lojax.quantized.code_books import NF4, dynamic_map
from lojax.types import Array, Dtype, Shape

Arrays = dict[str, Array]
"""What a format stores, by name."""


class Format(Protocol):
    """A kind of quantization with its settings."""

    @property
    def kind(self) -> str:
        """Its name, as `lojax.quantize` takes it."""
        ...

    def quantize(self, w: Array) -> Arrays:
        """What is stored for ``w``, in float32 or narrower."""
        ...

    def decode_scales(self, arrays: Arrays) -> Array:
        """The scales in float32, of all that is stored but the codes."""
        ...

    def dequantize(self, codes: Array, scales: Array, shape: Shape, dtype: Dtype) -> Array:
        """The weight, computed in float32 and cast once."""
        ...

    def leading(self, shape: Shape) -> int:
        """How many leading axes of the weight its codes and its scales have."""
        ...

    def leading_of_scales(self, shape: Shape) -> int:
        """How many leading axes of the weight all have that the scales are decoded from."""
        ...


def leading_axes(shape: Shape, block: int) -> int:
    """The most leading axes whose entries are whole blocks of a weight that is flattened row by row.

    >>> leading_axes((8, 512, 512), 64), leading_axes((8, 48, 4), 64), leading_axes((5, 7), 64)
    (2, 1, 0)
    """
    return max((k for k in range(len(shape)) if math.prod(shape[k:]) % block == 0), default=0)


def _blocks(w: Array, block: int) -> Array:
    """``[blocks, block]``: the entries of ``w`` row by row in float32, the last block padded with zeros."""
    flat = w.reshape(-1).astype(jnp.float32)
    return jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)


def _nearest(x: Array, book: np.ndarray) -> Array:
    """The number of the value of ``book`` nearest to each entry of ``x``, uint8; of two as near, the first."""
    # One value after the other: all distances at once would take as many times the memory as the book has values.
    best, index = jnp.abs(x - book[0]), jnp.zeros(x.shape, jnp.uint8)
    for i, value in enumerate(book[1:], start=1):
        distance = jnp.abs(x - value)
        index = jnp.where(distance < best, jnp.uint8(i), index)
        best = jnp.minimum(distance, best)
    return index


def _nearest_of_many(x: Array, book: np.ndarray) -> Array:
    """`_nearest` in a long ``book`` in ascending order, by bisection."""
    # `_nearest` in the 256 values of a dynamic map is a thousand operations, which take XLA:CPU two seconds to compile.
    sharding = _explicit_sharding(x)
    take = lambda index: jnp.asarray(book).at[index].get(mode="promise_in_bounds", out_sharding=sharding)
    below = jnp.zeros_like(x, jnp.int32)
    for step in (1 << bit for bit in reversed(range((len(book) - 1).bit_length()))):
        above = jnp.minimum(below + step, len(book) - 1)
        below = jnp.where(take(above) <= x, above, below)
    above = jnp.minimum(below + 1, len(book) - 1)
    return jnp.where(jnp.abs(x - take(above)) < jnp.abs(x - take(below)), above, below).astype(jnp.uint8)


def pack(codes: Array) -> Array:
    """Two codes of four bits in each byte, the first in the high half, as bitsandbytes packs them."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] << 4 | pairs[..., 1]


def unpack(packed: Array) -> Array:
    """The codes of `pack`."""
    return jnp.stack([packed >> 4, packed & 15], -1).reshape(*packed.shape[:-1], -1)


def decode_nf4(codes: Array) -> Array:
    """The values of NF4 codes, float32."""
    # A TPU has no fast gather. A CPU has: 8 scanned layers of 512 x 512 take 0.036 s by a gather, 0.044 s by selects.
    return lax.platform_dependent(codes, tpu=_decode_by_selects, default=_decode_by_gather)


def _decode_by_gather(codes: Array) -> Array:
    # On a mesh of explicit axes a gather must be told where its result is.
    return jnp.asarray(NF4).at[codes].get(mode="promise_in_bounds", out_sharding=_explicit_sharding(codes))


def _explicit_sharding(x: Array) -> NamedSharding | None:
    """The sharding that the type of ``x`` says, on a mesh of explicit axes; None on another."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    is_explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None


def _replicated(x: Array) -> Array:
    """``x`` in full on every device, where its type says how it is sharded. Its axes may then be merged."""
    sharding = _explicit_sharding(x)
    return x if sharding is None else jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _decode_by_selects(codes: Array) -> Array:
    # A chain, of which XLA makes one loop. Of a tree of selects on the bits, XLA:CPU stores every level.
    values = jnp.full(codes.shape, NF4[0])
    for i in range(1, len(NF4)):
        values = jnp.where(codes >= i, NF4[i], values)
    return values


def _with_whole_blocks(x: Array, blocks: int) -> Array:
    """``x``, on a mesh of explicit axes replicated along its last axis unless each shard holds whole blocks."""
    sharding = _explicit_sharding(x)
    if sharding is None:
        return x
    if blocks % (x.shape[-1] // sharding.shard_shape(x.shape)[-1]) == 0:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1], None)))


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """Four bits for each entry and a float32 scale, the largest absolute value, for each block of a flattened weight.

    Attributes:
        kind: ``"nf4"`` or ``"int4"``.
        block: The entries of a block.
        double: Whether the scales are quantized as well, to 8 bits in blocks of 256 (QLoRA, arXiv:2305.14314, §3).
    """

    kind: str
    block: int = 64
    double: bool = True

    scales_per_block = 256

    def leading(self, shape: Shape) -> int:
        """How many leading axes of the weight its codes and its scales have."""
        return leading_axes(shape, self.block)

    def leading_of_scales(self, shape: Shape) -> int:
        """How many leading axes of the weight all have that the scales are decoded from."""
        return leading_axes(shape, self.block * self.scales_per_block) if self.double else self.leading(shape)

    def quantize(self, w: Array) -> Arrays:
        """What is stored: ``codes`` uint8, two to a byte, and the scales."""
        shape = tuple(w.shape)
        blocks = _blocks(w, self.block)
        absmax = jnp.max(jnp.abs(blocks), axis=1)
        # A block of zeros has the scale zero, and any codes.
        scaled = blocks * jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1), 0)[:, None]
        codes = _nearest(scaled, NF4) if self.kind == "nf4" else (jnp.round(scaled * 7) + 8).astype(jnp.uint8)
        codes = pack(codes.reshape(-1)[: math.prod(shape) + math.prod(shape) % 2])
        arrays = {"codes": _with_leading(codes, shape, self.leading(shape))}
        if not self.double:
            return arrays | {"scales": _with_leading(absmax, shape, self.leading(shape))}
        offset = jnp.mean(absmax)
        groups = _blocks(absmax - offset, self.scales_per_block)
        group_max = jnp.max(jnp.abs(groups), axis=1)
        scaled = groups * jnp.where(group_max > 0, 1 / jnp.where(group_max > 0, group_max, 1), 0)[:, None]
        scale_codes = _nearest_of_many(scaled, dynamic_map()).reshape(-1)[: absmax.size]
        return arrays | {
            "scales": _with_leading(scale_codes, shape, self.leading(shape)),
            "group_scales": _with_leading(group_max, shape, self.leading_of_scales(shape)),
            # Of all entries, as in bitsandbytes; once for each, so that a scan over them takes it apart as well.
            "offset": jnp.full(shape[: self.leading_of_scales(shape)], offset),
        }

    def decode_scales(self, arrays: Arrays) -> Array:
        """The scale of each block, float32, in the shape of the stored one."""
        scales = arrays["scales"]
        if not self.double:
            return scales
        # The scales are small, and their blocks run across the axes of the weight.
        scales, groups, offset = (_replicated(arrays[name]) for name in ("scales", "group_scales", "offset"))
        values = jnp.asarray(dynamic_map()).at[scales.astype(jnp.int32)].get(out_sharding=_explicit_sharding(scales))
        values = values.reshape(*offset.shape, -1)
        count = values.shape[-1]
        padding = [(0, 0)] * offset.ndim + [(0, -count % self.scales_per_block)]
        values = jnp.pad(values, padding).reshape(*groups.shape, self.scales_per_block) * groups[..., None]
        return (values.reshape(*offset.shape, -1)[..., :count] + offset[..., None]).reshape(scales.shape)

    def dequantize(self, codes: Array, scales: Array, shape: Shape, dtype: Dtype) -> Array:
        """The weight, computed in float32 and cast once."""
        codes, size = unpack(codes), math.prod(shape)
        values = decode_nf4(codes) if self.kind == "nf4" else (codes.astype(jnp.float32) - 8) / 7
        if size % self.block:  # the last block is not whole
            flat = jnp.repeat(scales.reshape(-1), self.block)[:size]
            return (values.reshape(-1)[:size] * flat).astype(dtype).reshape(shape)
        # Not flattened: the blocks split the last axis, and the others keep the sharding that they may have.
        sharding, values = _explicit_sharding(values), _with_whole_blocks(values, scales.shape[-1])
        blocks = values.reshape(*scales.shape, self.block)
        w = (blocks * scales[..., None]).astype(dtype).reshape(shape)
        return w if sharding is None or len(sharding.spec) != len(shape) else jax.sharding.reshard(w, sharding)


def _with_leading(flat: Array, shape: Shape, count: int) -> Array:
    """``flat``, stored row by row, with the first ``count`` axes of the weight."""
    return flat.reshape(*shape[:count], -1) if count else flat


@dataclasses.dataclass(frozen=True)
class ChannelFormat:
    """Eight bits for each entry, and a float32 scale for each output channel.

    The channels are the last axis; axes before the last two count as a stack, so a scale is the largest absolute
    value along the second axis from the end.

    Attributes:
        kind: ``"int8"`` or ``"float8_e4m3fn"``.
    """

    kind: str

    @property
    def _largest(self) -> float:
        return 127.0 if self.kind == "int8" else float(jnp.finfo(jnp.float8_e4m3fn).max)

    def leading(self, shape: Shape) -> int:
        """How many leading axes of the weight its codes and its scales have."""
        return max(len(shape) - 2, 0)

    leading_of_scales = leading

    def quantize(self, w: Array) -> Arrays:
        """What is stored: ``codes``, of the shape of the weight, and ``scales``, of length one where they repeat."""
        wide = w.astype(jnp.float32)
        absmax = jnp.max(jnp.abs(wide), axis=-2 if w.ndim > 1 else -1, keepdims=True)
        scales = absmax / self._largest
        scaled = wide / jnp.where(scales > 0, scales, 1)
        codes = jnp.round(scaled).astype(jnp.int8) if self.kind == "int8" else scaled.astype(jnp.float8_e4m3fn)
        return {"codes": codes, "scales": scales}

    def decode_scales(self, arrays: Arrays) -> Array:
        """The scales, as they are stored."""
        return arrays["scales"]

    def dequantize(self, codes: Array, scales: Array, shape: Shape, dtype: Dtype) -> Array:
        """The weight, computed in float32 and cast once."""
        return (codes.astype(jnp.float32) * scales).astype(dtype)


KINDS = ("nf4", "int4", "int8", "float8_e4m3fn")
"""The kinds that `lojax.quantize` knows."""


def make_format(kind: str, *, block: int = 64, double: bool = True) -> Format:
    """The format of a kind; ``block`` and ``double`` are for the kinds with blocks."""
    return BlockFormat(kind, block, double) if kind in ("nf4", "int4") else ChannelFormat(kind)
