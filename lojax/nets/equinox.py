"""An Equinox module as a net. Its parameter tree is the module with None for all but its floating-point arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx

from lojax.adapters.paths import flatten
from lojax.nets.params_check import Method, call_method, check_params
from lojax.types import Params, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class EquinoxNet:
    """An Equinox module, partitioned.

    Attributes:
        params: The module with its floating-point arrays alone.
        static: The module with everything else: functions, flags, integer arrays.
    """

    params: Params
    static: PyTree
    state_paths = frozenset()
    kind = "an Equinox module"

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self.params).__name__

    def check(self, params: Params) -> None:
        """Raises unless ``params`` fits the module."""
        arrays = {path: leaf for path, leaf in flatten(self.params).items() if leaf is not None}
        check_params(params, arrays, f"the Equinox module {self.name}")

    def bind(self, params: Params) -> Any:
        """The module with ``params``."""
        self.check(params)
        return eqx.combine(params, self.static)

    def apply(self, params: Params, /, *args: object, method: Method = None, **kwargs: object) -> PyTree:
        """What the module returns; ``method`` is a name, or a function of the module, to call instead."""
        return call_method(self.bind(params), method, args, kwargs)

    observe = apply


def from_equinox(module: Any) -> EquinoxNet:
    """Partitions a module."""
    return EquinoxNet(*eqx.partition(module, eqx.is_inexact_array))
