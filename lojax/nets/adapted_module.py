"""An adapted NNX net as an `nnx.Module` of its own, for trainers that expect one.

Its trained arrays are `nnx.LoRAParam` and nothing else is, so ``nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)``
and ``nnx.value_and_grad(..., argnums=nnx.DiffState(0, nnx.LoRAParam))`` train exactly what ``lora`` holds.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
from flax import nnx, traverse_util

from lojax.adapters.adapter import Adapter, array_axes, is_adapter
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.trees import check_pair
from lojax.nets.net import Net
from lojax.nets.nnx import NNXNet, copy_objects, from_nnx
from lojax.nets.nnx_state import state_of
from lojax.nets.params_check import Method, call_method
from lojax.rewrite.transform import transform
from lojax.types import Array, Key, Params, Path, PyTree

TreeDef: TypeAlias = Any
"""What `jax.tree.structure` returns; JAX exports no type for it."""


class AdaptedModule(nnx.Module):
    """A net with its adapters. Calls return what the net returns, and leave its state as the net would.

    Attributes with other names than these are those of ``net``; its methods run adapted.

    Attributes:
        net: The net as a module of the user's own class: ``train()``, ``eval()`` and batch statistics work as ever.
            Its frozen parameters are `nnx.Param`, those trained in full `nnx.LoRAParam`.
        lora: For every adapted weight a dict of `nnx.LoRAParam`, ``lora_a`` and ``lora_b`` (``lora_magnitude`` with
            DoRA), under its path. An ``a`` that stays as it is (LoRA-FA) is an `nnx.Param`.
        rngs: Where the keys for dropout on the adapters' inputs come from, or None for no such dropout.
        deterministic: True turns that dropout off; ``eval()`` sets it.
    """

    def __init__(
        self, net: nnx.Module, adapters: dict[Path, Adapter], *, strict: bool, execution: str, rngs: nnx.Rngs | None
    ):
        weights = _parameters(net)
        variables = {tuple(path.split("/")): _variables(adapter, weights[path]) for path, adapter in adapters.items()}
        self.net = net
        self.lora = nnx.data(traverse_util.unflatten_dict(variables))
        self.treedefs = nnx.static(tuple((path, jax.tree.structure(adapter)) for path, adapter in adapters.items()))
        self.strict = strict
        self.execution = execution
        self.rngs = rngs
        self.deterministic = False

    def pair(self) -> tuple[Params, Params]:
        """``(frozen, lora)`` as they are now: for `Model.apply`, `merge` and `save`.

        Batch statistics and whatever else outlives a call are in ``frozen``, as the calls so far have left them.
        """
        adapters = self._adapters()
        trained_paths = {path for path, variable in _parameters(self.net).items() if _trains(variable)}
        params = from_nnx(self.net).params
        frozen = map_paths(lambda path, leaf: None if path in trained_paths else leaf, params)
        lora = map_paths(lambda path, leaf: leaf if path in trained_paths else adapters.get(path), params)
        return frozen, lora

    def __call__(
        self, *args: object, dropout_key: Key | None = None, method: Method = None, **kwargs: object
    ) -> PyTree:
        """What the net returns with its weights adapted.

        Args:
            *args: Passed to the net.
            dropout_key: A PRNG key for dropout on the adapters' inputs, instead of one from ``rngs``.
            method: The method to call instead of the net: its name, or a function of the net.
            **kwargs: Passed to the net.
        """
        if dropout_key is None and self.rngs is not None and not self.deterministic:
            dropout_key = self.rngs.dropout()
        pure_net = from_nnx(self.net)

        def run(params: Params, *args: object, **kwargs: object) -> tuple[PyTree, nnx.State]:
            net = pure_net.bind(params)
            args, kwargs = copy_objects((args, kwargs))
            return call_method(net, method, args, kwargs), state_of(net)

        adapted = transform(run, strict=self.strict, execution=self.execution)
        outputs, state = adapted(*self.pair(), *args, dropout_key=dropout_key, **kwargs)
        nnx.update(self.net, state)
        return outputs

    def __getattr__(self, name: str) -> Any:
        net = vars(self).get("net")
        if name.startswith("_") or net is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if callable(getattr(type(net), name, None)):
            return functools.partial(self.__call__, method=name)
        return getattr(net, name)

    def _adapters(self) -> dict[Path, Adapter]:
        """The adapters by path, as arrays."""
        variables: dict[tuple[str, ...], nnx.Variable[Array]] = traverse_util.flatten_dict(self.lora)  # type: ignore[assignment]
        adapters = {}
        for path, treedef in self.treedefs:
            arrays = [variables[*path.split("/"), name].get_value() for name in _variable_names(treedef)]
            adapters[path] = jax.tree.unflatten(treedef, arrays)
        return adapters


def as_module(
    net: Net, frozen: Params, lora: Params, *, strict: bool, execution: str, rngs: nnx.Rngs | None
) -> AdaptedModule:
    """The `AdaptedModule` of an NNX net.

    Raises:
        TypeError: The net is of another kind, or ``rngs`` is not an `nnx.Rngs`.
        ValueError: The trees do not fit the net.
    """
    if not isinstance(net, NNXNet):
        raise TypeError(
            f"as_nnx is for NNX modules, and this net is {net.kind}. Train lora itself with optax: every array in "
            "it trains, and jax.grad with respect to it is all a loop needs."
        )
    if not isinstance(rngs, nnx.Rngs | None):
        raise TypeError(
            f"rngs is of type {type(rngs).__name__}; expected an nnx.Rngs, such as nnx.Rngs(dropout=0), or None."
        )
    check_pair(frozen, lora)
    trained = {path: leaf for path, leaf in flatten(lora).items() if leaf is not None}
    adapters = {path: leaf for path, leaf in trained.items() if is_adapter(leaf)}
    full = {path: leaf for path, leaf in trained.items() if not is_adapter(leaf)}
    module = _retype(net.bind(map_paths(lambda path, leaf: full.get(path, leaf), frozen)), set(full))
    return AdaptedModule(module, adapters, strict=strict, execution=execution, rngs=rngs)


def _retype(module: nnx.Module, trained_paths: set[Path]) -> nnx.Module:
    """``module`` with an `nnx.LoRAParam` at each of the paths, and an `nnx.Param` at every other."""
    graphdef, params, state = nnx.split(module, nnx.Param, ...)

    def retype(keys: tuple[str | int, ...], variable: nnx.Variable[Array]) -> nnx.Variable[Array]:
        trains = "/".join(map(str, keys)) in trained_paths
        if trains == _trains(variable):
            return variable
        return (nnx.LoRAParam if trains else nnx.Param).from_metadata(variable.get_value(), variable.get_metadata())

    return nnx.merge(graphdef, nnx.map_state(retype, params), state)


def _trains(variable: nnx.Variable[Array]) -> bool:
    return isinstance(variable, nnx.LoRAParam)


def _parameters(net: nnx.Module) -> dict[Path, nnx.Variable[Array]]:
    """The parameters of a module, as variables, by path."""
    return {"/".join(map(str, keys)): v for keys, v in nnx.to_flat_state(nnx.state(net, nnx.Param))}


def _variable_names(treedef: TreeDef) -> tuple[str, ...]:
    """What the arrays of an adapter are called in a module: ``lora_a``, ``lora_b``."""
    adapter = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    return tuple(f"lora_{keys[0].name}" for keys, _ in jax.tree_util.tree_flatten_with_path(adapter)[0])


def _variables(adapter: Adapter, weight: nnx.Variable[Array]) -> dict[str, nnx.Variable[Array]]:
    """The arrays of an adapter as variables, with the axis names of the weight; the rank axis has none."""
    metadata = weight.get_metadata()
    sharding: dict[str, dict[str, Any]] = {}
    if (axis_names := metadata.get("out_sharding")) is not None:
        axis_names = (*axis_names, *[None] * (len(adapter.axes) - len(axis_names)))
        # eager_sharding=False: the arrays are where they should be already, so NNX must not move them.
        mesh = {"mesh": metadata.get("mesh"), "eager_sharding": False}
        for name, weight_axes in array_axes(adapter.axes).items():
            names = tuple(None if axis is None else axis_names[axis] for axis in weight_axes)
            sharding[f"lora_{name}"] = {"out_sharding": names, **mesh}

    types = {"lora_a": nnx.Param} if adapter.frozen_a else {}
    arrays = zip(_variable_names(jax.tree.structure(adapter)), jax.tree.leaves(adapter), strict=True)
    return {name: types.get(name, nnx.LoRAParam)(value, **sharding.get(name, {})) for name, value in arrays}
