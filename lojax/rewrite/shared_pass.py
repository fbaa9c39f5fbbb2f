"""Weights that meet one activation (q, k and v; gate and up) share the pass over it.

``x A_q``, ``x A_k`` and ``x A_v`` are one product with the A's side by side, ``x [A_q | A_k | A_v]``, whose result is
cut. The activation is then read once for all of them, in the backward pass too, where the cotangent that the updates
send to it is one product as well. Measured by `benchmarks/shared_pass.py`.

At the first of such products the program is searched for the others. Their weights must be there, or need only
operations of one operand (a cast, a reshape), which are then evaluated ahead of their turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from lojax.lowrank.factored import compute_dtype, ends, product_of
from lojax.lowrank.named_array import RANK, Name, Named, cast, on_explicit_axes
from lojax.lowrank.opaque import one_step
from lojax.lowrank.products import Meeting, chosen, meeting
from lojax.lowrank.value import LowRank, NotFactored

if TYPE_CHECKING:
    from lojax.rewrite.interpreter import Interpreter


@dataclasses.dataclass(frozen=True)
class Sibling:
    """One of the products.

    Attributes:
        eqn: Its equation.
        met: How the activation meets the weight.
        first: The factor that meets the activation, its axes called as those of the activation ``("x", i)``, `RANK`
            last.
        second: The other factor.
        key: What must be equal for two products to share a pass.
    """

    eqn: Any
    met: Meeting
    first: Named
    second: Named
    key: Hashable


def update_of(interp: Interpreter, eqn: Any, on_left: bool, x: Any) -> Any:
    """The update of a product with an adapted weight, computed with those of its siblings; None if it has none."""
    var = eqn.invars[on_left]
    if id(eqn) in interp.frame.given:
        return interp.frame.given.pop(id(eqn))
    readers = () if isinstance(var, Literal) else interp.frame.readers[var]
    if len(readers) < 2 or (mine := _sibling(interp, eqn, var, x)) is None:
        return None
    later = (_sibling(interp, e, var, x) for e in readers if e is not None and id(e) not in interp.frame.done)
    group = [mine, *(s for s in later if s is not None and s.key == mine.key)]
    if len(group) < 2:
        return None
    updates = together(interp.apart(var, x), group)
    interp.frame.given.update({id(s.eqn): u for s, u in zip(group[1:], updates[1:], strict=True)})
    return updates[0]


def _sibling(interp: Interpreter, eqn: Any, var: Any, x: Any) -> Sibling | None:
    """The product of ``eqn``, if it is one that can share a pass over ``x``."""
    if eqn.primitive.name != "dot_general" or eqn.invars[0] is eqn.invars[1] or on_explicit_axes(x):
        return None
    on_left = eqn.invars[1] is var
    value = interp.ahead(eqn.invars[not on_left])
    if not isinstance(value, LowRank) or value.probe or value.watching or value.key is not None:
        return None
    p = eqn.params
    dtype = p["preferred_element_type"]
    try:
        met = meeting(x.ndim, value.w.ndim, p["dimension_numbers"], on_left, p["precision"])
        named = Named(x, met.dims)
        first, second, gone = ends(named, value.factors, met.out)
    except NotFactored:
        return None
    names = [d for d in met.dims if not isinstance(d, tuple)]
    plain = len(value.factors) == 2 and {*first.dims} == {*gone, RANK} and {*names} == {*gone}
    known = {*first.dims, *second.dims} >= {*range(value.w.ndim)}
    if not (plain and known) or (value.gain is not None and not {*value.gain.dims} <= {*met.out}):
        return None
    if chosen(named, value, met.out, interp.execution, precision=met.precision, dtype=dtype)[1] == "fused":
        return None
    places: dict[Name, Name] = {d: ("x", i) for i, d in enumerate(met.dims) if d in names}
    first = first.ordered([*names, RANK]).renamed(places)
    return Sibling(eqn, met, first, second, (tuple(places.values()), met.precision, dtype))


def together(x: Any, siblings: Sequence[Sibling]) -> list[Any]:
    """The update of each product, in the dtype of its result.

    Args:
        x: The activation.
        siblings: Products of equal key.
    """
    summed, precision, dtype = siblings[0].key  # type: ignore[misc]
    kind = compute_dtype(x, dtype)
    dims: tuple[Name, ...] = tuple(("x", i) for i in range(x.ndim))
    middle = [*(d for d in dims if d not in summed), RANK]
    settings = {"precision": precision, "dtype": dtype}

    def meet(x: Any, factors: Sequence[Named]) -> list[Any]:
        axis = factors[0].axis(RANK)
        side_by_side = jnp.concatenate([cast(factor, kind).array for factor in factors], axis)
        inner = product_of(
            Named(x, dims), dataclasses.replace(factors[0], array=side_by_side), middle, kind, **settings
        )
        return list(lax.split(inner, [factor.size(RANK) for factor in factors], axis=inner.ndim - 1))

    def spread(sibling: Sibling) -> Any:
        like = sibling.eqn.outvars[0].aval

        def f(inner: Any, factor: Named) -> Any:
            y = product_of(Named(inner, tuple(middle)), factor, sibling.met.out, kind, **settings)
            return y.astype(like.dtype)

        return f

    step = one_step(meet, [spread(s) for s in siblings])
    return step(x, [s.first for s in siblings], [s.second for s in siblings])
