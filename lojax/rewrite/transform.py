"""The transform: a function of parameters becomes a function of ``(frozen, lora)``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lojax.adapters.adapter import is_adapter
from lojax.adapters.create import check_key
from lojax.adapters.initializers import key_for
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import map_paths, path_of
from lojax.adapters.trees import check_pair
from lojax.compat import remove_dead_equations
from lojax.lowrank.frozen import frozen_weight, is_frozen
from lojax.lowrank.strategy import check_execution
from lojax.lowrank.value import LowRank, from_adapter
from lojax.rewrite.chain_sources import defer_chains
from lojax.rewrite.constant_base import warn_if_frozen_is_constant
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.recorder import Recorder, Use
from lojax.rewrite.rules import RULES
from lojax.types import Key, Leaf, Params, Path, PyTree


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
            is as exact and costs less, factored otherwise (see `lojax.lowrank.strategy`). ``"materialize"``: plain
            automatic differentiation through ``W0 + s A B``.

    Returns:
        ``g(frozen, lora, *args, dropout_key=None, **kwargs)``.

    Raises:
        TypeError: ``f`` is not a function.
        ValueError: ``execution`` is unknown, or is ``"materialize"`` with ``strict``.

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
        frozen: Params, lora: Params, *args: PyTree, dropout_key: Key | None = None, **kwargs: PyTree
    ) -> PyTree:
        warn_if_frozen_is_constant(frozen, lora)
        interpreter = Interpreter(RULES, execution, Recorder(strict))
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
) -> list[Use]:
    """The uses of each adapted weight in ``f``, without computing anything."""
    check_pair(frozen, lora)
    uses: list[Use] = []
    interpreter = Interpreter(RULES, execution, Recorder(uses=uses))

    def run(frozen: Params, lora: Params, args: PyTree, kwargs: Mapping[str, Any]) -> PyTree:
        return evaluate(f, interpreter, lowrank_params(frozen, lora, None), args, kwargs)

    trace_abstractly(run, frozen, lora, args, kwargs)
    return uses


def trace_abstractly(f: Callable[..., PyTree], *trees: PyTree) -> PyTree:
    """Runs ``f(*trees)`` on shapes only. Leaves that are not arrays (flags, strings, None) are passed unchanged."""
    leaves, tree = jax.tree.flatten(trees)
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def run(arrays: dict[int, Any]) -> PyTree:
        return f(*jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)]))

    return jax.eval_shape(run, arrays)


def lowrank_params(frozen: Params, lora: Params, dropout_key: Key | None) -> Params:
    """The parameter tree with a `LowRank` at every adapted weight and a `FrozenWeight` at every other frozen leaf.

    No gradient reaches ``frozen``.
    """
    check_pair(frozen, lora)
    if dropout_key is not None:
        check_key(dropout_key, "dropout_key takes a PRNG key, a new one for each call.")

    def join(path: Path, weight: Leaf, trained: Leaf) -> Leaf:
        if is_adapter(trained):
            key = key_for(dropout_key, path) if trained.dropout and dropout_key is not None else None
            # Before the value is made: the norm of DoRA and every product then see a W0 without a tangent.
            w = jax.tree.map(_stop_gradient, unbox(weight))
            return rebox(weight, from_adapter(path, frozen_weight(w), trained, key=key))
        if trained is not None:
            return trained
        return None if weight is None else rebox(weight, frozen_weight(jax.tree.map(_stop_gradient, unbox(weight))))

    return map_paths(join, frozen, lora)


def _stop_gradient(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x


def evaluate(
    f: Callable[..., PyTree], interpreter: Interpreter, params: Params, args: PyTree, kwargs: Mapping[str, Any]
) -> PyTree:
    """``f(params, *args, **kwargs)`` with the low-rank values in ``params`` handled by ``interpreter``.

    ``args`` and ``kwargs`` are closed over: only the parameters are traced.
    """
    # Closed over, because they may be what a trace does not take: flags, strings, modules, numbers to branch on.
    # Tracers of a jit, grad or vmap around this call become constants of the jaxpr, and are bound like any other value.
    values, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, LowRank) or is_frozen(x))
    avals = [v.frozen.aval if isinstance(v, LowRank) else v.aval if is_frozen(v) else jax.typeof(v) for v in values]
    out_tree: Any = None

    # The whole tree is one argument: JAX's errors then say of which parameter a traced value came, params['w'].
    def flat(params: Params) -> list[Any]:
        nonlocal out_tree
        outputs = f(params, *args, **kwargs)
        paths_and_leaves, out_tree = jax.tree_util.tree_flatten_with_path(outputs)
        return [_check_output(keys, leaf) for keys, leaf in paths_and_leaves]

    flat.__name__ = flat.__qualname__ = getattr(f, "__name__", type(f).__name__)  # for JAX's errors and profiles
    # The interpreter binds every equation, so a dead one would cost time outside of jit, count as a use in reports, and
    # might raise in strict mode.
    program = remove_dead_equations(jax.make_jaxpr(flat)(jax.tree.unflatten(tree, avals)))
    interpreter.makes_weights = any(isinstance(v, LowRank) and v.pending for v in values)
    outputs = interpreter.run(program, defer_chains(program, values))
    outputs = [interpreter.dense(v, "output", "the net returns the weight itself") for v in outputs]
    return jax.tree.unflatten(out_tree, outputs)


def _check_output(keys: tuple[Any, ...], leaf: Any) -> Any:
    """``leaf``, an output of the net; raises unless it is an array."""
    try:
        jax.typeof(leaf)
    except TypeError:
        where = path_of(keys) or "(the whole output)"
        raise TypeError(
            f"The net returned a {type(leaf).__name__} at output {where}: {leaf!r}. An adapted net must "
            "return a tree of arrays; wrap a function that returns only those."
        ) from None
    return leaf
