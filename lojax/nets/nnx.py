"""A Flax NNX module as a net. Its parameter tree is a plain nested dict of arrays.

The tree holds the values of its `nnx.Param` and, beside them, of its other variables that outlive a call: batch
statistics, moving averages, counters. Those are never trained. They ride along in ``frozen``, and so through `merge`
and `bind`: nothing that a module has gathered is lost on the way. A tree of the parameters alone serves as well; then
all else is as it was when the module was wrapped.

Rng streams, caches and intermediates belong to a call and not to the tree. Without ``state=`` they too are as they were
when the module was wrapped; ``mutable=`` returns what a call makes of them. The module is read once and never touched.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeVar

import jax
from flax import nnx

from lojax.adapters.paths import flatten, map_paths
from lojax.nets.nnx_state import (
    Filter,
    changed_counts,
    changed_statistics,
    depends_on,
    depends_on_inputs,
    drops,
    outlives_call,
    repeats,
    select,
    state_of,
)
from lojax.nets.params_check import Method, call_method, check_params
from lojax.types import Leaf, Params, Path, PyTree

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class NNXNet:
    """An NNX module, taken apart.

    Attributes:
        name: The name of its class.
        graphdef: Its structure and everything static.
        variables: The values of all its variables, a nested dict. One that several layers share appears once, under its
            first path.
        params: Those of the parameter tree: the parameters, and all else that outlives a call.
        state: Those that are not parameters, whatever they belong to.

    >>> import jax.numpy as jnp
    >>> net = from_nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> y, state = net.apply(net.params, jnp.ones((3, 2)), mutable=nnx.BatchStat)
    >>> sorted(net.params), sorted(state)
    (['bias', 'mean', 'scale', 'var'], ['mean', 'var'])
    """

    name: str
    graphdef: nnx.GraphDef[Any] = dataclasses.field(repr=False)
    variables: PyTree = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False)
    state: PyTree = dataclasses.field(repr=False)
    kind = "an NNX module"

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"the nnx.Module {self.name}"

    @property
    def state_paths(self) -> frozenset[Path]:
        """The paths in ``params`` that are not parameters."""
        return frozenset(flatten(self.params).keys() & flatten(self.state).keys())

    def check(self, params: Params) -> None:
        """Raises unless ``params`` fits the module."""
        if isinstance(params, (nnx.Pytree, nnx.State)):
            raise TypeError(
                f"params is a {type(params).__name__}; the parameters of an NNX net are a plain nested dict of arrays. "
                "Pass model.params (or nnx.to_pure_dict(nnx.state(module, nnx.Param)))."
            )
        state_paths = self.state_paths
        leaves = check_params(params, flatten(self.params), self.title, optional=state_paths)
        missing = sorted(state_paths - leaves.keys())
        if missing and len(missing) < len(state_paths):
            raise ValueError(
                f"params lacks {missing[0]} but holds other state of {self.title}. Pass all of it, as in model.params, "
                "or none of it."
            )

    def bind(self, params: Params, state: PyTree = None) -> nnx.Module:
        """A new module that holds ``params`` and shares no variable.

        Args:
            params: Its parameters.
            state: What ``mutable=`` returned, or a part of it, in place of what ``params`` and the module hold.
        """
        self.check(params)
        # By path, so that a checkpoint that made strings of a list's indices fits as well.
        values = flatten(params) | self._state_leaves(state)
        return nnx.merge(self.graphdef, map_paths(lambda path, leaf: values.get(path, leaf), self.variables))

    def apply(
        self,
        params: Params,
        /,
        *args: object,
        mutable: Filter = False,
        method: Method = None,
        state: PyTree = None,
        **kwargs: object,
    ) -> PyTree:
        """What the module returns.

        Args:
            params: Its parameters.
            *args: Passed to the module. NNX objects among them (an `nnx.Rngs`) are copied: the call
                leaves the originals as they are.
            mutable: True, or an NNX filter such as `nnx.BatchStat`: return ``(outputs, state)``, where
                ``state`` is a plain nested dict of the variables, parameters apart, as the call left them.
            method: The method to call instead of the module: its name, or a function of the module.
            state: Such a dict, or a part of one, to start from instead of what ``params`` and the module hold.
            **kwargs: Passed to the module.

        Warns:
            UserWarning: The outputs depend on an rng stream of the module whose count neither ``state`` nor
                ``mutable`` carries from call to call, so that every call draws the same numbers. Or the call computes
                new batch statistics, which neither of them carries.
        """
        outputs, module = self._call(params, *args, method=method, state=state, **kwargs)
        returned = None if mutable is False else select(module, mutable, self.title)
        given = self._state_leaves(state)
        carried = flatten(returned).keys() | given.keys()
        counts = {k: v for k, v in changed_counts(flatten(self.variables), module).items() if k not in carried}
        if counts:
            rerun = lambda counts: self._call(params, *args, method=method, state=given | counts, **kwargs)[0]
            for path in depends_on(rerun, counts)[:1]:
                warnings.warn(repeats(self.title, path), stacklevel=2)
        statistics = changed_statistics(flatten(self.variables) | flatten(params) | given, module)
        if dropped := {path: x for path, x in statistics.items() if path not in carried}:
            update = lambda x: self._call(params, *args, method=method, state=given | x, **kwargs)[1]
            if depends_on_inputs(lambda x: changed_statistics(x, update(x), new=True), dropped):
                warnings.warn(drops(self.title, min(dropped)), stacklevel=2)
        return outputs if mutable is False else (outputs, returned)

    def observe(self, params: Params, /, *args: object, mutable: Filter = False, **kwargs: Any) -> PyTree:
        """What `apply` returns, without its warning: for a caller who looks at the traced program alone."""
        outputs, module = self._call(params, *args, **kwargs)
        return outputs if mutable is False else (outputs, select(module, mutable, self.title))

    def _call(
        self, params: Params, /, *args: object, method: Method = None, state: PyTree = None, **kwargs: object
    ) -> tuple[PyTree, nnx.Module]:
        module = self.bind(params, state)
        args, kwargs = copy_objects((args, kwargs))
        return call_method(module, method, args, kwargs), module

    def _state_leaves(self, state: PyTree) -> dict[Path, Leaf]:
        """The leaves of ``state`` by path, or an error if the module holds no such variable."""
        leaves = flatten(nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state)
        leaves = {path: leaf for path, leaf in leaves.items() if leaf is not None}
        known = flatten(self.state)
        if unknown := leaves.keys() - known.keys():
            raise ValueError(
                f"state holds {min(unknown)}, which {self.title} does not hold before the call. Pass a part of what "
                f"it holds ({', '.join(known) or 'nothing'}); mutable=<an NNX filter> returns a part."
            )
        return leaves


def from_nnx(module: nnx.Module) -> NNXNet:
    """Takes a module apart; later changes to it are not seen."""
    graphdef, variables = nnx.split(module)
    params = nnx.state(module, nnx.Any(nnx.Param, outlives_call))
    values = [nnx.to_pure_dict(state) for state in (variables, params, state_of(module))]
    return NNXNet(type(module).__name__, graphdef, *values)


def copy_objects(tree: T) -> T:
    """``tree`` with its NNX objects copied.

    NNX forbids a trace to change a variable that was made outside of it (``TraceContextError``), and an `nnx.Rngs`
    among the arguments of a call changes whenever a key is drawn from it.
    """
    types = (nnx.Pytree, nnx.Variable)
    return jax.tree.map(
        lambda x: nnx.clone(x) if isinstance(x, types) else x, tree, is_leaf=lambda x: isinstance(x, types)
    )
