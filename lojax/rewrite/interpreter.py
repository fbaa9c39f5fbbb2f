"""The evaluator: runs a jaxpr with low-rank values where its adapted weights were.

An equation none of whose operands is low-rank is bound as it stands. For the others one table maps the
primitive to a rule (`rules` for products and carriers, `structure` for control flow and calls); where
there is no rule, or the rule finds no factored form, that one use is materialized and recorded.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
from jax.extend import source_info_util
from jax.extend.core import Literal

from lojax.compat import opened
from lojax.lowrank import products
from lojax.lowrank.named_array import RANK
from lojax.lowrank.opaque import named
from lojax.lowrank.products import Product
from lojax.lowrank.value import SIDE_BY_SIDE, LowRank, NotFactored
from lojax.rewrite.activations import Apart
from lojax.rewrite.recorder import MaterializedError, Use


class Products(Protocol):
    """Who computes a product with an adapted weight (`products`), or watches it (`infer.Watch`)."""

    dot: Callable[..., Product]
    gather: Callable[..., Product | LowRank]
    conv: Callable[..., Product]
    ragged_dot: Callable[..., Product]


COUNTED = ("flops", "extra_flops", "extra_bytes")
"""What of a `Use` adds up over trips, and is shared by weights side by side."""
EquationRule = Callable[["Interpreter", Any, list[Any]], Any]
RULES: dict[str, EquationRule] = {}
"""The rule of each primitive, by its name. Filled by `rules` and `structure`."""
PRODUCTS = ("dot_general", "gather", "conv_general_dilated", "ragged_dot_general")
"""The primitives that compute a product with the weight."""
CARRIERS = ("convert_element_type", "reshape", "transpose", "squeeze", "copy", "name", "sharding_constraint")
"""Primitives of one operand that move, cast or place a weight: they may run ahead of their turn."""


def rule(*names: str) -> Callable[[EquationRule], EquationRule]:
    """Registers a function as the rule of the primitives called ``names``."""

    def register(f: EquationRule) -> EquationRule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


@dataclasses.dataclass(frozen=True)
class Frame:
    """One run of one jaxpr.

    Attributes:
        jaxpr: What runs.
        env: The values there are.
        readers: The equations that read each variable, and the end of the program.
        apart: The activations as the factors meet them.
        done: The equations that ran, by id.
        given: Updates computed ahead of their product, by the id of its equation (see `siblings`).
    """

    jaxpr: Any
    env: dict[Any, Any]
    readers: dict[Any, list[Any]]
    apart: Apart
    done: set[int] = dataclasses.field(default_factory=set)
    given: dict[int, Any] = dataclasses.field(default_factory=dict)

    def read(self, var: Any) -> Any:
        """The value of a variable or literal."""
        return var.val if isinstance(var, Literal) else self.env[var]

    def maker(self, var: Any) -> Any:
        """The equation that makes ``var``; None for an input or a literal."""
        return next((eqn for eqn in self.jaxpr.eqns if any(v is var for v in eqn.outvars)), None)


@dataclasses.dataclass
class Interpreter:
    """One evaluation of one program.

    Attributes:
        products: Who computes the products.
        strict: Whether a materialized use is an error.
        execution: How products are to be computed, see `cost`.
        uses: What was done with each use, in program order; None to keep no record.
        naming: Whether products get their name for remat policies; values that are tangents cannot have one.
    """

    products: Products = products  # type: ignore[assignment]
    strict: bool = False
    execution: str = "auto"
    uses: list[Use] | None = None
    naming: bool = True
    frame: Frame = dataclasses.field(init=False)
    _draws: int = 0
    _rewritten: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of ``jaxpr`` on ``values``; inputs and outputs may be `LowRank`."""
        jaxpr, consts = opened(jaxpr)
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
        dying, readers = _last_uses(jaxpr), _readers(jaxpr)
        outer, frame = getattr(self, "frame", None), Frame(jaxpr, env, readers, Apart(readers))
        self.frame = frame
        try:
            for eqn, dead in zip(jaxpr.eqns, dying, strict=True):
                self._advance(eqn)
                for var in dead:
                    env.pop(var, None)
                    frame.apart.drop(var)
        finally:
            if outer is not None:
                self.frame = outer
        return [frame.read(v) for v in jaxpr.outvars]

    def _advance(self, eqn: Any) -> None:
        """Runs an equation of the current jaxpr, unless it ran already."""
        if id(eqn) in self.frame.done:
            return
        self.frame.done.add(id(eqn))
        operands = [self.frame.read(v) for v in eqn.invars]
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
            results = self.evaluate(eqn, operands)
        self.frame.env.update(zip(eqn.outvars, results, strict=True))

    def ahead(self, var: Any) -> Any:
        """The value of ``var`` if it is low-rank, there or to be had by operations of one operand; else None."""
        chain, root = [], var
        while not isinstance(root, Literal) and root not in self.frame.env:
            eqn = self.frame.maker(root)
            if eqn is None or id(eqn) in self.frame.done or len(eqn.invars) != 1 or eqn.primitive.name not in CARRIERS:
                return None
            chain.append(eqn)
            root = eqn.invars[0]
        if not isinstance(self.frame.read(root), LowRank):
            return None
        for eqn in reversed(chain):
            self._advance(eqn)
        return self.frame.read(var)

    def evaluate(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The results of one equation."""
        if not any(isinstance(v, LowRank) for v in operands):
            if eqn.primitive.name == "sharding_constraint":
                self.frame.apart.placed(eqn, operands[0])
            return bind(eqn, operands)
        operands = [self._redrawn(v) for v in operands]
        try:
            if eqn.primitive.name not in RULES:
                raise NotFactored(f"{eqn.primitive.name} is not linear in the weight")
            if self.execution == "materialize" and eqn.primitive.name in PRODUCTS:
                raise NotFactored("execution='materialize' asks for it")
            return _as_list(RULES[eqn.primitive.name](self, eqn, operands))
        except NotFactored as reason:
            return bind(eqn, [self.dense(v, eqn, str(reason)) for v in operands])

    def apart(self, var: Any, x: Any) -> Any:
        """``x``, the value of ``var``, as the factors of all weights that meet it have it (see `apart`)."""
        return self.frame.apart.of(var, x)

    def _redrawn(self, value: Any) -> Any:
        """``value`` with a dropout key of its own, so that no two uses of a weight drop the same."""
        if not isinstance(value, LowRank) or value.key is None:
            return value
        self._draws += 1
        return dataclasses.replace(value, key=jax.random.fold_in(value.key, self._draws))

    def dense(self, value: Any, eqn: Any, reason: str) -> Any:
        """``value`` as an array; a low-rank one is materialized, recorded, and refused if strict."""
        if not isinstance(value, LowRank):
            return value
        if not value.probe:
            name = eqn if isinstance(eqn, str) else eqn.primitive.name
            use = Use(value.path, name, "materialized", reason=reason)
            if self.strict:
                raise MaterializedError(dataclasses.replace(use, where=_where(eqn)), value.shape)
            self._note(use, eqn, value)
        return value.dense()

    def record(self, value: LowRank, eqn: Any, product: Product) -> Any:
        """The value of a ``product`` that was not materialized, noted as a use of ``value``."""
        if not value.probe:
            use = Use(
                value.path, eqn.primitive.name, product.how, product.flops, product.extra_flops, product.extra_bytes
            )
            self._note(use, eqn, value)
            return named(product.value) if self.naming else product.value
        return product.value

    def _note(self, use: Use, eqn: Any, value: LowRank) -> None:
        """Adds ``use`` to the record, shared out among the weights that make up ``value``."""
        if self.uses is None:
            return
        if use.how == "materialized":
            rank = sum(x.size(RANK) for x in value.factors[::2])
            size = value.w.size
            use = dataclasses.replace(use, extra_flops=2 * size * rank, extra_bytes=size * value.w.dtype.itemsize)
        paths, where = value.path.split(SIDE_BY_SIDE), _where(eqn)
        share = {name: getattr(use, name) // len(paths) for name in COUNTED}
        self.uses += [dataclasses.replace(use, path=path, where=where, **share) for path in paths]

    @contextmanager
    def repeated(self, trips: int) -> Iterator[None]:
        """Uses recorded inside happen ``trips`` times; zero for a trial that counts for nothing."""
        outer, self.uses = self.uses, None if self.uses is None else []
        try:
            yield
        finally:
            inner, self.uses = self.uses, outer
            if trips and outer is not None and inner is not None:
                outer += [dataclasses.replace(u, **{name: getattr(u, name) * trips for name in COUNTED}) for u in inner]

    def fresh(self) -> None:
        """Forgets the uses of an earlier tracing of the same body (see `repeated`)."""
        if self.uses is not None:
            self.uses.clear()

    def rewrite(self, jaxpr: Any, values: Sequence[Any], keep: Sequence[bool] | None = None) -> tuple[Any, Any]:
        """``jaxpr`` over the leaves of ``values``, and the tree of its outputs. Traced once for each form.

        Args:
            jaxpr: A closed jaxpr over dense values.
            values: Its operands, some low-rank.
            keep: Which outputs may stay low-rank; None for all.
        """
        leaves, tree = jax.tree.flatten(list(values))
        avals = tuple(jax.typeof(x) for x in leaves)
        key = (id(jaxpr), tree, avals, None if keep is None else tuple(keep))
        if key not in self._rewritten:
            out_tree: Any = None

            def body(*leaves: Any) -> list[Any]:
                nonlocal out_tree
                self.fresh()
                outputs = self.run(jaxpr, jax.tree.unflatten(tree, leaves))
                outputs = self.densed(outputs, keep)
                flat, out_tree = jax.tree.flatten(outputs)
                return flat

            with self.repeated(1):
                closed = jax.make_jaxpr(body)(*avals)
                uses = list(self.uses or ())
            self._rewritten[key] = (jaxpr, closed, out_tree, uses)
        else:
            if self.uses is not None:
                self.uses += self._rewritten[key][3]
        return self._rewritten[key][1:3]

    def densed(self, outputs: list[Any], keep: Sequence[bool] | None) -> list[Any]:
        """``outputs`` with those that may not stay low-rank materialized."""
        if keep is None:
            return outputs
        reason = "it leaves a control-flow body where a dense value is carried"
        return [v if k else self.dense(v, "output", reason) for v, k in zip(outputs, keep, strict=True)]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The equation as it stands, on dense operands."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def _as_list(results: Any) -> list[Any]:
    return results if isinstance(results, list) else [results]


def _where(eqn: Any) -> str:
    return "" if isinstance(eqn, str) else source_info_util.summarize(eqn.source_info)


def _readers(jaxpr: Any) -> dict[Any, list[Any]]:
    """The equations that read each variable; the end of the program is one reader, None."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for reader, variables in (*((eqn, eqn.invars) for eqn in jaxpr.eqns), (None, jaxpr.outvars)):
        for v in {v for v in variables if not isinstance(v, Literal)}:
            found[v].append(reader)
    return found


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation, the variables that nothing after it reads."""
    seen = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    dying: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        last = [v for v in eqn.invars if not isinstance(v, Literal) and v not in seen]
        seen.update(last)
        dying.append([*dict.fromkeys(last), *(v for v in eqn.outvars if v not in seen)])
    return dying[::-1]
