"""The transform: a function of parameters becomes a function of ``(frozen, lora)``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lojax.adapters.adapter import is_adapter
from lojax.adapters.trees import check_pair
from lojax.lowrank.strategy import check_execution
from lojax.rewrite.batch_axes import BatchAxes
from lojax.rewrite.constant_base import warn_if_frozen_is_constant
from lojax.rewrite.evaluate import base_params, evaluate, lowrank_params, trace_abstractly
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.mixed_batch import MixedBatch, mixed_batch
from lojax.rewrite.recorder import Recorder, Use
from lojax.rewrite.row_choice import check_invocation
from lojax.rewrite.rules import RULES
from lojax.types import Key, Params, PyTree


def transform(f: Callable[..., PyTree], *, strict: bool = False, execution: str = "auto") -> Callable[..., PyTree]:
    """LoRA as a function transform: ``f(params, ...)`` becomes ``g(frozen, lora, ...)``.

    ``g`` computes ``f`` with every adapted weight ``W0`` replaced by ``W0 + scale * a @ b``, factored
    wherever its use allows. It composes with `jit`, `grad`, `vmap`, `scan`, `shard_map` like any pure
    function. No gradient flows to ``frozen``. Under `jit`, pass ``frozen`` as an argument: captured, it becomes
    constants of the program.

    ``g`` traces ``f`` at every call, under `jit` or not: print values with `jax.debug.print`.

    Args:
        f: A function whose first argument is a parameter tree.
        strict: Raise if a use would materialize the weight, instead of materializing it.
        execution: How products with the weights are computed. ``"factored"``: ``x W0 + (x A) B``, no weight-sized
            temporary. ``"fused"``: ``x (W0 + s A B)``, the sum rounded to the dtype of ``W0`` and recomputed in the
            backward pass, no weight-sized gradient; fewer operations and less memory traffic for many tokens;
            only for `dot_general` without dropout, all other uses stay factored. ``"auto"``: fused where it
            is as exact and costs less, factored otherwise (see `lojax.lowrank.strategy`). ``"kernel"``:
            factored, by a Pallas kernel in programs for one GPU or one TPU; no device has timed these kernels yet.
            What has none is factored, as the report says, or an error with ``strict``. ``"materialize"``: plain
            automatic differentiation through ``W0 + s A B``.

    Returns:
        ``g(frozen, lora, *args, dropout_key=None, **kwargs)``, which also takes ``adapter=``, ``active=``,
        ``batch_axes=`` and ``check_rows=`` as `lojax.Model.apply` does.

    Raises:
        TypeError: ``f`` is not a function.
        ValueError: ``execution`` is unknown, or is ``"materialize"`` with ``strict``.

    >>> import jax.numpy as jnp
    >>> f = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.ones((4, 3))}
    >>> from lojax import init
    >>> frozen, lora = init(jax.random.key(0), params, "w", rank=2)
    >>> transform(f)(frozen, lora, jnp.ones((1, 4))).tolist()
    [[4.0, 4.0, 4.0]]
    """

    execution = check_execution(execution, strict)
    if not callable(f):
        raise TypeError(f"transform takes a function f(params, ...), got {f!r}. For a module, use lojax.wrap.")

    @functools.wraps(f, updated=())
    def adapted(
        frozen: Params,
        lora: Params | None,
        *args: PyTree,
        dropout_key: Key | None = None,
        adapter: Any = None,
        active: Any = None,
        batch_axes: BatchAxes = 0,
        check_rows: bool = True,
        **kwargs: PyTree,
    ) -> PyTree:
        if lora is not None:
            warn_if_frozen_is_constant(frozen, lora)
        mixed = mixed_batch(lora, adapter, active, batch_axes, check_rows)
        if mixed is not None:
            interpreter = Interpreter(RULES, mixed_execution(execution), Recorder(strict))
            return mixed.evaluate(f, interpreter, frozen, args, kwargs, dropout_key)
        chosen = mixed_execution(execution) if is_mapped(lora) else execution
        interpreter = Interpreter(RULES, chosen, Recorder(strict))
        if lora is None:
            return evaluate(f, interpreter, base_params(frozen), args, kwargs)
        check_invocation(lora)
        return evaluate(f, interpreter, lowrank_params(frozen, lora, dropout_key), args, kwargs)

    return adapted


def trace_uses(
    f: Callable[..., PyTree],
    frozen: Params,
    lora: Params,
    args: PyTree,
    kwargs: Mapping[str, Any],
    *,
    execution: str = "auto",
    mixed: MixedBatch | None = None,
) -> list[Use]:
    """The uses of each adapted weight in ``f``, without computing anything.

    With ``mixed``, ``lora`` is its bank, and the uses are those of all rows.
    """
    uses: list[Use] = []
    interpreter = Interpreter(RULES, execution if mixed is None else mixed_execution(execution), Recorder(uses=uses))

    def run(frozen: Params, lora: Params, args: PyTree, kwargs: Mapping[str, Any]) -> PyTree:
        if mixed is not None:
            return dataclasses.replace(mixed, bank=lora).evaluate(f, interpreter, frozen, args, kwargs)
        return evaluate(f, interpreter, lowrank_params(frozen, lora, None), args, kwargs)

    if mixed is None:
        check_pair(frozen, lora)
    trace_abstractly(run, frozen, lora, args, kwargs)
    return uses


def is_mapped(lora: Params | None) -> bool:
    """Whether ``lora`` is one of many that `jax.vmap` maps over, as far as its maker says so (``entries=()``)."""
    return any(is_adapter(leaf) and leaf.entries == () for leaf in jax.tree.leaves(lora, is_leaf=is_adapter))


def mixed_execution(execution: str) -> str:
    """How the rows of a mixed batch, or mapped adapters, are computed: a fused product would form a weight for each."""
    return "factored" if execution == "auto" else execution
