"""A weight and its update as separate arrays: the value that stands for an adapted weight in a program.

`LowRank` stands for ``w + sum_r a[..., r] b[r, ...]``. The letters here: S stack axes, m in axes, n out axes, r rank,
T tokens of an activation; each but r may be several axes, and S none. As `from_adapter` makes it, the value is

    w [*S, *m, *n]      a [*S, *m, r]      b [*S, r, *n]      gain [*S, *n] (DoRA)

Each axis of the value is an axis of ``a``, of ``b``, or of both (a stack); along an axis of neither the update
repeats. `carriers` and `combine` make other values of it without materializing the update; `dot`, `lookup`,
`convolution` and `experts` multiply them with an activation, ``[T, m] -> [T, n]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import Axes, positions
from lojax.adapters.matrices import at_least_float32, column_squares
from lojax.adapters.metadata import unbox
from lojax.lowrank.code_layout import Pending
from lojax.lowrank.frozen import FrozenWeight
from lojax.lowrank.named_array import RANK, Name, NamedArray, cast, multiply
from lojax.lowrank.second_moment import SecondMomentProbe
from lojax.types import Array, Dtype, Key, Path, Shape

PATH_SEPARATOR = " | "
"""Joins the paths of weights that a program combined into one."""

Term = tuple[NamedArray, ...]
"""One update: its two factors ``a`` and ``b``, each with an axis `RANK`. A probe has a factor for each axis instead."""


class NotFactored(Exception):
    """An operation has no factored form. The message is the reason, for the report."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout on the input of an update."""

    key: Key
    rate: float = dataclasses.field(metadata={"static": True})

    def fold_in(self, data: int | Array) -> Dropout:
        """The same rate with another key."""
        return Dropout(jax.random.fold_in(self.key, data), self.rate)

    def split(self, count: int) -> Dropout:
        """``count`` keys, stacked."""
        return Dropout(jax.random.split(self.key, count), self.rate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A frozen weight plus a low-rank update.

    A variant of LoRA adds `dropout` on the input of the update, `tap` or `mix` between its factors, or `gain` on the
    sum.
    `factored.add_updates` applies all of them, for every kind of product.

    Attributes:
        frozen: The frozen part ``w``, of the value's shape and dtype.
        terms: The updates. There is one, except for the sum of two that a program makes, a tangent, or token rows.
        path: The path of the weight, for reports and errors.
        dropout: The dropout on the input of the update, or None.
        gain: What multiplies the sum of frozen part and update, along some axes of the value (DoRA); None for 1.
        gain_on_update: Whether the gain multiplies the update as well. Not in a weighted sum of DoRA adapters, whose
            factors hold their own gains (see `bank_value`).
        mix: ``[r]``, what multiplies the entries of ``x a`` of the first term: the weights of the adapters that lie
            side by side there (see `bank_value`); None for 1. `absorb_mix` multiplies it into the factor instead.
        active: ``bool [T]``, the tokens on which the update acts, along the axis of an activation that has as many
            entries; None for all. Such a value has no dense form.
        probe: Whether the value only shows how the weight is used (see `lojax.rewrite.axis_inference`).
        fusible: Whether a product may be fused. Not where ``a`` is frozen: the fused product saves the activation for
            the backward pass, and the factored one then does not.
        tap: Whether the gradient of the first factor is to be the second moment of its input.
        pending: How far the program is with computing the frozen part of codes; the update is added to the result.
    """

    frozen: FrozenWeight
    terms: tuple[Term, ...]
    path: Path = dataclasses.field(metadata={"static": True})
    dropout: Dropout | None = None
    gain: NamedArray | None = None
    gain_on_update: bool = dataclasses.field(default=True, metadata={"static": True})
    mix: NamedArray | None = None
    active: Array | None = None
    probe: bool = dataclasses.field(default=False, metadata={"static": True})
    fusible: bool = dataclasses.field(default=True, metadata={"static": True})
    tap: bool = dataclasses.field(default=False, metadata={"static": True})
    pending: Pending | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """The shape of the value."""
        return self.frozen.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the value."""
        return len(self.frozen.shape)

    @property
    def size(self) -> int:
        """The number of entries of the value."""
        return math.prod(self.frozen.shape)

    @property
    def rank(self) -> int:
        """The rank of the update, that of all terms together."""
        return sum(term[0].size(RANK) for term in self.terms)

    @property
    def named_arrays(self) -> list[NamedArray]:
        """Every array besides the frozen part: the factors of all terms, and the gain and the mix where there are."""
        return [x for term in self.terms for x in term] + [x for x in (self.gain, self.mix) if x is not None]

    def with_named_arrays(self, arrays: Sequence[NamedArray]) -> LowRank:
        """The same value with other `named_arrays`, in the same order."""
        following = iter(arrays)
        terms = tuple(tuple(next(following) for _ in term) for term in self.terms)
        gain = None if self.gain is None else next(following)
        return dataclasses.replace(self, terms=terms, gain=gain, mix=None if self.mix is None else next(following))

    def absorb_mix(self) -> LowRank:
        """The same value without a `mix`: its first factor is multiplied instead."""
        if self.mix is None:
            return self
        (first, *rest), *others = self.terms
        first = NamedArray(first.array * self.mix.broadcastable(first.dims).astype(first.array.dtype), first.dims)
        return dataclasses.replace(self, terms=((first, *rest), *others), mix=None)

    def with_terms(self, terms: tuple[Term, ...]) -> LowRank:
        """The same frozen part with other updates."""
        return dataclasses.replace(self, terms=terms)

    def with_frozen(self, frozen: FrozenWeight) -> LowRank:
        """The same update on another frozen part."""
        return dataclasses.replace(self, frozen=frozen)

    def map_frozen(self, f: Callable[[Array], Array]) -> LowRank:
        """The same update on ``f`` of the frozen part."""
        return self.with_frozen(self.frozen.map(f))

    def carry(self, f: Callable[[Array], Array], follow: Callable[[NamedArray], NamedArray]) -> LowRank:
        """``f`` of the frozen part, and ``follow`` of every other array."""
        return self.map_frozen(f).with_named_arrays([follow(x) for x in self.named_arrays])

    def dense(self) -> Array:
        """``w + a b``, the update in float32 (or wider), cast once to the dtype of ``w``."""
        w = self.frozen.dense()
        return w if self.probe else self.absorb_mix()._add_update(w)

    def _add_update(self, w: Array) -> Array:
        wide = at_least_float32(w.dtype)
        total = w.astype(wide)
        gain = None if self.gain is None else cast(self.gain, wide).broadcastable(range(w.ndim))
        if gain is not None and not self.gain_on_update:
            total, gain = total * gain, None
        for term in self.terms:
            a, b = (cast(x, wide) for x in complete_term(term, self.shape))
            # HIGHEST: by default a TPU multiplies float32 in bfloat16 and a GPU may in TF32, and the update would be
            # rounded before it is added.
            total = total + multiply(a, b, range(w.ndim), precision=lax.Precision.HIGHEST, dtype=wide).array
        return (total if gain is None else total * gain).astype(w.dtype)


def complete_term(term: Term, shape: Shape, axes: Iterable[int] | None = None) -> Term:
    """``term`` whose factors have every axis of a value of this shape, or each of ``axes``."""
    first, *rest = term
    present = {d for x in term for d in x.dims}
    for axis in range(len(shape)) if axes is None else axes:
        if axis not in present:
            # One factor takes the axis on and the other repeats along it. On both, the axis would be a stack, which no
            # product can sum before the rank.
            first = first.broadcast_axis(axis, shape[axis])
    return first, *rest


def from_adapter(path: Path, weight: FrozenWeight, adapter: Adapter, *, key: Key | None = None) -> LowRank:
    """The value of an adapted weight: ``a`` ``[*S, *m, r]`` and ``scale * b`` ``[*S, r, *n]``, letters as above.

    Args:
        path: The path of the weight.
        weight: The frozen weight ``[*S, *m, *n]``, its axes in any order.
        adapter: Its adapter.
        key: The key for dropout on the adapter's input; None for no dropout.
    """
    stack, ins, outs = (positions(adapter.axes, role) for role in ("stack", "in", "out"))
    terms: list[Term] = []
    if adapter.a is not None:
        a, b = unbox(adapter.a), unbox(adapter.b)
        if adapter.frozen_a:
            # LoRA-FA (arXiv:2308.03303): without a tangent of a, nothing needs x in the backward pass (see
            # `opaque_product`).
            a = lax.stop_gradient(a)
        if adapter.scale != 1:
            # The scale goes on b once and before any loop: that touches the fewest numbers, and no product has to save
            # a scaled copy of its activation for the backward pass. It does so in float32, so that a sum with W0 in
            # float32 sees no rounding of the scaled b.
            b = b.astype(at_least_float32(b.dtype))
            b = b * _broadcast_scale(adapter, b)
        terms.append((NamedArray(a, (*stack, *ins, RANK)), NamedArray(b, (*stack, RANK, *outs))))
    if adapter.tokens is not None:
        # Token rows are an update of rank k whose first factor picks the k rows. As one more term it needs no rule of
        # its own: products, look-ups and merges treat it like any other.
        rows = unbox(adapter.rows)
        picks = pick_rows(adapter, weight.shape[ins[0]], rows.dtype)
        terms.append((NamedArray(picks, (*ins, RANK)), NamedArray(rows, (RANK, *outs))))
    tap = isinstance(adapter, SecondMomentProbe)
    value = LowRank(
        weight,
        tuple(terms),
        path,
        dropout=Dropout(key, adapter.dropout) if key is not None and adapter.dropout else None,
        fusible=not (adapter.frozen_a or tap),
        tap=tap,
        pending=None if jnp.issubdtype(weight.dtype, jnp.floating) else Pending(),
    )
    if adapter.magnitude is None:
        return value
    dims = (*stack, *outs)
    # The DoRA paper takes the norm as a constant of the backward pass (arXiv:2402.09353, eq. 11).
    norm = lax.stop_gradient(_column_norm(weight.dense(), value.terms[0], adapter.axes, dims))
    magnitude = unbox(adapter.magnitude).astype(norm.dtype)
    # A column of zeros has no direction, and its gain is 1. The inner `where` matters too: magnitude / 0 would make the
    # gradient of the magnitude NaN, since the derivative of the outer one multiplies it by zero.
    gain = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 1)
    return dataclasses.replace(value, gain=NamedArray(gain, dims))


