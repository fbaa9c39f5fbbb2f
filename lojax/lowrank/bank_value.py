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
from lojax.adapters.bank import scale_entries
from lojax.adapters.metadata import unbox
from lojax.lowrank.frozen import FrozenWeight
from lojax.lowrank.named_array import RANK, NamedArray
from lojax.lowrank.value import LowRank, NotFactored, Term, from_adapter, pick_rows
from lojax.types import Array, Path

MATRIX_UNIT = 128
"""The width of a TPU's matrix unit: a factor with fewer columns costs as much as one with so many."""


@dataclasses.dataclass(frozen=True)
class BankValue:
    """The adapters of a bank at one weight.

    Attributes:
        template: The value of one of them. Its frozen part is the weight; its other arrays are shapes.
        arrays: The `named_arrays` of all of them, each with an axis of the adapters in front.
        picks: The first factor of the token rows, the same for all adapters; None without such rows.
        rows: Their second factors, ``[N, k, *out]``.
    """

    template: LowRank
    arrays: list[Array]
    picks: NamedArray | None = None
    rows: NamedArray | None = None

    @property
    def width(self) -> int:
        """The ranks of all adapters together."""
        return self.arrays[0].shape[0] * self.template.rank if self.template.terms else 0

    def pick(self, i: Array) -> LowRank:
        """The value of adapter ``i``; -1 is the weight alone. Any other number out of range gives NaN."""
        value = self.template.with_named_arrays(
            [NamedArray(pick_entry(x, i), like.dims) for x, like in zip(self.arrays, self._like(), strict=True)]
        )
        terms = [self._switch_off(term, i) for term in value.terms]
        gain = value.gain
        if gain is not None:
            gain = NamedArray(jnp.where(i == -1, jnp.ones_like(gain.array), gain.array), gain.dims)
        if self.picks is not None and self.rows is not None:
            rows = NamedArray(pick_entry(self.rows.array, i), self.rows.dims)
            terms.append(self._switch_off((self.picks, rows), i))
        return dataclasses.replace(value, terms=tuple(terms), gain=gain, fusible=False)

    def mix(self, weights: Array, choice: Array | None = None) -> LowRank:
        """The weight plus the sum of all updates, each times its entry of ``weights`` ``[N]``: the wide form.

        Args:
            weights: One number for each adapter, zeros for those that do not act.
            choice: The number of the only one that acts, if it is one.
        """
        template, like = self.template, self._like()
        if template.gain is not None and choice is None:
            raise NotFactored("DoRA adapters under weights")
        named = [NamedArray(x, ("entry", *y.dims)) for x, y in zip(self.arrays, like, strict=True)]
        terms: list[Term] = []
        mix = None
        if template.terms:
            terms.append(tuple(_side_by_side(x) for x in named[:2]))
            mix = NamedArray(jnp.repeat(weights, template.rank), (RANK,))
        if self.picks is not None and self.rows is not None:
            rows = jnp.tensordot(weights.astype(self.rows.array.dtype), self.rows.array, 1)
            terms.append((self.picks, NamedArray(rows, self.rows.dims)))
        gain = None if choice is None or template.gain is None else self.pick(choice).gain
        return dataclasses.replace(template, terms=tuple(terms), gain=gain, mix=mix, fusible=False)

    def _like(self) -> list[NamedArray]:
        return self.template.named_arrays

    def _switch_off(self, term: Term, i: Array) -> Term:
        """``term``, or an update of zeros for -1."""
        first, second = term
        return first, NamedArray(jnp.where(i == -1, jnp.zeros_like(second.array), second.array), second.dims)


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
    if jax.tree.leaves(plain):
        # Once for each adapter and not for each row: the norms of DoRA take a product of the size of the weight.
        arrays = jax.vmap(lambda entry: [x.array for x in value(entry).named_arrays])(plain)
    if scaled.rows is None:
        return BankValue(template, arrays)
    ins, outs = (positions(adapter.axes, role) for role in ("in", "out"))
    picks = pick_rows(scaled, weight.shape[ins[0]], jnp.asarray(unbox(scaled.rows)).dtype)
    rows = NamedArray(unbox(scaled.rows), (RANK, *outs))
    return BankValue(template, arrays, NamedArray(picks, (*ins, RANK)), rows)


def pick_entry(x: Array, i: Array) -> Array:
    """``x[i]``: the first entry for -1, which its caller switches off, and NaN for any other number out of range."""
    i = jnp.asarray(i)
    inside = jnp.maximum(i, jnp.where(i == -1, 0, i))
    fill: dict[str, Any] = {"mode": "fill"} if jnp.issubdtype(x.dtype, jnp.inexact) else {"mode": "clip"}
    # A negative number would count from the end.
    return jnp.take(x, jnp.where(inside < 0, x.shape[0], inside), axis=0, **fill)


def pick_full(x: Array, i: Array, base: Array | None) -> Array:
    """Entry ``i`` of a parameter that is trained in full, ``[N, ...]``; for -1 the ``base``, or NaN without one."""
    if base is None:
        return pick_entry(x, jnp.where(i == -1, x.shape[0], i))
    return jnp.where(i == -1, base, pick_entry(x, i))


def mix_full(x: Array, weights: Array, base: Array) -> Array:
    """``base`` plus the sum of all differences from it, each times its entry of ``weights`` ``[N]``."""
    return base + jnp.tensordot(weights.astype(x.dtype), x - base, 1)


def prefers_wide(width: int, platform: str) -> bool:
    """Whether the factors of all adapters side by side cost less than gathering those of each row."""
    return platform == "tpu" and width <= MATRIX_UNIT


def _side_by_side(x: NamedArray) -> NamedArray:
    """``x`` whose axis of the adapters is merged into the rank."""
    dims = [d for d in x.dims if d not in ("entry", RANK)]
    at = [d for d in x.dims if d != "entry"].index(RANK)
    order: Sequence[Any] = (*dims[:at], "entry", RANK, *dims[at:])
    array = x.transpose_to(order).array
    shape = (*array.shape[:at], array.shape[at] * array.shape[at + 1], *array.shape[at + 2 :])
    return NamedArray(array.reshape(shape), (*dims[:at], RANK, *dims[at:]))
