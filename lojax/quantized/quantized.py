"""A quantized weight: a pytree node in the place of an array."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lojax.quantized.formats import Format
from lojax.types import Array, Dtype, Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight that is stored in few bits, in the place of its array in a parameter tree.

    lojax takes it wherever it takes a weight. For other code, ``dense()`` is the array, and ``jnp.asarray`` gives it.

    Attributes:
        arrays: What is stored, by name: ``"codes"``, ``"scales"`` and others, by the kind.
        format: The kind, with its settings.
        shape: The shape of the weight.
        dtype: The dtype of the weight.
    """

    arrays: dict[str, Array]
    format: Format = dataclasses.field(metadata={"static": True})
    shape: Shape = dataclasses.field(metadata={"static": True})
    dtype: Dtype = dataclasses.field(metadata={"static": True})

    @property
    def kind(self) -> str:
        """The kind, as `lojax.quantize` takes it."""
        return self.format.kind

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of what is stored."""
        return sum(x.size * x.dtype.itemsize for x in self.arrays.values())

    def dense(self) -> Array:
        """The weight as an array, computed anew at each call."""
        return self.format.dequantize(
            self.arrays["codes"], self.format.decode_scales(self.arrays), self.shape, self.dtype
        )

    def __jax_array__(self) -> Array:
        return self.dense()

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(self.size, 1) if all(hasattr(x, "dtype") for x in self.arrays.values()) else 0
        return f"Quantized({self.shape}, {self.kind}, {jnp.dtype(self.dtype).name}, {bits:.3g} bits)"


def is_quantized(node: object) -> bool:
    """Whether ``node`` is a quantized weight."""
    return isinstance(node, Quantized)


def dense(leaf: Array | Quantized) -> Array:
    """``leaf`` as an array."""
    return leaf.dense() if isinstance(leaf, Quantized) else leaf


# At module level, so that weights of equal shapes are compiled once.
@functools.partial(jax.jit, static_argnums=1)
def quantize_weight(w: Array, format: Format) -> Quantized:
    """``w`` in a format."""
    return Quantized(format.quantize(w), format, tuple(w.shape), jnp.dtype(w.dtype))