def pick_rows(adapter: Adapter, length: int, dtype: Dtype) -> Array:
    """The one-hot columns ``[length, k]`` of the token rows of an adapter."""
    return jax.nn.one_hot(jnp.array(adapter.tokens), length, dtype=dtype, axis=0)


def _broadcast_scale(adapter: Adapter, b: Array) -> Array:
    """The scale in a shape that multiplies ``b`` ``[*S, r, *n]``: ``[]``, or ``[*S, 1, *1]``."""
    scale = jnp.asarray(adapter.scale, b.dtype)
    if not isinstance(adapter.scale, tuple):
        return scale
    stack = len(positions(adapter.axes, "stack"))
    return scale.reshape(*b.shape[:stack], *[1] * (b.ndim - stack))


def _column_norm(weight: Array, term: Term, axes: Axes, dims: Sequence[Name]) -> Array:
    """The length ``[*S, *n]`` of each column of ``w + a b``, without materializing it; ``dims`` are its axes.

    ``|w|^2 + 2 <w, a b> + |a b|^2`` by column, with ``<w, a b> = <w^T a, b>`` and ``|a b|^2 = <(a^T a) b, b>``
    (Liu et al. 2024, arXiv:2402.09353, eq. 5). The products run in the dtype of the weight, the sums in float32.
    """
    squares = column_squares(weight, axes)
    wide = squares.dtype
    w, (a, b) = NamedArray(weight, tuple(range(weight.ndim))), term
    stack = [d for d in dims if d in a.dims]
    b = cast(b, wide).transpose_to([*stack, RANK, *(d for d in dims if d not in a.dims)])
    w_a = cast(multiply(w, cast(a, weight.dtype), b.dims), wide)
    a = cast(a, wide)
    gram = multiply(_with_other_rank(a), a, [*stack, "other", RANK], dtype=wide)
    gram_b = multiply(gram, _with_other_rank(b), b.dims, dtype=wide)
    update = jnp.sum((2 * w_a.array + gram_b.array) * b.array, axis=b.axis(RANK))
    # The three summands may cancel, and their rounding then leave a small negative number, whose root is NaN.
    return jnp.sqrt(jnp.maximum(squares + update, 0))


def _with_other_rank(x: NamedArray) -> NamedArray:
    return x.rename({RANK: "other"})


def compute_dtype(x: Array, accumulated: Dtype | None) -> Dtype:
    """The dtype of the products of ``x`` with factors: that of ``x``, but never less than 16 bits."""
    # Float8 has two or three bits of mantissa: too few for trained factors.
    if jnp.dtype(x.dtype).itemsize >= 2:
        return x.dtype
    return accumulated if accumulated is not None else jnp.bfloat16


def array_bytes(x: Array) -> int:
    """The bytes of an array."""
    return x.size * x.dtype.itemsize
