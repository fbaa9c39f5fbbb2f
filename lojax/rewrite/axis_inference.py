"""Which axes of a weight are inputs, outputs or a stack, read off the program that uses it.

The program is traced once, on shapes, with a *probe* in place of each targeted weight: a `LowRank`
with one factor for every axis of the weight. The carriers move the factors along, so at each product
it is plain which axes of the weight are summed (in), free (out), or shared with a batch (stack). An
axis of which only one entry is left, as when a scan or an index picks a layer, is a stack as well.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lojax.adapters.axes import Axes
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import map_paths
from lojax.lowrank import products
from lojax.lowrank.named_array import RANK, Named
from lojax.lowrank.products import Product
from lojax.lowrank.value import SIDE_BY_SIDE, LowRank
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.transform import abstractly, evaluate


@dataclasses.dataclass(frozen=True)
class Sight:
    """One use of a weight, as roles of its axes, and how many operations it takes."""

    axes: Axes
    flops: int


class Watch:
    """Stands in for `lojax.lowrank.products`: computes nothing low-rank, notes how weights are used."""

    def __init__(self) -> None:
        self.sights: dict[str, list[Sight]] = {}

    def see(self, probe: LowRank, summed: Sequence[int], batch: Sequence[int], flops: int) -> None:
        """Notes a product that sums the value axes ``summed`` and shares ``batch`` with the activation."""
        roles = []
        for factor in probe.factors:
            here = [d for d in factor.dims if d != RANK]
            if any(d in summed for d in here):
                roles.append("in")
            elif all(factor.size(d) == 1 or d in batch for d in here):
                roles.append("stack")
            else:
                roles.append("out")
        if "in" in roles and "out" in roles:
            for path in probe.path.split(SIDE_BY_SIDE):
                self.sights.setdefault(path, []).append(Sight(tuple(roles), flops))  # type: ignore[arg-type]

    def dot(
        self,
        x: Any,
        value: LowRank,
        *,
        dimension_numbers: Any,
        weight_on_left: bool,
        base: Callable[[Any, Any], Any],
        **options: Any,
    ) -> Product:
        """Notes a `dot_general`."""
        (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
        summed, batch = (lhs_sum, lhs_batch) if weight_on_left else (rhs_sum, rhs_batch)
        y = base(value.w, x)
        self.see(value, summed, batch, y.size)
        return Product(y, 0, 0, 0)

    def gather(
        self,
        value: LowRank,
        indices: Any,
        *,
        dimension_numbers: lax.GatherDimensionNumbers,
        slice_sizes: Sequence[int],
        base: Any,
        options: dict[str, Any],
    ) -> Product | LowRank:
        """Notes a look-up: the last axis addressed is in, others addressed and those batched are a stack."""
        touched = sorted(products.addressed(value, dimension_numbers, slice_sizes, options["mode"]))
        batched = sorted(dimension_numbers.operand_batching_dims)
        left = [f for f in value.factors if any(d != RANK and f.size(d) > 1 for d in f.dims)]
        free = [f for f in left if not any(d in (*touched, *batched) for d in f.dims)]
        if len(free) > 1:  # entries of a stack
            return products.look_up(
                value,
                indices,
                dimension_numbers=dimension_numbers,
                slice_sizes=slice_sizes,
                base=base,
                options=options,
            )
        self.see(value, touched[-1:], (*touched[:-1], *batched), base.size)
        return Product(base, 0, 0, 0)

    def conv(
        self, x: Any, value: LowRank, *, base: Any, dimension_numbers: lax.ConvDimensionNumbers, **options: Any
    ) -> Product:
        """Notes a convolution: input features and window are in, output features are out."""
        summed = dimension_numbers.rhs_spec[1:]
        self.see(value, summed, (), base.size)
        return Product(base, 0, 0, 0)

    def ragged_dot(
        self, x: Any, value: LowRank, group_sizes: Any, *, dimension_numbers: Any, base: Any, **options: Any
    ) -> Product:
        """Notes a product with experts: the group axis is a stack."""
        (_, summed), (_, batch) = dimension_numbers.dot_dimension_numbers
        self.see(value, summed, (*batch, *dimension_numbers.rhs_group_dimensions), base.size)
        return Product(base, 0, 0, 0)


def infer_axes(
    f: Callable[..., Any], params: Any, paths: Sequence[str], args: Any, kwargs: Mapping[str, Any]
) -> dict[str, Axes]:
    """The axes of the weights at ``paths`` as ``f(params, *args, **kwargs)`` uses them.

    Arrays may be `jax.ShapeDtypeStruct`. A weight that takes part in no product is left out.
    """
    watch = Watch()
    interp = Interpreter(products=watch)  # type: ignore[arg-type]
    wanted = set(paths)

    def run(params: Any, args: Any, kwargs: Any) -> Any:
        probes = map_paths(lambda path, x: rebox(x, _probe(path, unbox(x))) if path in wanted else x, params)
        return evaluate(f, interp, probes, args, kwargs)

    abstractly(run, params, args, dict(kwargs))
    return {path: _agreed(sights) for path, sights in watch.sights.items()}


def _probe(path: str, w: Any) -> LowRank:
    factors = tuple(Named(jnp.ones((1, n)), (RANK, axis)) for axis, n in enumerate(w.shape))
    return LowRank(w, factors, None, 0.0, path, probe=True)


def _agreed(sights: Sequence[Sight]) -> Axes:
    """The roles that keep the most work factored; of two orientations, the one seen first.

    ``x @ w`` and ``x @ w.T`` agree: either end of a factored weight can be summed first.
    """
    work: Counter[Any] = Counter()
    for sight in sights:
        work[_partition(sight.axes)] += sight.flops
    best, _ = work.most_common(1)[0]
    return next(sight.axes for sight in sights if _partition(sight.axes) == best)


def _partition(axes: Axes) -> Any:
    ins = frozenset(i for i, role in enumerate(axes) if role == "in")
    outs = frozenset(i for i, role in enumerate(axes) if role == "out")
    return frozenset((ins, outs))
