"""A look-up in an adapted weight (`gather`): the rows of an embedding, or the entries of a stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lojax.lowrank.factored import add_updates, mask_tokens
from lojax.lowrank.frozen import DenseWeight, FrozenWeight, RecomputedWeight
from lojax.lowrank.named_array import RANK, Name, NamedArray, cast, multiply, multiply_flops
from lojax.lowrank.strategy import Product
from lojax.lowrank.value import LowRank, Term, array_bytes, complete_term
from lojax.types import Array


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A look-up. If it indexes stack axes only, the result is again an adapted weight.

    Otherwise the rows of one factor are looked up and multiplied by the other.

    Attributes:
        indices: ``[*batch, k]``, as in `jax.lax.gather`.
        numbers: The ``dimension_numbers`` of `jax.lax.gather`.
        slice_sizes: As in `jax.lax.gather`.
        bind: ``bind(w)``, the look-up in a plain weight.
        options: The other parameters of `jax.lax.gather`.
    """

    indices: Array
    numbers: lax.GatherDimensionNumbers
    slice_sizes: Sequence[int]
    bind: Callable[[Array], Array]
    options: dict[str, Any]

    @property
    def batch(self) -> list[Name]:
        """The names of the batch axes of the indices."""
        return [("i", j) for j in range(self.indices.ndim - 1)]

    def addressed(self, value: LowRank) -> set[int]:
        """The axes that the look-up indexes. An axis taken in full counts only if its index may be out of bounds."""
        strict = self.options["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        return {d for d in self.numbers.start_index_map if strict or self.slice_sizes[d] != value.shape[d]}

    def picks_entries(self, value: LowRank) -> bool:
        """Whether the result is again an adapted weight: only stack axes are indexed."""
        addressed = self.addressed(value)
        if not value.probe:
            return all(addressed <= {*x.dims} for term in value.terms for x in term)
        # A probe does not know yet which axes are a stack. The indexed ones are, if two or more other axes remain: the
        # entry is then a matrix. If one remains, the entry is a row of an embedding.
        shared = {*addressed, *self.numbers.operand_batching_dims}
        remaining = [f for f in value.terms[0] if any(d != RANK and f.size(d) > 1 for d in f.dims)]
        return sum(not shared & {*f.dims} for f in remaining) > 1

    def contracted_axes(self, value: LowRank) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The last indexed axis is an in axis (a look-up is a product with one-hot rows), the others a stack."""
        addressed = sorted(self.addressed(value))
        return tuple(addressed[-1:]), (*addressed[:-1], *sorted(self.numbers.operand_batching_dims))

    def frozen(self, value: LowRank) -> Array:
        """The look-up in the frozen part alone."""
        return self.pick_frozen(value.frozen).dense()

    def compute(self, value: LowRank, execution: str) -> Product:
        """The rows that are looked up, with the cost of their update. Always factored, whatever ``execution`` is."""
        rows = self.pick(value)
        y = rows.frozen.dense()
        axes = range(y.ndim)
        terms = tuple(tuple(cast(x, y.dtype) for x in complete_term(term, y.shape)) for term in rows.terms)
        names = [d if d in self.numbers.offset_dims else ("i", d) for d in axes]

        def update(term: Term) -> Array:
            rows_of_term = multiply(term[0], term[1], axes).array
            return rows_of_term if value.active is None else mask_tokens(rows_of_term, names, value.active)

        result = add_updates(
            rows.with_terms(terms),
            None,
            axes,
            base=lambda _: y,
            update=lambda _x, term, _like, _tap: update(term),
        )
        made = sum(array_bytes(a.array) + array_bytes(y) for a, _ in terms)
        return Product(result, 0, sum(multiply_flops(a, b) for a, b in terms), made)

    def pick_frozen(self, weight: FrozenWeight) -> FrozenWeight:
        """The look-up in a frozen weight. Of a recomputed one, only the rows that are looked up are computed."""
        entries = weight.entries() if isinstance(weight, RecomputedWeight) and self._takes_rows(weight) else weight
        if not isinstance(entries, RecomputedWeight):
            return weight.map(self.bind)
        options = {name: x for name, x in self.options.items() if name != "fill_value"}
        fills = self._fills()
        if fills:  # what is stored has no number that stands for "out of bounds"
            options["mode"] = lax.GatherScatterMode.CLIP

        def take(x: Array) -> Array:
            numbers = self.numbers._replace(offset_dims=tuple(range(len(self.batch), len(self.batch) + x.ndim - 1)))
            return lax.gather(x, self.indices, numbers, (1, *x.shape[1:]), **options)

        compute = RecomputedWeight.dense
        for _ in self.batch:
            compute = jax.vmap(compute)
        rows = compute(jax.tree.map(take, entries))
        if fills:
            fill = self.options.get("fill_value")
            inside = jnp.all((self.indices >= 0) & (self.indices < weight.shape[0]), axis=-1)
            inside = inside.reshape(*inside.shape, *[1] * (rows.ndim - inside.ndim))
            rows = jnp.where(inside, rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))
        return DenseWeight(rows)

    def _takes_rows(self, weight: FrozenWeight) -> bool:
        """Whether this takes whole entries along the first axis, and nothing else."""
        numbers, shape = self.numbers, weight.shape
        first = tuple(numbers.start_index_map) == (0,) == tuple(numbers.collapsed_slice_dims)
        last = tuple(numbers.offset_dims) == tuple(range(len(self.batch), len(self.batch) + len(shape) - 1))
        return first and last and not numbers.operand_batching_dims and tuple(self.slice_sizes) == (1, *shape[1:])

    def pick(self, value: LowRank) -> LowRank:
        """The look-up in the frozen part, and in each factor that has an indexed axis."""
        frozen = self.pick_frozen(value.frozen)
        names = self._result_axes(value, len(frozen.shape))
        addressed = self.addressed(value)

        def follow(x: NamedArray) -> NamedArray:
            return self._pick_in_array(x, addressed).rename(names)

        if value.probe or not self._fills():
            return value.with_frozen(frozen).with_named_arrays([follow(x) for x in value.named_arrays])
        return self._pick_filled(value, frozen, addressed, follow)

    def _result_axes(self, value: LowRank, ndim: int) -> dict[Name, Name]:
        """The position in the result of each axis of the weight and of each batch axis of the indices."""
        removed = {*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims}
        weight_axes = iter(d for d in range(value.ndim) if d not in removed)
        batch_axes = iter(self.batch)
        return {
            next(weight_axes) if position in self.numbers.offset_dims else next(batch_axes): position
            for position in range(ndim)
        }

    def _fills(self) -> bool:
        """Whether entries out of bounds become a number. NaN does not count: NaN plus any update is NaN."""
        fill = self.options.get("fill_value")
        # ``fill == fill`` is False for NaN alone.
        return self.options["mode"] == lax.GatherScatterMode.FILL_OR_DROP and fill is not None and fill == fill

    def _pick_filled(
        self, value: LowRank, frozen: FrozenWeight, addressed: set[int], follow: Callable[[NamedArray], NamedArray]
    ) -> LowRank:
        """A look-up that fills: out of bounds, the update is zero and the gain one."""
        # An update that repeats along an indexed axis has nothing that the look-up could set to zero out of bounds, so
        # a factor takes that axis on first.
        terms = tuple(
            tuple(follow(x) for x in complete_term(term, value.shape, sorted(addressed))) for term in value.terms
        )
        gain = value.gain
        if gain is not None:
            # The same look-up in an array of ones says which entries are in bounds, for every mode and layout of the
            # indices.
            ones = jnp.ones([value.shape[d] for d in sorted(addressed)], gain.array.dtype)
            inside = follow(NamedArray(ones, tuple(sorted(addressed))))
            gain = follow(gain)
            dims = tuple(dict.fromkeys((*inside.dims, *gain.dims)))
            gain = NamedArray(jnp.where(inside.broadcastable(dims) > 0, gain.broadcastable(dims), 1), dims)
        return dataclasses.replace(value, frozen=frozen, terms=terms, gain=gain)

    def _pick_in_array(self, x: NamedArray, addressed: set[int]) -> NamedArray:
        """The look-up in one array that has some of the axes of the weight."""
        numbers, batch = self.numbers, self.batch
        sizes: Any = self.slice_sizes
        columns = [i for i, d in enumerate(numbers.start_index_map) if d in x.dims and d in addressed]
        batching: dict[Any, int] = dict(
            zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        )
        sliced = [d for d in x.dims if d != RANK and d not in batching and sizes[d] != x.size(d)]
        # Nothing is indexed here: the array keeps its entries, and its batching axes become those of the indices.
        if not columns and not sliced:
            names = {d: batch[axis] for d, axis in batching.items()}
            return x.squeeze([d for d in x.dims if d in numbers.collapsed_slice_dims]).rename(names)
        # `gather` returns the offset axes in the order of its operand, so the operand has them in the order of the
        # weight.
        x = x.transpose_to([*sorted(d for d in x.dims if d != RANK), *[RANK] * (RANK in x.dims)])  # type: ignore[type-var]
        collapsed = [d for d in x.dims if d in numbers.collapsed_slice_dims]
        batched = [d for d in x.dims if d in batching]
        offset = [d for d in x.dims if d not in (*collapsed, *batched)]
        # Out of bounds the frozen part is already the fill value: the update to add to it is zero.
        fill: dict[str, Any] = {} if self.options.get("fill_value") is None else {"fill_value": 0}
        indices = self.indices
        # An index along an axis that this array does not have says nothing about it.
        if len(columns) < indices.shape[-1]:
            indices = jnp.take(indices, jnp.asarray(columns), axis=-1)
        array = lax.gather(
            x.array,
            indices,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(batch), len(batch) + len(offset))),
                collapsed_slice_dims=tuple(x.axis(d) for d in collapsed),
                start_index_map=tuple(x.axis(numbers.start_index_map[i]) for i in columns),
                operand_batching_dims=tuple(x.axis(d) for d in batched),
                start_indices_batching_dims=tuple(batching[d] for d in batched),
            ),
            slice_sizes=tuple(x.size(d) if d == RANK else sizes[d] for d in x.dims),
            **(self.options | fill),
        )
        return NamedArray(array, (*batch, *offset))
