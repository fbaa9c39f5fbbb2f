"""The evaluator: runs a jaxpr with low-rank values where its adapted weights were.

An equation without a low-rank operand is bound unchanged. For the others, one table maps the primitive to a rule (see
`rules`). A use without a rule, or for which the rule finds no factored form, is materialized.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Literal

from lojax.compat import opened
from lojax.lowrank.attach import ZeroWeight
from lojax.lowrank.factored import name_product
from lojax.lowrank.frozen import FrozenWeight, is_frozen
from lojax.lowrank.strategy import Product
from lojax.lowrank.value import LowRank, NotFactored
from lojax.rewrite.activations import Activations
from lojax.rewrite.foreign_codes import (
    Findings,
    Unscaled,
    evaluate_unsettled,
    in_floats,
    is_constant,
    is_unsettled,
    on_own_axes,
    settle,
    with_constants,
)
from lojax.rewrite.frozen_chains import Value, evaluate_chained, multiply_frozen
from lojax.rewrite.primitives import BODIES, CALLS, KEEPS_MIX, MOVERS, MULTIPLICATIONS
from lojax.rewrite.recorder import Recorder, Use
from lojax.types import Array, Eqn, Jaxpr, PyTree, Var

EquationRule = Callable[["Interpreter", Eqn, list[Value]], Any]
"""``rule(interpreter, equation, operands)``: the result, or a list of them. May raise `NotFactored`."""


class AdaptedProduct(Protocol):
    """A product with an adapted weight (`lowrank.dot`, `lookup`, `convolution`, `experts`)."""

    def contracted_axes(self, value: LowRank) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the weight that are summed, and those that are shared with a batch."""
        ...

    def frozen(self, value: LowRank) -> Array:
        """The product with the frozen part alone."""
        ...

    def compute(self, value: LowRank, execution: str) -> Product:
        """The product with the value, and the cost of its update."""
        ...


Observer = Callable[[LowRank, Sequence[int], Sequence[int], int], None]
"""``observer(probe, summed, batch, work)`` is called for each product with a probe, see `axis_inference`."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One run of one jaxpr. Only the interpreter uses it.

    Attributes:
        env: The value of each variable so far.
        producers: The equation that makes each variable.
        readers: The equations that read each variable; the end of the program is a reader, None.
        activations: The inputs of the products with factors.
        done: The ids of the equations that ran.
        precomputed: Results for equations that did not run yet, by the id of the equation (see `shared_pass`).
    """

    env: dict[Any, Value]
    producers: Mapping[Any, Eqn]
    readers: Mapping[Any, Sequence[Eqn | None]]
    activations: Activations
    # The jaxpr owns its equations for the whole run, so no two of them can have one id.
    done: set[int] = dataclasses.field(default_factory=set)
    precomputed: dict[int, Any] = dataclasses.field(default_factory=dict)

    def read(self, var: Var) -> Value:
        """The value of a variable or literal."""
        return var.val if isinstance(var, Literal) else self.env[var]


