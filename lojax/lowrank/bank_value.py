"""The values of all adapters of a bank at one weight, and those of one of them or of a weighted sum.

An entry is picked by a number that may be traced. Under `jax.vmap` over the rows of a batch, each row then has its own
factors (*gathered*), and the products with them are batched, while the frozen weight stays one operand of one product.
The other form, *wide*, has the factors of all adapters side by side, one product for all rows, and masks the result
between the two factors: N times the operations, none of the gathering. On a TPU, whose matrix unit is 128 wide, they
cost nothing as long as all ranks together fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import positions
from lojax.adapters.bank import scale_entries, scales_of
from lojax.adapters.metadata import unbox
from lojax.lowrank.frozen import FrozenWeight
from lojax.lowrank.named_array import RANK, NamedArray, has_explicit_sharding
from lojax.lowrank.value import LowRank, Term, from_adapter, pick_rows
from lojax.types import Array, Path

MATRIX_UNIT = 128
"""The width of a TPU's matrix unit: a product with fewer columns takes as long as one with this many."""


@dataclasses.dataclass(frozen=True)
class BankValue:
    """The adapters of a bank at one weight.

    Attributes:
        template: The value of one of them. Its frozen part is the weight; its other arrays are shapes.
        arrays: The `named_arrays` of all of them, each with an axis of the adapters in front, ``b`` without the scales.
        scales: What multiplies ``b``, in a shape that does: ``[N, *1]``, or ``[N, *S, *1]``; None for 1.
        picks: The first factor of the token rows, the same for all adapters; None without such rows.
        rows: Their second factors, ``[N, k, *out]``.
    """

    template: LowRank
    arrays: list[Array]
    scales: Array | None = None
    picks: NamedArray | None = None
    rows: NamedArray | None = None

    @property
    def width(self) -> int:
        """The ranks of all adapters together."""
        return self.arrays[0].shape[0] * self.template.rank if self.template.terms else 0

    def pick(self, i: Array) -> LowRank:
        """The value of adapter ``i``; -1 is the weight alone. Any other number out of range gives NaN."""
        template, terms, gain = self.template, list[Term](), None
        if template.terms:
            (a, b), (all_a, all_b) = template.terms[0], self.arrays[:2]
            # Every pass over a factor counts while decoding: a has none, and b is scaled once it is picked, since a
            # bank may hold many more adapters than a batch has rows.
            own_a, own_b = _take(all_a, i), pick_entry(all_b, i, 0, scales=self.scales)
            terms.append((NamedArray(own_a, a.dims), NamedArray(own_b, b.dims)))
        if template.gain is not None:
            gain = NamedArray(pick_entry(self.arrays[-1], i, 1), template.gain.dims)
        if self.picks is not None and self.rows is not None:
            terms.append((self.picks, NamedArray(pick_entry(self.rows.array, i, 0), self.rows.dims)))
        return dataclasses.replace(template, terms=tuple(terms), gain=gain, fusible=False)

    def mix(self, weights: Array, choice: Array | None = None) -> LowRank:
        """The weight plus the sum of all updates, each times its entry of ``weights`` ``[N]``: the wide form.

        Args:
            weights: One number for each adapter, zeros for those that do not act.
            choice: The number of the only one that acts, if it is one.
        """
        template, like = self.template, self._like()
        arrays = list(self.arrays)
        if self.scales is not None:
            arrays[1] = _scale(arrays[1], self.scales)
        named = [NamedArray(x, ("entry", *y.dims)) for x, y in zip(arrays, like, strict=True)]
        terms: list[Term] = []
        mix = None
        if template.terms:
            terms.append(tuple(_side_by_side(x) for x in named[:2]))
            mix = NamedArray(jnp.repeat(weights, template.rank), (RANK,))
        if self.picks is not None and self.rows is not None:
            rows = jnp.tensordot(weights.astype(self.rows.array.dtype), self.rows.array, 1)
            terms.append((self.picks, NamedArray(rows, self.rows.dims)))
        mixed = dataclasses.replace(template, terms=tuple(terms), gain=None, mix=mix, fusible=False)
        if template.gain is None:
            return mixed
        if choice is not None:
            return dataclasses.replace(mixed, gain=self.pick(choice).gain)
        return self._mix_gains(mixed, named[-1], weights)

    def _mix_gains(self, mixed: LowRank, gains: NamedArray, weights: Array) -> LowRank:
        """The weighted sum of what DoRA adapters add: ``W0 + sum w_i (g_i (W0 + a_i b_i) - W0)``.

        That is ``(1 + sum w_i (g_i - 1)) W0 + sum w_i a_i (g_i b_i)``: each ``b`` takes its own gain.
        """
        first, second = mixed.terms[0]
        own = jnp.repeat(gains.array, self.template.rank, axis=0)
        own = NamedArray(own, (RANK, *gains.dims[1:])).broadcastable(second.dims)
        terms = ((first, NamedArray(second.array * own.astype(second.array.dtype), second.dims)), *mixed.terms[1:])
        gain = 1 + jnp.tensordot(weights.astype(gains.array.dtype), gains.array - 1, 1)
        return dataclasses.replace(mixed, terms=terms, gain=NamedArray(gain, gains.dims[1:]), gain_on_update=False)

    def _like(self) -> list[NamedArray]:
        return self.template.named_arrays


