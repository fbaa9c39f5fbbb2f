"""The evaluation of a function of parameters where some of its parameters are low-rank values."""

from __future__ import annotations

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
from lojax.lowrank.value import LowRank, from_adapter
from lojax.rewrite.chain_sources import defer_chains
from lojax.rewrite.interpreter import Interpreter
from lojax.types import Key, Leaf, Params, Path, PyTree


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
        if trained is not None and not is_adapter(trained):
            return trained
        # Before the value is made: the norm of DoRA and every product then see a W0 without a tangent.
        own = frozen_leaf(weight)
        if trained is None:
            return own
        key = key_for(dropout_key, path) if trained.dropout and dropout_key is not None else None
        return rebox(weight, from_adapter(path, unbox(own), trained, key=key))

    return map_paths(join, frozen, lora)


def frozen_leaf(leaf: Leaf) -> Leaf:
    """A leaf of ``frozen`` as a `FrozenWeight`, in its box. No gradient reaches it."""
    return None if leaf is None else rebox(leaf, frozen_weight(jax.tree.map(_stop_gradient, unbox(leaf))))


def base_params(frozen: Params) -> Params:
    """The parameter tree without adapters: ``frozen`` alone, as it is."""
    return lowrank_params(frozen, map_paths(lambda *_: None, frozen), None)


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
