"""A weight and its update, kept apart: the value that flows where an adapted weight would.

`LowRank` stands for ``w + sum_r a[..., r] b[r, ...]``. Each axis of the value is an axis of
``a``, of ``b``, or of both (a stack); an axis of neither repeats the update. The methods here are the
*carriers*: what turns one such value into another without forming the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import Axes, positions
from lojax.adapters.matrices import at_least_float32, column_squares
from lojax.adapters.metadata import unbox
from lojax.lowrank.named_array import RANK, Name, Named, cast, multiply
from lojax.lowrank.second_moment import Watching

SIDE_BY_SIDE = " | "
"""What joins the paths of weights that a program made one of."""


class NotFactored(Exception):
    """An operation has no factored form. The message is the reason, for the report."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """``w`` plus a low-rank update.

    Attributes:
        w: The frozen part, of the value's shape and dtype.
        factors: ``a, b`` of one update, each with an axis `RANK`; ``a, b, a', b'`` of a sum of two. (A
            probe, see `infer`, has one factor for every axis of the weight instead.)
        key: The key of the dropout on the adapter's input, or None.
        rate: The rate of that dropout.
        path: The path of the weight, for reports and errors.
        probe: Whether the value only watches how the weight is used.
        gain: A factor on the sum of both, over some of the axes of the value (DoRA); None for one.
        fusible: Whether forming ``w + a b`` for a product may pay: not where ``a`` is frozen, since the activation
            would be kept for the backward pass, which the factored way need not.
        watching: Whether the gradient of the first factor is to be the second moment of its input (see `echo`).
    """

    w: Any
    factors: tuple[Named, ...]
    key: Any
    rate: float = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    probe: bool = dataclasses.field(default=False, metadata={"static": True})
    gain: Named | None = None
    fusible: bool = dataclasses.field(default=True, metadata={"static": True})
    watching: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.w.shape

    def mapped(self, f: Callable[[Any], Any]) -> LowRank:
        """``f`` on every array: ``w``, the factors, the gain."""
        return _carry(self, f(self.w), lambda x: Named(f(x.array), x.dims))

    @property
    def parts(self) -> tuple[Named, ...]:
        """What goes with ``w``: the factors, and the gain where there is one."""
        return self.factors if self.gain is None else (*self.factors, self.gain)

    def with_parts(self, parts: Sequence[Named], **changes: Any) -> LowRank:
        """The same value with other `parts`, in the same order."""
        count = len(self.factors)
        gain = None if self.gain is None else parts[count]
        return dataclasses.replace(self, factors=tuple(parts[:count]), gain=gain, **changes)

    def with_w(self, w: Any) -> LowRank:
        """The same update on another frozen part."""
        return dataclasses.replace(self, w=w)

    def dense(self) -> Any:
        """``w + a b``, the update in float32 (or wider), cast once to the dtype of ``w``."""
        if self.probe:
            return self.w
        wide = at_least_float32(self.w.dtype)
        total = self.w.astype(wide)
        for single in self.terms():
            a, b = (cast(x, wide) for x in complete(single).factors)
            update = multiply(a, b, range(self.w.ndim), precision=lax.Precision.HIGHEST, dtype=wide)
            total = total + update.array
        if self.gain is not None:
            total = total * cast(self.gain, wide).spread(range(self.w.ndim))
        return total.astype(self.w.dtype)

    def terms(self) -> list[LowRank]:
        """The same frozen part with each update alone."""
        pairs = zip(self.factors[::2], self.factors[1::2], strict=True)
        return [dataclasses.replace(self, factors=pair) for pair in pairs]


def from_adapter(path: str, w: Any, adapter: Adapter, *, rate: float = 0.0, key: Any = None) -> LowRank:
    """The value of an adapted weight: ``a`` ``[*stack, *in, r]`` and ``scale * b`` ``[*stack, r, *out]``.

    The scale goes on ``b`` once and for all, in float32 or wider and before any loop: that touches the
    fewest numbers, and no product has to keep a scaled copy for its backward pass.
    """
    stack, ins, outs = (positions(adapter.axes, role) for role in ("stack", "in", "out"))
    factors: tuple[Named, ...] = ()
    if adapter.a is not None:
        a, b = unbox(adapter.a), unbox(adapter.b)
        if adapter.frozen_a:
            a = lax.stop_gradient(a)
        if adapter.scale != 1:
            b = b.astype(at_least_float32(b.dtype))
            b = b * _scale(adapter, b)
        factors = Named(a, (*stack, *ins, RANK)), Named(b, (*stack, RANK, *outs))
    watching = isinstance(adapter, Watching)
    value = LowRank(w, factors, key, rate, path, fusible=not (adapter.frozen_a or watching), watching=watching)
    if adapter.tokens is not None:  # one column for each row that trains, with a single one in it
        rows = unbox(adapter.rows)
        chosen = jax.nn.one_hot(jnp.array(adapter.tokens), w.shape[ins[0]], dtype=rows.dtype, axis=0)
        value = dataclasses.replace(value, factors=(*factors, Named(chosen, (*ins, RANK)), Named(rows, (RANK, *outs))))
    if adapter.magnitude is None:
        return value
    dims = (*stack, *outs)
    norm = lax.stop_gradient(_column_norm(value, adapter.axes, dims))
    magnitude = unbox(adapter.magnitude).astype(norm.dtype)
    gain = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 1)
    return dataclasses.replace(value, gain=Named(gain, dims))


def _scale(adapter: Adapter, b: Any) -> Any:
    """The scale as it multiplies ``b`` ``[*stack, r, *out]``."""
    scale = jnp.asarray(adapter.scale, b.dtype)
    if not isinstance(adapter.scale, tuple):
        return scale
    stack = len(positions(adapter.axes, "stack"))
    return scale.reshape(*b.shape[:stack], *[1] * (b.ndim - stack))


def _column_norm(value: LowRank, axes: Axes, dims: Sequence[Name]) -> Any:
    """The length of each column of ``w + a b``, ``dims`` being its stack and out axes, without forming it.

    ``|w|^2 + 2 <w, a b> + |a b|^2`` by column, with ``<w, a b> = <w^T a, b>`` and ``|a b|^2 = <(a^T a) b, b>``
    (Liu et al. 2024, arXiv:2402.09353, eq. 5). The products run in the dtype of the weight, the sums in float32.
    """
    squares = column_squares(value.w, axes)
    wide = squares.dtype
    w, (a, b) = Named(value.w, tuple(range(value.w.ndim))), value.factors
    stack = [d for d in dims if d in a.dims]
    b = cast(b, wide).ordered([*stack, RANK, *(d for d in dims if d not in a.dims)])
    against = cast(multiply(w, cast(a, value.w.dtype), b.dims), wide)
    a = cast(a, wide)
    gram = multiply(_other(a), a, [*stack, "other", RANK], dtype=wide)
    turned = multiply(gram, _other(b), b.dims, dtype=wide)
    update = jnp.sum((2 * against.array + turned.array) * b.array, axis=b.axis(RANK))
    return jnp.sqrt(jnp.maximum(squares + update, 0))


def _other(x: Named) -> Named:
    return x.renamed({RANK: "other"})


def complete(value: LowRank, axes: Iterable[int] | None = None) -> LowRank:
    """The same value with every axis, or each of ``axes``, in some factor."""
    a, *rest = value.factors
    known = {d for x in value.factors for d in x.dims}
    for axis in range(value.w.ndim) if axes is None else axes:
        if axis not in known:
            a = a.extended(axis, value.shape[axis])
    return dataclasses.replace(value, factors=(a, *rest))


# --- carriers: every one maps the axes of the value, and each factor follows ---


def _carry(value: LowRank, w: Any, follow: Callable[[Named], Named]) -> LowRank:
    return value.with_parts([follow(x) for x in value.parts], w=w)


def transpose(value: LowRank, permutation: Sequence[int]) -> LowRank:
    """The axes in another order."""
    names: dict[Name, Name] = {old: new for new, old in enumerate(permutation)}
    return _carry(value, lax.transpose(value.w, permutation), lambda x: x.renamed(names))


def squeeze(value: LowRank, dimensions: Sequence[int]) -> LowRank:
    """Without some axes of length one."""
    gone = {d % value.w.ndim for d in dimensions}
    kept = [d for d in range(value.w.ndim) if d not in gone]
    names: dict[Name, Name] = {old: new for new, old in enumerate(kept)}

    def follow(x: Named) -> Named:
        return x.dropped([d for d in x.dims if d in gone]).renamed(names)

    return _carry(value, lax.squeeze(value.w, sorted(gone)), follow)


def broadcast(value: LowRank, w: Any, dimensions: Sequence[int]) -> LowRank:
    """Axis ``i`` becomes axis ``dimensions[i]`` of ``w``; along the others the value repeats."""
    names: dict[Name, Name] = dict(enumerate(dimensions))
    stretched = {i for i, d in enumerate(dimensions) if value.shape[i] != w.shape[d]}

    def follow(x: Named) -> Named:
        return x.dropped([d for d in x.dims if d in stretched]).renamed(names)

    return _carry(value, w, follow)


def cut(value: LowRank, w: Any, along: Callable[[Any, tuple[int, ...]], Any]) -> LowRank:
    """A part of the value along its axes; ``along(array, axes)`` cuts an array that has these axes.

    An axis `RANK` is given as -1: it is never cut.
    """

    def follow(x: Named) -> Named:
        return Named(along(x.array, tuple(-1 if d == RANK else d for d in x.dims)), x.dims)  # type: ignore[misc]

    return _carry(value, w, follow)


def scaled(value: LowRank, w: Any, factor: Any) -> LowRank:
    """The value times a scalar, which goes on every ``b``."""
    factors = tuple(
        Named(x.array * factor.astype(x.array.dtype), x.dims) if i % 2 else x for i, x in enumerate(value.factors)
    )
    return dataclasses.replace(value, w=w, factors=factors)


def negated(value: LowRank) -> LowRank:
    """Minus the value."""
    return scaled(value, -value.w, jnp.asarray(-1.0))


def reshape(value: LowRank, shape: Sequence[int]) -> LowRank:
    """The value in another shape, where no group of axes that merge or split spans two factors."""
    groups = reshape_groups(value.shape, shape)
    held = {d for x in value.factors for d in x.dims}
    parts = [_reshape_part(value, x, groups, shape, held) for x in value.factors]
    if value.gain is not None:  # which repeats along every axis it has not
        parts.append(_reshape_part(value, value.gain, groups, shape, set()))
    return value.with_parts(parts, w=lax.reshape(value.w, shape))


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of runs of old axes with runs of new axes of equal size.

    >>> reshape_groups((512, 8, 64), (512, 512))
    [([0], [0]), ([1, 2], [1])]
    """
    if 0 in old:
        raise NotFactored("a reshape of an empty weight")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        size_left = size_right = 1
        while not (left or right) or size_left != size_right:
            if (size_left <= size_right and i < len(old)) or j >= len(new):
                left.append(i)
                size_left *= old[i]
                i += 1
            else:
                right.append(j)
                size_right *= new[j]
                j += 1
        groups.append((left, right))
    return groups


def _reshape_part(
    value: LowRank, x: Named, groups: list[tuple[list[int], list[int]]], shape: Sequence[int], held: set[Name]
) -> Named:
    """``x`` in the new shape. It cannot take on an axis ``held`` by another part; along any other it may repeat."""
    for left, _ in groups:  # axes of length one carry nothing
        x = x.dropped([d for d in left if d in x.dims and value.shape[d] == 1])
    order: list[Name] = [RANK] * (RANK in x.dims)
    dims: list[Name] = [RANK] * (RANK in x.dims)
    for left, right in groups:
        large = [d for d in left if value.shape[d] != 1]
        absent = [d for d in large if d not in x.dims]
        if not large or len(absent) == len(large):
            continue
        if held & {*absent} and not value.probe:
            raise NotFactored("a reshape that merges in axes with out axes")
        for d in absent:
            x = x.extended(d, value.shape[d])
        order += large
        dims += right
    lengths = [x.size(RANK) if d == RANK else shape[d] for d in dims]  # type: ignore[index]
    return Named(lax.reshape(x.ordered(order).array, lengths), tuple(dims))
