"""Which axes of a weight are inputs, outputs or a stack, inferred from the program that uses it.

The program is traced once, on shapes, with a *probe* in place of each targeted weight: a `LowRank`
with one factor for every axis of the weight. The carriers move these factors with the axes, so at each product the
factors tell which axes of the weight are summed (in), free (out), or shared with a batch (stack). An
axis of which only one entry remains, as when a scan or an index picks a layer, is a stack as well.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lojax.adapters.axes import Axes, Role
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.lowrank.code_layout import Pending
from lojax.lowrank.frozen import FrozenWeight, frozen_weight
from lojax.lowrank.named_array import RANK, NamedArray
from lojax.lowrank.value import PATH_SEPARATOR, LowRank
from lojax.quantized.quantized import is_quantized
from lojax.rewrite.evaluate import evaluate, trace_abstractly
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.rules import RULES
from lojax.types import Array, Dtype, Leaf, Params, Path, PyTree, Shape


@dataclasses.dataclass(frozen=True)
class Observation:
    """One product with a weight: the roles of its axes, and the size of the result as a measure of its work."""

    axes: Axes
    work: int


def infer_axes(
    f: Callable[..., PyTree], params: Params, paths: Sequence[Path], args: PyTree, kwargs: Mapping[str, Any]
) -> tuple[dict[Path, Axes], dict[Path, Shape]]:
    """The axes of the weights at ``paths`` as ``f(params, *args, **kwargs)`` uses them, and the shapes of some.

    Arrays may be `jax.ShapeDtypeStruct`. A weight without a product has no axes in the result. A weight has a shape in
    it if the program unpacks it from codes of another one.
    """
    observations: dict[Path, list[Observation]] = {}

    def observe(probe: LowRank, summed: Sequence[int], batch: Sequence[int], work: int) -> None:
        axes = _roles(probe, summed, batch)
        # A product without in or out axes (a sum, a scale) says nothing about the two ends of a matrix. Weights that
        # the program concatenated share a probe: what it shows holds for each of them.
        if "in" in axes and "out" in axes:
            for path in probe.path.split(PATH_SEPARATOR):
                observations.setdefault(path, []).append(Observation(axes, work))

    interpreter = Interpreter(RULES, observer=observe)
    targeted = set(paths)
    leaves = flatten(params)
    has_codes = any(_may_be_codes(unbox(leaves[path]).dtype) for path in paths)

    def run(params: Params, args: PyTree, kwargs: PyTree) -> PyTree:
        def place(path: Path, leaf: Leaf) -> Leaf:
            x = unbox(leaf)
            if path in targeted:
                return rebox(leaf, _probe(path, frozen_weight(x)))
            # The scales of codes are known by being frozen.
            is_frozen = is_quantized(x) or (has_codes and hasattr(x, "dtype"))
            return rebox(leaf, frozen_weight(x)) if is_frozen else leaf

        probes = map_paths(place, params)
        return evaluate(f, interpreter, probes, args, kwargs)

    trace_abstractly(run, params, args, dict(kwargs))
    for path in interpreter.findings.scaled:
        _check_codes(path, unbox(leaves[path]))
    shapes: dict[Path, Shape] = {
        path: tuple(sizes.get(axis, int(n)) for axis, n in enumerate(unbox(leaves[path]).shape))
        for path, sizes in interpreter.findings.lengths.items()
        if sizes
    }
    return {path: _most_work(seen) for path, seen in observations.items()}, shapes


def _probe(path: Path, w: FrozenWeight) -> LowRank:
    # One factor for each axis, so that every axis can be followed to where it ends, whatever reshapes merge or split.
    # The ones are never computed: the trace is abstract.
    factors = tuple(NamedArray(jnp.ones((1, n)), (RANK, axis)) for axis, n in enumerate(w.shape))
    return LowRank(w, (factors,), path, probe=True, pending=Pending() if _may_be_codes(w.dtype) else None)


def _may_be_codes(dtype: Dtype) -> bool:
    """Whether a program may dequantize a weight of this dtype: integers, or float8, to which it adds a scale."""
    return not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize == 1


def _check_codes(path: Path, weight: Array) -> None:
    """Raises if codes that the program scales are in a dtype that cannot be told from that of a weight."""
    if jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{path}: holds {weight.dtype} codes, which the net scales by itself, and merge cannot tell them "
            'from a weight. Quantize with lojax.quantize(params, "float8_e4m3fn") instead, or to codes that are '
            "integers."
        )


def _roles(probe: LowRank, summed: Sequence[int], batch: Sequence[int]) -> Axes:
    """The role of each axis of the weight in a product that sums some axes of the value and shares others."""

    def role(factor: NamedArray) -> Role:
        axes = [d for d in factor.dims if d != RANK]
        if any(d in summed for d in axes):
            return "in"
        # Summed wins: a reshape may have merged this axis with others, so its factor can have several axes.
        return "stack" if all(factor.size(d) == 1 or d in batch for d in axes) else "out"

    return tuple(role(factor) for factor in probe.terms[0])


def _most_work(observations: Sequence[Observation]) -> Axes:
    """The roles that let the most work stay factored; of two orientations, the one that the program uses first.

    ``x @ w`` and ``x @ w.T`` agree: either end of a factored weight can be summed first.
    """
    # An adapter has one set of axes. Uses that need another one may be materialized, so the most work decides.
    work: Counter[Hashable] = Counter()
    for observation in observations:
        work[_partition(observation.axes)] += observation.work
    best, _ = work.most_common(1)[0]
    return next(o.axes for o in observations if _partition(o.axes) == best)


def _partition(axes: Axes) -> Hashable:
    return frozenset(frozenset(i for i, role in enumerate(axes) if role == end) for end in ("in", "out"))
