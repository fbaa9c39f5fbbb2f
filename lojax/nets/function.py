"""A plain function ``f(params, *args, **kwargs)`` as a net."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class FunctionNet:
    """A net that is its own apply function and holds no parameters."""

    f: Callable[..., Any]

    def apply(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.f(params, *args, **kwargs)

    @property
    def params(self) -> Any:
        """Raises: a function holds no parameters."""
        raise AttributeError("A plain function holds no parameters: pass them to init and apply.")

    def check(self, params: Any) -> None:
        """Nothing: any tree may be right."""

    def bind(self, params: Any) -> Any:
        """``params``: all there is to hold."""
        return params
