"""The kinds of net, and how each is recognised: by the names of its classes, so that no library is imported for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from lojax.nets.function import FunctionNet
from lojax.nets.haiku import HaikuNet
from lojax.nets.linen import LinenNet
from lojax.nets.net import Net
from lojax.nets.nnx import open_nnx
from lojax.nets.transformers import TransformersNet

KINDS = (
    "a Flax Linen or NNX module, a transformed Haiku function, an Equinox module, a Flax model of Hugging Face "
    "transformers, or a function f(params, *args, **kwargs)"
)


def open_net(net: Any) -> Net:
    """The `Net` of a net of any kind.

    Raises:
        TypeError: ``net`` is of no known kind; the message says what to pass instead.
    """
    if inspect.isclass(net):
        raise TypeError(_refusal(net, "That is a class: pass an instance."))
    if isinstance(net, nn.Module):
        return LinenNet(net)
    if isinstance(net, nnx.Module):
        return open_nnx(net)
    names = set(_class_names(net))
    if "transformers.FlaxPreTrainedModel" in names:
        return TransformersNet(net)
    if names & {"haiku.Transformed", "haiku.TransformedWithState"}:
        return HaikuNet(net)
    if "equinox.Module" in names and _holds_arrays(net):
        from lojax.nets.equinox import open_equinox

        return open_equinox(net)
    hint = _hint(net, names)
    if callable(net) and not hint:
        return FunctionNet(net)
    raise TypeError(_refusal(net, hint))


def _class_names(net: Any) -> Iterator[str]:
    """The classes of ``net``, as ``library.Class``."""
    for cls in type(net).__mro__:
        yield f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _holds_arrays(net: Any) -> bool:
    """Whether a pytree is more than a wrapped function (as ``eqx.filter_jit(f)`` is)."""
    return any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(net))


def _hint(net: Any, names: set[str]) -> str:
    """What to pass instead of something that is nearly a net; "" where there is nothing to say."""
    split = (nnx.GraphDef, nnx.State)
    if isinstance(net, split) or (isinstance(net, tuple) and any(isinstance(part, split) for part in net)):
        return "That is an NNX module already split: pass the module itself, nnx.merge(graphdef, *states)."
    if names & {"haiku.MultiTransformed", "haiku.MultiTransformedWithState"}:
        return "Of a Haiku multi_transform pass one function: lambda params, *args: net.apply.name(params, *args)."
    if "haiku.Module" in names:
        return "A Haiku module is built inside a transform: pass hk.transform(lambda *args: Net()(*args))."
    if "torch.Module" in names:
        return "That is a PyTorch module; lojax adapts JAX programs. Hugging Face PEFT adapts this one."
    if "keras.Layer" in names:
        return (
            "Of a Keras model on the JAX backend pass a function of its trainable variables: "
            "lambda params, x: net.stateless_call(params, net.non_trainable_variables, x)[0]."
        )
    return ""


def _refusal(net: Any, hint: str) -> str:
    shown = repr(net)
    shown = shown if len(shown) <= 200 else shown[:200] + "…"
    return f"lojax.wrap takes {KINDS}; got {type(net).__name__}: {shown}." + (f" {hint}" if hint else "")
