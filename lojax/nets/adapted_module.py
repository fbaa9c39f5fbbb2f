"""An adapted NNX net as an `nnx.Module` of its own, for trainers that expect one.

Its trained arrays are `nnx.LoRAParam` and nothing else is, so ``nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)``
and ``nnx.value_and_grad(..., argnums=nnx.DiffState(0, nnx.LoRAParam))`` train exactly what ``lora`` holds.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx, traverse_util

from lojax.adapters.adapter import Adapter, array_axes, is_adapter
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.trees import check_pair
from lojax.nets.nnx import NNXNet, copied, open_nnx, variables
from lojax.nets.params_check import call
from lojax.rewrite.transform import transform


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
        self, net: nnx.Module, adapters: dict[str, Adapter], *, strict: bool, execution: str, rngs: nnx.Rngs | None
    ):
        weights = _params(net)
        factors = {tuple(path.split("/")): _variables(adapter, weights[path]) for path, adapter in adapters.items()}
        self.net = net
        self.lora = nnx.data(traverse_util.unflatten_dict(factors))
        self.forms = nnx.static(tuple((path, jax.tree.structure(adapter)) for path, adapter in adapters.items()))
        self.strict = strict
        self.execution = execution
        self.rngs = rngs
        self.deterministic = False

    def pair(self) -> tuple[Any, Any]:
        """``(frozen, lora)`` as they are now: for `Model.apply`, `merge` and `save`."""
        held = {path: (variable.get_value(), _trains(variable)) for path, variable in _params(self.net).items()}
        adapters = self._adapters()
        tree = nnx.to_pure_dict(nnx.state(self.net, nnx.Param))
        frozen = map_paths(lambda path, _: None if held[path][1] else held[path][0], tree)
        lora = map_paths(lambda path, _: held[path][0] if held[path][1] else adapters.get(path), tree)
        return frozen, lora

    def __call__(self, *args: Any, dropout_key: Any = None, method: Any = None, **kwargs: Any) -> Any:
        """What the net returns with its weights adapted.

        Args:
            *args: Passed to the net.
            dropout_key: A PRNG key for dropout on the adapters' inputs, instead of one from ``rngs``.
            method: The method to call instead of the net: its name, or a function of the net.
            **kwargs: Passed to the net.
        """
        if dropout_key is None and self.rngs is not None and not self.deterministic:
            dropout_key = self.rngs.dropout()
        parts = open_nnx(self.net)

        def run(params: Any, *args: Any, **kwargs: Any) -> Any:
            net = parts.bind(params)
            args, kwargs = copied((args, kwargs))
            return call(net, method, args, kwargs), variables(net)

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

    def _adapters(self) -> dict[str, Adapter]:
        """The adapters by path, as arrays."""
        flat: dict[Any, Any] = traverse_util.flatten_dict(self.lora)  # type: ignore[assignment]
        found = {}
        for path, form in self.forms:
            names = _names(form)
            found[path] = jax.tree.unflatten(form, [flat[*path.split("/"), name].get_value() for name in names])
        return found


def as_module(
    net: Any, frozen: Any, lora: Any, *, strict: bool, execution: str, rngs: nnx.Rngs | None
) -> AdaptedModule:
    """The `AdaptedModule` of an NNX net.

    Raises:
        TypeError: The net is of another kind.
        ValueError: The trees do not fit the net.
    """
    if not isinstance(net, NNXNet):
        raise TypeError(
            f"as_nnx is for NNX nets, and this one is a {type(net).__name__.removesuffix('Net')}. Train lora itself "
            "with optax: every array in it trains, and jax.grad with respect to it is all a loop needs."
        )
    check_pair(frozen, lora)
    trained = flatten(lora)

    def typed(path: str, weight: Any) -> Any:
        return weight if trained[path] is None or is_adapter(trained[path]) else trained[path]

    module = net.bind(map_paths(typed, frozen))
    adapters = {path: leaf for path, leaf in trained.items() if is_adapter(leaf)}
    full = {path for path, leaf in trained.items() if leaf is not None and not is_adapter(leaf)}
    return AdaptedModule(_retyped(module, full), adapters, strict=strict, execution=execution, rngs=rngs)


def _retyped(module: nnx.Module, full: set[str]) -> nnx.Module:
    """``module`` with `nnx.LoRAParam` at the paths in ``full``, and no other."""
    graphdef, params, state = nnx.split(module, nnx.Param, ...)

    def retype(keys: tuple[Any, ...], variable: Any) -> Any:
        trains = "/".join(map(str, keys)) in full
        if trains == _trains(variable):
            return variable
        return (nnx.LoRAParam if trains else nnx.Param).from_metadata(variable.get_value(), variable.get_metadata())

    return nnx.merge(graphdef, nnx.map_state(retype, params), state)


def _trains(variable: Any) -> bool:
    return isinstance(variable, nnx.LoRAParam)


def _params(net: nnx.Module) -> dict[str, Any]:
    """The parameters of a module, as variables, by path."""
    return {"/".join(map(str, keys)): v for keys, v in nnx.to_flat_state(nnx.state(net, nnx.Param))}


def _names(form: Any) -> tuple[str, ...]:
    """What the arrays of an adapter are called in a module: ``lora_a``, ``lora_b``."""
    adapter = jax.tree.unflatten(form, range(form.num_leaves))
    return tuple(f"lora_{keys[0].name}" for keys, _ in jax.tree_util.tree_flatten_with_path(adapter)[0])


def _variables(adapter: Adapter, weight: Any) -> dict[str, Any]:
    """The arrays of an adapter as variables, with the axis names of the weight; the rank axis has none."""
    metadata = weight.get_metadata()
    names = metadata.get("out_sharding")
    specs: dict[str, Any] = {}
    if names is not None:
        names = (*names, *[None] * (len(adapter.axes) - len(names)))
        along = array_axes(adapter.axes).items()
        specs = {f"lora_{name}": tuple(None if d is None else names[d] for d in dims) for name, dims in along}

    placed = {"mesh": metadata.get("mesh"), "eager_sharding": False}  # the arrays are where they should be already
    kinds = {"lora_a": nnx.Param} if adapter.frozen_a else {}
    return {
        name: kinds.get(name, nnx.LoRAParam)(
            value, **({"out_sharding": specs[name], **placed} if name in specs else {})
        )
        for name, value in zip(_names(jax.tree.structure(adapter)), jax.tree.leaves(adapter), strict=True)
    }
