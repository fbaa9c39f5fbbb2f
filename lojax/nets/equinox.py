"""An Equinox module as a net. Its parameter tree is the module with None for all but its floating-point arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx

from lojax.adapters.paths import flatten
from lojax.nets.params_check import call, fit


@dataclasses.dataclass(frozen=True, eq=False)
class EquinoxNet:
    """An Equinox module, partitioned.

    Attributes:
        params: The module with its floating-point arrays alone.
        static: The module with everything else: functions, flags, integer arrays.
    """

    params: Any
    static: Any

    def check(self, params: Any) -> None:
        """Raises unless ``params`` fits the module."""
        held = {path: leaf for path, leaf in flatten(self.params).items() if leaf is not None}
        fit(params, held, f"the Equinox module {type(self.params).__name__}")

    def bind(self, params: Any) -> Any:
        """The module with ``params``."""
        self.check(params)
        return eqx.combine(params, self.static)

    def apply(self, params: Any, /, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """What the module returns; ``method`` is a name, or a function of the module, to call instead."""
        return call(self.bind(params), method, args, kwargs)


def open_equinox(module: Any) -> EquinoxNet:
    """Partitions a module."""
    return EquinoxNet(*eqx.partition(module, eqx.is_inexact_array))
