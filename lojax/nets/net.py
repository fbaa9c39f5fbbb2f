"""What lojax needs to know of a net, whatever library it comes from."""

from __future__ import annotations

from typing import Any, Protocol


class Net(Protocol):
    """A net as a function of its parameters."""

    def apply(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What the net returns for these parameters."""

    @property
    def params(self) -> Any:
        """The parameters the net holds, or an `AttributeError` where it holds none."""

    def check(self, params: Any) -> None:
        """Raises if ``params`` cannot be the parameters of this net. Only nets that hold parameters can tell."""

    def bind(self, params: Any) -> Any:
        """A net of the same kind that holds ``params``; ``params`` itself where nets hold none."""
