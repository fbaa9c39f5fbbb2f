"""A Flax Linen module as a net. Its parameter tree is the whole ``variables`` dict."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class LinenNet:
    """A Linen module; ``rngs=``, ``mutable=`` and ``method=`` pass on to its ``apply``."""

    module: nn.Module

    def apply(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls ``module.apply``."""
        return self.module.apply(params, *args, **kwargs)

    @property
    def params(self) -> Any:
        """Raises: a Linen module holds no parameters."""
        raise AttributeError("A Linen module holds no parameters: pass its variables to init and apply.")

    def check(self, params: Any) -> None:
        """Nothing: Linen names a missing parameter itself."""

    def bind(self, params: Any) -> Any:
        """``params``: all there is to hold."""
        return params