@dataclasses.dataclass
class Interpreter:
    """One evaluation of one program.

    Attributes:
        rules: The rule of each primitive, by its name.
        execution: What the user asked for, see `lowrank.strategy`.
        recorder: The record of uses.
        observer: Called for each product with a probe.
        naming: Whether products get their name for remat policies. JAX cannot transpose a named tangent.
        makes_weights: Whether the program makes adapted weights of codes, see `foreign_codes`.
        findings: What probes find out about them.
        straight_through: Whether it does so in a function whose derivative passes activations that it quantizes.
    """

    rules: Mapping[str, EquationRule]
    execution: str = "auto"
    recorder: Recorder = dataclasses.field(default_factory=Recorder)
    observer: Observer | None = None
    naming: bool = True
    makes_weights: bool = False
    findings: Findings = dataclasses.field(default_factory=Findings)
    straight_through: bool = False
    _frame: Frame | None = None
    _dropout_draws: int = 0
    _rewritten: dict[Any, tuple[Any, Any, Any, list[Use]]] = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Jaxpr, values: Sequence[Value], *, is_call: bool = False) -> list[Value]:
        """The outputs of ``jaxpr`` on ``values``; inputs and outputs may be `LowRank`.

        Outputs of a call that goes on as if its body stood in its place (``is_call``) may be `Unscaled` as well.
        """
        jaxpr, consts = opened(jaxpr)
        env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
        readers = _readers(jaxpr)
        producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        # Rules run bodies while their own equation is evaluated, so frames nest.
        outer, frame = self._frame, Frame(env, producers, readers, Activations(readers))
        self._frame = frame
        try:
            for eqn, dead_vars in zip(jaxpr.eqns, _last_uses(jaxpr), strict=True):
                self._evaluate_once(eqn)
                # Outside of jit each value is an array in memory: it is dropped after its last use, as when f runs
                # alone.
                for var in dead_vars:
                    if self.makes_weights and is_frozen(env.get(var)):
                        continue  # it is not an array yet, and `frozen_factor` may ask for it
                    env.pop(var, None)
                    frame.activations.drop(var)
            outputs = [frame.read(v) for v in jaxpr.outvars]
            return outputs if is_call else [v.dense() if isinstance(v, Unscaled) else v for v in outputs]
        finally:
            self._frame = outer

    @property
    def frame(self) -> Frame:
        """The innermost run."""
        assert self._frame is not None
        return self._frame

    def _evaluate_once(self, eqn: Eqn) -> None:
        """Evaluates an equation of the current jaxpr, unless it was evaluated early."""
        frame = self.frame
        if id(eqn) in frame.done:
            return
        # Before the equation is evaluated: a shared pass then looks for readers that did not run, and must not find
        # this.
        frame.done.add(id(eqn))
        operands = [frame.read(v) for v in eqn.invars]
        # Errors and profiles then show the user's line and scopes, and the equation sees the settings under which the
        # user wrote it (`jax.default_matmul_precision` and the like are in its context).
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
            results = self.evaluate(eqn, operands)
        frame.env.update(zip(eqn.outvars, results, strict=True))

    def evaluate(self, eqn: Eqn, operands: list[Value]) -> list[Value]:
        """The results of one equation."""
        name = eqn.primitive.name
        if self.makes_weights:
            made, operands = self._make_weights(eqn, operands)
            if made is not None:
                return [made]
        if any(is_frozen(v) for v in operands):
            if not any(isinstance(v, LowRank) for v in operands):
                chained = evaluate_chained(eqn, operands)
                if chained is not None:
                    return [chained]
                if name in MULTIPLICATIONS:
                    return [multiply_frozen(eqn, operands, functools.partial(bind_one, eqn))]
            if name not in BODIES and not any(is_unsettled(v) for v in operands):
                operands = [v.dense() if is_frozen(v) else v for v in operands]
        if not any(isinstance(v, (LowRank, Unscaled)) or is_frozen(v) for v in operands):
            if eqn.primitive.name == "sharding_constraint":
                self.frame.activations.record_constraint(eqn, operands[0])
            return bind(eqn, operands)
        if name not in KEEPS_MIX:
            operands = [v.absorb_mix() if isinstance(v, LowRank) else v for v in operands]
        operands = [self._with_own_dropout(v) for v in operands]
        try:
            if name not in self.rules:
                raise NotFactored(f"{name} is not linear in the weight")
            # Codes cannot hold an update: a product with them is factored in any case.
            is_pending = any(isinstance(v, LowRank) and v.pending for v in operands)
            if self.execution == "materialize" and name in MULTIPLICATIONS and not is_pending:
                raise NotFactored("execution='materialize' asks for it")
            results = self.rules[name](self, eqn, operands)
        except NotFactored as reason:
            return bind(eqn, [self.dense(v, eqn, str(reason)) for v in operands])
        return results if isinstance(results, list) else [results]

    def _make_weights(self, eqn: Eqn, operands: list[Value]) -> tuple[Value | None, list[Value]]:
        """The result of a step from codes to an adapted weight; for another equation None, and its operands for it."""
        name = eqn.primitive.name
        if is_constant(eqn):
            return evaluate_chained(eqn, operands), operands
        if name in CALLS:
            return None, with_constants(eqn, operands)
        if not any(is_unsettled(v) for v in operands):
            return None, operands
        if name in BODIES:
            return None, [on_own_axes(v, repr(name), self.findings) for v in operands]
        if name.startswith("custom_vjp"):
            return None, [v.dense() if isinstance(v, Unscaled) else v for v in operands]
        made = evaluate_unsettled(eqn, operands, functools.partial(bind_one, eqn), self.frozen_factor)
        if made is not None:
            return made, operands
        settings: dict[str, Any] = {"straight_through": self.straight_through}
        return None, [settle(eqn, v, operands, self.findings, **settings) for v in operands]

    def multiply(self, eqn: Eqn, value: LowRank, product: AdaptedProduct) -> Value:
        """The value of a product with an adapted weight, recorded as a use; for a probe, the frozen product."""
        if value.probe:
            y = product.frozen(value)
            if self.observer is not None:
                self.observer(value, *product.contracted_axes(value), y.size)
            return y
        if value.pending is None:
            result = product.compute(value, self.execution)
        else:  # the program scales the output, and the scale is for the codes alone
            update = dataclasses.replace(value, frozen=ZeroWeight(value.frozen.aval), pending=None)
            result = in_floats(product, eqn).compute(update, "factored")
        if self.execution == "kernel" and result.strategy != "kernel":
            self.recorder.no_kernel(value, eqn, result)
        else:
            self.recorder.product(value, eqn, result)
        y = name_product(result.value) if self.naming else result.value
        return y if value.pending is None else Unscaled(product.frozen(value), y)

    def dense(self, value: Value, eqn: Eqn | str, reason: str) -> Array:
        """``value`` as an array. A low-rank one is materialized, which the recorder records or, if strict, refuses."""
        if isinstance(value, Unscaled):
            return value.dense()
        if isinstance(value, LowRank):
            if value.pending and not value.probe and not jnp.issubdtype(value.frozen.dtype, jnp.floating):
                raise ValueError(
                    f"{value.path}: holds codes of dtype {value.frozen.dtype}, to which no update can be added, and "
                    f"the net uses them where that would have to be ({reason}). Take the weight out of targets."
                )
            return self.recorder.materialize(value, eqn, reason)
        return value.dense() if is_frozen(value) else value

    def dense_outputs(self, outputs: list[Value], may_stay: Sequence[bool] | None = None) -> list[Value]:
        """``outputs`` of a body, the low-rank ones materialized except those that may stay (None: none may)."""
        reason = "it leaves a control-flow body where a dense value is carried"
        stays = [False] * len(outputs) if may_stay is None else may_stay
        return [v if stay else self.dense(v, "output", reason) for v, stay in zip(outputs, stays, strict=True)]

    def _with_own_dropout(self, value: Value) -> Value:
        """``value`` with another dropout key for each use, so that no two uses of a weight drop the same entries."""
        if not isinstance(value, LowRank) or value.dropout is None:
            return value
        # A counter of the trace, which is the same in every trace of one program. Calls draw as well as products: two
        # calls of one function share its rewritten body, with the draws inside, and differ by the draw of the call
        # alone.
        self._dropout_draws += 1
        return dataclasses.replace(value, dropout=value.dropout.fold_in(self._dropout_draws))

    # --- questions of a rule about the program around its equation ---

    def producer(self, var: Var) -> Eqn | None:
        """The equation that makes ``var``; None for an input or a literal."""
        return None if isinstance(var, Literal) else self.frame.producers.get(var)

    def frozen_factor(self, var: Var) -> FrozenWeight | None:
        """The frozen factor of ``var``, if it is the product of one with something else."""
        producer = self.producer(var)
        if producer is None or producer.primitive.name != "mul":
            return None
        factors = [None if isinstance(v, Literal) else self.frame.env.get(v) for v in producer.invars]
        frozen = [v for v in factors if is_frozen(v) and jax.tree.leaves(v)]
        return frozen[0] if len(frozen) == 1 else None

    def pending_readers(self, var: Var) -> list[Eqn]:
        """The equations that read ``var`` and have not run."""
        if isinstance(var, Literal):
            return []
        return [e for e in self.frame.readers[var] if e is not None and id(e) not in self.frame.done]

    def value_ahead(self, var: Var) -> Value | None:
        """The value of ``var`` if it is low-rank, after evaluating the `MOVERS` that make it; else None."""
        frame, chain, root = self.frame, [], var
        while not isinstance(root, Literal) and root not in frame.env:
            eqn = frame.producers.get(root)
            if eqn is None or id(eqn) in frame.done or len(eqn.invars) != 1 or eqn.primitive.name not in MOVERS:
                return None
            chain.append(eqn)
            root = eqn.invars[0]
        # Nothing is evaluated early for a dense value: the chain is followed to its root first.
        if not isinstance(frame.read(root), LowRank):
            return None
        for eqn in reversed(chain):
            self._evaluate_once(eqn)
        return frame.read(var)

    def factor_input(self, var: Var, x: Array) -> Array:
        """``x``, the value of ``var``, for products with factors: one array for all of them (see `activations`)."""
        return self.frame.activations.get(var, x)

    def released_input(self, var: Var) -> Array | None:
        """The value of ``var`` for products with factors if a sharding constraint moved it, else None."""
        return None if isinstance(var, Literal) else self.frame.activations.get_released(var)

    def precompute(self, eqn: Eqn, result: Any) -> None:
        """Stores ``result`` for a later equation."""
        self.frame.precomputed[id(eqn)] = result

    def take_precomputed(self, eqn: Eqn) -> Any:
        """The result that an earlier equation computed for this one, or None."""
        return self.frame.precomputed.pop(id(eqn), None)

    # --- bodies ---

    def rewrite(
        self, jaxpr: Jaxpr, values: Sequence[Value], may_stay: Sequence[bool] | None = None
    ) -> tuple[Jaxpr, PyTree]:
        """``jaxpr`` over the leaves of ``values``, and the tree of its outputs. Traced once for each structure of them.

        Args:
            jaxpr: A closed jaxpr over dense values.
            values: Its operands, some low-rank.
            may_stay: Which outputs may stay low-rank; None for all.
        """
        leaves, tree = jax.tree.flatten(list(values))
        avals = tuple(jax.typeof(x) for x in leaves)
        # An id is safe as a key, because the entry refers to the jaxpr: no other object can get its id. So the calls of
        # one jitted function share one rewritten body.
        key = (id(jaxpr), tree, avals, None if may_stay is None else tuple(may_stay))
        if key not in self._rewritten:
            uses: list[Use] = []
            out_tree: Any = None

            def body(*leaves: Array) -> list[Array]:
                nonlocal out_tree
                with self.recorder.collect(uses):
                    outputs = self.run(jaxpr, jax.tree.unflatten(tree, leaves), is_call=may_stay is None)
                    outputs = outputs if may_stay is None else self.dense_outputs(outputs, may_stay)
                # A trace returns arrays only: the structure of the outputs leaves it by `nonlocal`.
                flat, out_tree = jax.tree.flatten(outputs)
                return flat

            self._rewritten[key] = (jaxpr, jax.make_jaxpr(body)(*avals), out_tree, uses)
        _, closed, out_tree, uses = self._rewritten[key]
        # Here and not in the trace: a body that is traced once is used at every call.
        self.recorder.replay(uses)
        return closed, out_tree


