"""What lojax needs to know about a net, whatever library it comes from."""

from __future__ import annotations

from typing import Any, Protocol

from lojax.types import Params, Path, PyTree


class Net(Protocol):
    """A net as a function of its parameters."""

    @property
    def kind(self) -> str:
        """What errors call a net of this kind: ``"an NNX module"``."""
        ...

    @property
    def name(self) -> str:
        """The name of its class or function, which tracer errors and profiles show."""
        ...

    def apply(self, params: Params, /, *args: Any, **kwargs: Any) -> PyTree:
        """What the net returns for these parameters."""

    def observe(self, params: Params, /, *args: Any, **kwargs: Any) -> PyTree:
        """The same, for a caller who looks at the traced program alone: it warns of nothing."""

    @property
    def params(self) -> Params:
        """The parameters that the net holds, or an `AttributeError` if it holds none."""

    @property
    def state_paths(self) -> frozenset[Path]:
        """The paths in the parameter tree of what is not a parameter and never trains, such as batch statistics."""
        ...

    def check(self, params: Params) -> None:
        """Raises if ``params`` cannot be the parameters of this net. A net that holds none takes any tree."""

    def bind(self, params: Params) -> Any:
        """A net of the same kind that holds ``params``, or ``params`` itself if nets of this kind hold none."""
