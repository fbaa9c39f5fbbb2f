"""A Flax NNX module as a net. Its parameter tree is the plain nested dict of its `nnx.Param` values.

The module is read once and never touched again. What is not a parameter (batch statistics, rng keys and
counts, caches) rides along frozen; ask for ``mutable=`` to get what a call makes of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, TypeVar

import jax
from flax import nnx

from lojax.adapters.paths import flatten, map_paths
from lojax.nets.params_check import Method, call_method, check_params
from lojax.types import Params, PyTree

Filter: TypeAlias = Any
"""What NNX takes to pick variables: a type of variable, a predicate, a path, several of them, or True for all."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class NNXNet:
    """An NNX module, taken apart.

    Attributes:
        name: What errors call it.
        graphdef: Its structure and everything static.
        params: Its parameters. One that several layers share appears once, under its first path.
        state: All its other variables, likewise a plain nested dict of arrays.

    >>> import jax.numpy as jnp
    >>> net = from_nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> y, state = net.apply(net.params, jnp.ones((3, 2)), mutable=nnx.BatchStat)
    >>> sorted(net.params), sorted(state)
    (['bias', 'scale'], ['mean', 'var'])
    """

    name: str
    graphdef: nnx.GraphDef[Any]
    params: Params
    state: PyTree
    kind = "an NNX module"

    def check(self, params: Params) -> None:
        """Raises unless ``params`` fits the module."""
        if isinstance(params, (nnx.Pytree, nnx.State)):
            raise TypeError(
                f"params is a {type(params).__name__}; the parameters of an NNX net are a plain nested dict of arrays. "
                "Pass model.params (or nnx.to_pure_dict(nnx.state(module, nnx.Param)))."
            )
        check_params(params, flatten(self.params), self.name)

    def bind(self, params: Params) -> nnx.Module:
        """A new module that holds ``params``, everything else as it was at the start; shares no variable."""
        return self._module(params, None)

    def apply(
        self,
        params: Params,
        /,
        *args: object,
        method: Method = None,
        mutable: Filter = False,
        state: PyTree = None,
        **kwargs: object,
    ) -> PyTree:
        """What the module returns.

        Args:
            params: Its parameters.
            *args: Passed to the module. NNX objects among them (an `nnx.Rngs`) are copied: the call
                leaves the originals as they are.
            method: The method to call instead of the module: its name, or a function of the module.
            mutable: True, or an NNX filter such as `nnx.BatchStat`: return ``(outputs, state)``, where
                ``state`` is a plain nested dict of the variables, parameters apart, as the call left them.
            state: Such a dict, or a part of one, to start from instead of what the module held.
            **kwargs: Passed to the module.
        """
        module = self._module(params, state)
        args, kwargs = copy_objects((args, kwargs))
        outputs = call_method(module, method, args, kwargs)
        return outputs if mutable is False else (outputs, nnx.to_pure_dict(state_of(module, mutable)))

    def _module(self, params: Params, state: PyTree) -> nnx.Module:
        self.check(params)
        leaves = flatten(params)
        # By path, so that a checkpoint that made strings of a list's indices fits as well.
        params = map_paths(lambda path, _: leaves[path], self.params)
        return nnx.merge(self.graphdef, params, self._complete_state(state))

    def _complete_state(self, state: PyTree) -> PyTree:
        """The state that the module held, with the leaves of ``state`` in place of its own."""
        if state is None:
            return self.state
        leaves = flatten(nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state)
        unknown = leaves.keys() - flatten(self.state).keys()
        if unknown:
            raise ValueError(
                f"state holds {min(unknown)}, which {self.name} does not hold before the call. Pass a part of what "
                f"it holds ({', '.join(flatten(self.state)) or 'nothing'}); mutable=<an NNX filter> returns a part."
            )
        return map_paths(lambda path, leaf: leaves.get(path, leaf), self.state)


def from_nnx(module: nnx.Module) -> NNXNet:
    """Splits a module; later changes to it are not seen."""
    graphdef, params, state = nnx.split(module, nnx.Param, ...)
    name = f"the nnx.Module {type(module).__name__}"
    return NNXNet(name, graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(state))


def state_of(module: nnx.Module, which: Filter = True) -> nnx.State:
    """The variables of ``module`` that a filter picks, parameters apart."""
    return nnx.state(module, nnx.All(nnx.Not(nnx.Param), ... if which is True else which))


def copy_objects(tree: T) -> T:
    """``tree`` with its NNX objects copied.

    NNX forbids a trace to change a variable that was made outside of it (``TraceContextError``), and an `nnx.Rngs`
    among the arguments of a call changes whenever a key is drawn from it.
    """
    types = (nnx.Pytree, nnx.Variable)
    return jax.tree.map(
        lambda x: nnx.clone(x) if isinstance(x, types) else x, tree, is_leaf=lambda x: isinstance(x, types)
    )