def bind(eqn: Eqn, operands: Sequence[Array]) -> list[Array]:
    """The results of the unchanged equation on dense operands."""
    # An equation of a `custom_jvp` or `custom_vjp` stores jaxprs where `bind` takes functions; `get_bind_params` makes
    # them.
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def bind_one(eqn: Eqn, *operands: Array) -> Array:
    """The only result of the unchanged equation on dense operands."""
    return bind(eqn, operands)[0]


def _readers(jaxpr: Any) -> dict[Any, list[Eqn | None]]:
    """The equations that read each variable; the end of the program is one reader, None."""
    readers: dict[Any, list[Eqn | None]] = defaultdict(list)
    for reader, variables in (*((eqn, eqn.invars) for eqn in jaxpr.eqns), (None, jaxpr.outvars)):
        # A set, because ``x * x`` is one reader of x.
        for v in {v for v in variables if not isinstance(v, Literal)}:
            readers[v].append(reader)
    return readers


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation, the variables that it reads or makes and that nothing after it reads."""
    read_later = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    dying: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        last = [v for v in eqn.invars if not isinstance(v, Literal) and v not in read_later]
        read_later.update(last)
        dying.append([*dict.fromkeys(last), *(v for v in eqn.outvars if v not in read_later)])
    return dying[::-1]
