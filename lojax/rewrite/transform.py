"""The transform: a function of parameters becomes a function of ``(frozen, lora)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lojax.rewrite.rules  # noqa: F401  (which fills the table)
from lojax.adapters.adapter import is_adapter
from lojax.adapters.initializers import key_for
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import map_paths, path_of
from lojax.adapters.trees import check_pair
from lojax.compat import without_dead
from lojax.lowrank.strategy import checked_execution
from lojax.lowrank.value import LowRank, from_adapter
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.recorder import Use


def transform(f: Callable[..., Any], *, strict: bool = False, execution: str = "auto") -> Callable[..., Any]:
    """LoRA as a function transform: ``f(params, ...)`` becomes ``g(frozen, lora, ...)``.

    ``g`` computes ``f`` with every adapted weight ``W0`` replaced by ``W0 + scale * a @ b``, factored
    wherever its use allows. It composes with `jit`, `grad`, `vmap`, `scan`, `shard_map` like any pure
    function. No gradient flows to ``frozen``.

    Args:
        f: A function whose first argument is a parameter tree.
        strict: Raise where a use would have to form the weight, instead of forming it.
        execution: How products with the weights are computed. ``"factored"``: ``x W0 + (x A) B``, no weight-sized
            temporary. ``"fused"``: ``x (W0 + s A B)``, the sum rounded to the dtype of ``W0`` and built again in the
            backward pass, no weight-sized gradient; fewer operations and less memory traffic for many tokens;
            only for `dot_general` without dropout, what else there is stays factored. ``"auto"``: fused where it
            is as exact and costs less, factored otherwise (see `lojax.lowrank.strategy`). ``"materialize"``: plain
            automatic differentiation through ``W0 + s A B``.

    Returns:
        ``g(frozen, lora, *args, dropout_key=None, **kwargs)``.

    Raises:
        ValueError: ``execution`` is unknown, or is ``"materialize"`` with ``strict``.

    >>> f = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.ones((4, 3))}
    >>> from lojax import init
    >>> frozen, lora = init(jax.random.key(0), params, "w", rank=2)
    >>> transform(f)(frozen, lora, jnp.ones((1, 4))).tolist()
    [[4.0, 4.0, 4.0]]
    """

    execution = checked_execution(execution, strict)

    @functools.wraps(f, updated=())
    def adapted(frozen: Any, lora: Any, *args: Any, dropout_key: Any = None, **kwargs: Any) -> Any:
        interp = Interpreter(strict=strict, execution=execution)
        return evaluate(f, interp, lowrank_params(frozen, lora, dropout_key), args, kwargs)

    return adapted


def trace_uses(
    f: Callable[..., Any], frozen: Any, lora: Any, args: Any, kwargs: Any, *, execution: str = "auto"
) -> list[Use]:
    """What the engine does with each use of each adapted weight in ``f``, without computing anything."""
    interp = Interpreter(uses=[], execution=execution)

    def run(frozen: Any, lora: Any, args: Any, kwargs: Any) -> Any:
        return evaluate(f, interp, lowrank_params(frozen, lora, None), args, kwargs)

    abstractly(run, frozen, lora, args, kwargs)
    assert interp.uses is not None
    return interp.uses


def abstractly(f: Callable[..., Any], *trees: Any) -> Any:
    """Runs ``f(*trees)`` on shapes only. What is no array (flags, strings, None) is passed as it is."""
    leaves, tree = jax.tree.flatten(trees)
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def run(arrays: dict[int, Any]) -> Any:
        return f(*jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)]))

    return jax.eval_shape(run, arrays)


def lowrank_params(frozen: Any, lora: Any, dropout_key: Any) -> Any:
    """The parameter tree with a `LowRank` value at every adapted weight. No gradient reaches ``frozen``."""
    check_pair(frozen, lora)

    def join(path: str, weight: Any, trained: Any) -> Any:
        if is_adapter(trained):
            rate = trained.dropout
            key = key_for(dropout_key, path) if rate and dropout_key is not None else None
            w = jax.lax.stop_gradient(unbox(weight))
            return rebox(weight, from_adapter(path, w, trained, rate=rate, key=key))
        if trained is not None:
            return trained
        return None if weight is None else rebox(weight, _stopped(unbox(weight)))

    return map_paths(join, frozen, lora)


def _stopped(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x


def evaluate(f: Callable[..., Any], interp: Interpreter, params: Any, args: Any, kwargs: Any) -> Any:
    """``f(params, *args, **kwargs)`` with the low-rank values in ``params`` handled by ``interp``.

    ``args`` and ``kwargs`` are closed over: only the parameters are traced.
    """
    values, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, LowRank))
    avals = [jax.typeof(v.w if isinstance(v, LowRank) else v) for v in values]
    out_tree: Any = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal out_tree
        outputs = f(jax.tree.unflatten(tree, leaves), *args, **kwargs)
        found, out_tree = jax.tree_util.tree_flatten_with_path(outputs)
        return [_checked_output(keys, leaf) for keys, leaf in found]

    outputs = interp.run(without_dead(jax.make_jaxpr(flat)(*avals)), values)
    outputs = [interp.dense(v, "output", "the net returns the weight itself") for v in outputs]
    return jax.tree.unflatten(out_tree, outputs)


def _checked_output(keys: Any, leaf: Any) -> Any:
    try:
        jax.typeof(leaf)
    except TypeError:
        where = path_of(keys) or "(the whole output)"
        raise TypeError(
            f"The net returned a {type(leaf).__name__} at output {where}: {leaf!r}. An adapted net must "
            "return a tree of arrays; wrap a function that returns only those."
        ) from None
    return leaf
