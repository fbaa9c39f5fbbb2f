"""A Flax NNX module as a net. Its parameter tree is the plain nested dict of its `nnx.Param` values.

The module is read once and never touched again. What is not a parameter (batch statistics, rng keys and
counts, caches) rides along frozen; ask for ``mutable=`` to get what a call makes of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from lojax.adapters.paths import flatten, map_paths
from lojax.nets.params_check import call, fit


@dataclasses.dataclass(frozen=True, eq=False)
class NNXNet:
    """An NNX module, taken apart.

    Attributes:
        name: What errors call it.
        graphdef: Its structure and everything static.
        params: Its parameters. One that several layers share appears once, under its first path.
        state: All its other variables, likewise a plain nested dict of arrays.

    >>> import jax.numpy as jnp
    >>> net = open_nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> y, state = net.apply(net.params, jnp.ones((3, 2)), mutable=nnx.BatchStat)
    >>> sorted(net.params), sorted(state)
    (['bias', 'scale'], ['mean', 'var'])
    """

    name: str
    graphdef: Any
    params: Any
    state: Any

    def check(self, params: Any) -> None:
        """Raises unless ``params`` fits the module."""
        if isinstance(params, (nnx.Pytree, nnx.State)):
            raise TypeError(
                f"params is a {type(params).__name__}; the parameters of an NNX net are a plain nested dict of arrays. "
                "Pass model.params (or nnx.to_pure_dict(nnx.state(module, nnx.Param)))."
            )
        fit(params, flatten(self.params), self.name)

    def bind(self, params: Any) -> nnx.Module:
        """A new module that holds ``params``, everything else as it was at the start; shares no variable."""
        return self._module(params, None)

    def apply(
        self, params: Any, /, *args: Any, method: Any = None, mutable: Any = False, state: Any = None, **kwargs: Any
    ) -> Any:
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
        args, kwargs = copied((args, kwargs))
        outputs = call(module, method, args, kwargs)
        return outputs if mutable is False else (outputs, nnx.to_pure_dict(variables(module, mutable)))

    def _module(self, params: Any, state: Any) -> Any:
        self.check(params)
        given = flatten(params)
        params = map_paths(lambda path, _: given[path], self.params)
        return nnx.merge(self.graphdef, params, self._state(state))

    def _state(self, state: Any) -> Any:
        if state is None:
            return self.state
        given = flatten(nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state)
        unknown = given.keys() - flatten(self.state).keys()
        if unknown:
            raise ValueError(
                f"state holds {min(unknown)}, which {self.name} does not hold before the call. Pass a part of what "
                f"it holds ({', '.join(flatten(self.state)) or 'nothing'}); mutable=<an NNX filter> returns a part."
            )
        return map_paths(lambda path, leaf: given.get(path, leaf), self.state)


def open_nnx(module: nnx.Module) -> NNXNet:
    """Takes a module apart; later changes to it are not seen."""
    graphdef, params, state = nnx.split(module, nnx.Param, ...)
    return NNXNet(
        f"the nnx.Module {type(module).__name__}", graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(state)
    )


def variables(module: nnx.Module, which: Any = True) -> nnx.State:
    """The variables of ``module``, parameters apart, that an NNX filter picks."""
    return nnx.state(module, nnx.All(nnx.Not(nnx.Param), ... if which is True else which))


def copied(tree: Any) -> Any:
    """``tree`` with its NNX objects copied, so that a call under a trace may change them."""
    nodes = (nnx.Pytree, nnx.Variable)
    return jax.tree.map(
        lambda x: nnx.clone(x) if isinstance(x, nodes) else x, tree, is_leaf=lambda x: isinstance(x, nodes)
    )