def from_bank(path: Path, weight: FrozenWeight, adapter: Adapter) -> BankValue:
    """The values of an adapted weight for all adapters of a bank.

    Args:
        path: The path of the weight.
        weight: The frozen weight.
        adapter: The adapters, as a `lojax.Bank` holds them: every array has an axis of the adapters in front.
    """
    scaled = scale_entries(adapter)
    plain = dataclasses.replace(scaled, rows=None, tokens=None)

    def value(entry: Adapter) -> LowRank:
        return from_adapter(path, weight, entry)

    entry = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), plain)
    template = jax.eval_shape(value, entry).with_frozen(weight)
    arrays: list[Array] = []
    scales = None
    if jax.tree.leaves(plain):
        # Once for each adapter and not for each row: the norms of DoRA take a product of the size of the weight.
        arrays = jax.vmap(lambda entry: [x.array for x in value(entry).named_arrays])(plain)
        if adapter.b is not None:
            arrays[1], scales = unbox(adapter.b), scales_of(adapter)
    if scaled.rows is None:
        return BankValue(template, arrays, scales)
    ins, outs = (positions(adapter.axes, role) for role in ("in", "out"))
    picks = pick_rows(scaled, weight.shape[ins[0]], jnp.asarray(unbox(scaled.rows)).dtype)
    rows = NamedArray(unbox(scaled.rows), (RANK, *outs))
    return BankValue(template, arrays, scales, NamedArray(picks, (*ins, RANK)), rows)


def pick_entry(x: Array, i: Array, base: Array | float, *, scales: Array | None = None) -> Array:
    """``x[i]`` times its scale; ``base`` for -1, whatever ``x`` holds, and NaN for any other number out of range."""
    entry = _take(x, i)
    if scales is not None:
        entry = _scale(entry, _take(scales, i))
    outside = jnp.where(i == -1, jnp.asarray(base, entry.dtype), jnp.asarray(jnp.nan, entry.dtype))
    return jnp.where((i >= 0) & (i < x.shape[0]), entry, outside)


def pick_full(x: Array, i: Array, base: Array | None) -> Array:
    """Entry ``i`` of a parameter that is trained in full, ``[N, ...]``; for -1 the ``base``, or NaN without one."""
    return pick_entry(x, i, jnp.nan if base is None else base)


def mix_full(x: Array, weights: Array, base: Array) -> Array:
    """``base`` plus the sum of all differences from it, each times its entry of ``weights`` ``[N]``."""
    return base + jnp.tensordot(weights.astype(x.dtype), x - base, 1)


def prefers_wide(width: int, platform: str) -> bool:
    """Whether the factors of all adapters side by side cost less than gathering those of each row."""
    return platform == "tpu" and width <= MATRIX_UNIT


def _take(x: Array, i: Array) -> Array:
    """``x[i]``, of the nearest number that there is."""
    if not (has_explicit_sharding(x) or has_explicit_sharding(i)):
        return jnp.take(x, i, axis=0, mode="clip")
    # On a mesh of explicit axes JAX cannot tell how rows that differ along one of them are sharded once they are looked
    # up. A sum of which one summand counts is the same.
    chosen = jnp.arange(x.shape[0]) == jnp.clip(i, 0, x.shape[0] - 1)
    return jnp.sum(jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x)), axis=0)


def _scale(b: Array, scales: Array) -> Array:
    """``b`` times its scale, in float32 or wider, as for a single adapter (`value.from_adapter`)."""
    return b.astype(scales.dtype) * scales


def _side_by_side(x: NamedArray) -> NamedArray:
    """``x`` whose axis of the adapters is merged into the rank."""
    dims = [d for d in x.dims if d not in ("entry", RANK)]
    at = [d for d in x.dims if d != "entry"].index(RANK)
    order: Sequence[Any] = (*dims[:at], "entry", RANK, *dims[at:])
    array = x.transpose_to(order).array
    shape = (*array.shape[:at], array.shape[at] * array.shape[at + 1], *array.shape[at + 2 :])
    return NamedArray(array.reshape(shape), (*dims[:at], RANK, *dims[at:]))
