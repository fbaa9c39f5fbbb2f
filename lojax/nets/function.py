"""Nets that hold no parameters: plain functions, transformed Haiku functions and Flax Linen modules.

All three are a function ``apply(params, *args, **kwargs)``. A Linen module takes its whole ``variables`` dict for
``params``, and ``rngs=``, ``mutable=`` and ``method=`` after it. A Haiku function takes the rng first in ``args``, or
the state and the rng.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

from flax import linen as nn
from flax.errors import ModifyScopeVariableError

from lojax.types import Params, PyTree

LINEN = "a Linen module"
"""What errors call a Linen module."""


def linen_apply(module: nn.Module) -> Callable[..., PyTree]:
    """``module.apply``, whose error for a collection that the call may not change says how to allow it."""

    @functools.wraps(module.apply)
    def apply(variables: Params, *args: object, **kwargs: object) -> PyTree:
        try:
            return module.apply(variables, *args, **kwargs)  # type: ignore[arg-type]
        except ModifyScopeVariableError as error:
            # Flax keeps the name in the text alone.
            collection = re.search(r'collection "(\w+)"', str(error))
            name = collection[1] if collection else "batch_stats"
            error.args = (
                f'{error} The call computes a new one. Pass mutable=["{name}"] to apply, which then returns (outputs, '
                f'{{"{name}": ...}}): put that in frozen for the next call. Or call the module so that it leaves its '
                f"state alone, as with train=False or use_running_average=True.",
            )
            raise

    return apply


@dataclasses.dataclass(frozen=True)
class FunctionNet:
    """A net that is its apply function.

    Attributes:
        apply: The function.
        name: Its name: that of a Linen module is the name of its class.
        kind: What errors call the net.
        source: Where its parameters come from, for the error of a caller who asks the net for them.
    """

    apply: Callable[..., PyTree]
    name: str
    kind: str = "a plain function"
    source: str = "them"
    state_paths = frozenset()

    def observe(self, params: Params, /, *args: object, **kwargs: object) -> PyTree:
        """The same."""
        return self.apply(params, *args, **kwargs)

    @property
    def params(self) -> Params:
        """Raises: the parameters are elsewhere."""
        kind = self.kind[0].upper() + self.kind[1:]
        raise AttributeError(f"{kind} holds no parameters: pass {self.source} to init and apply.")

    def check(self, params: Params) -> None:
        """Accepts any tree, but for Linen's ``variables``. Linen and Haiku name a missing parameter themselves."""
        if self.kind == LINEN and not (isinstance(params, Mapping) and "params" in params):
            keys = f" (its keys: {', '.join(map(str, params))})" if isinstance(params, Mapping) else ""
            raise ValueError(
                f"params has no collection 'params'{keys}. A Linen module takes its whole variables dict: pass "
                '{"params": params}, with batch_stats and the like beside it.'
            )

    def bind(self, params: Params) -> Params:
        """``params``, since there is nothing else to hold."""
        return params
