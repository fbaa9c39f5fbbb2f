"""The kinds of net, and how each is recognised."""

from __future__ import annotations

import inspect
from typing import Any

from flax import linen as nn

from lojax.nets.function import FunctionNet
from lojax.nets.linen import LinenNet
from lojax.nets.net import Net


def open_net(net: Any) -> Net:
    """The `Net` of a Linen module or of a function ``f(params, *args, **kwargs)``."""
    if isinstance(net, nn.Module):
        return LinenNet(net)
    if callable(net) and not inspect.isclass(net):
        return FunctionNet(net)
    hint = " That is a class: pass an instance." if inspect.isclass(net) else ""
    raise TypeError(
        f"lojax.wrap takes a Flax Linen module or a function f(params, *args, **kwargs), got "
        f"{type(net).__name__}: {net!r}.{hint}"
    )
