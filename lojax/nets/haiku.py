"""A transformed Haiku function as a net. It holds no parameters; rng, or state and rng, come first in its arguments.

Nothing of Haiku is imported: a transformed function is a pair of pure functions.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class HaikuNet:
    """``hk.transform(f)`` or ``hk.transform_with_state(f)``."""

    transformed: Any

    def apply(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls ``transformed.apply(params, rng, ...)``, or ``(params, state, rng, ...)``."""
        return self.transformed.apply(params, *args, **kwargs)

    @property
    def params(self) -> Any:
        """Raises: a transformed function holds no parameters."""
        raise AttributeError("A Haiku function holds no parameters: pass what its init returned to init and apply.")

    def check(self, params: Any) -> None:
        """Nothing: Haiku names a missing parameter itself."""

    def bind(self, params: Any) -> Any:
        """``params``: all there is to hold."""
        return params
