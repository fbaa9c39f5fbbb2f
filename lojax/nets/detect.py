"""The kinds of net, and how each is recognized.

Flax comes with lojax. The other libraries are recognized by the names of their classes, so that none is imported
before a net of it is wrapped.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from lojax.nets.function import LINEN, FunctionNet, linen_apply
from lojax.nets.net import Net
from lojax.nets.nnx import from_nnx
from lojax.nets.transformers import TransformersNet

KINDS = (
    "a Flax Linen or NNX module, a transformed Haiku function, an Equinox module, a Flax model of Hugging Face "
    "transformers, or a function f(params, *args, **kwargs)"
)

HINTS = {
    "haiku.MultiTransformed": "For a Haiku multi_transform, pass one of its functions: "
    "lambda params, *args: net.apply.name(params, *args).",
    "haiku.Module": "A Haiku module is built inside a transform: pass hk.transform(lambda *args: Net()(*args)).",
    "torch.Module": "That is a PyTorch module, and lojax adapts JAX programs. Hugging Face PEFT adapts this one.",
    "keras.Layer": "For a Keras model on the JAX backend, pass a function of its trainable variables: "
    "lambda params, x: net.stateless_call(params, net.non_trainable_variables, x)[0].",
}
"""What to pass instead of something that is almost a net, by ``library.Class``."""

CLASS_HINT = "That is a class: pass an instance."
TREE_HINT = "That looks like a parameter tree: wrap the net, and pass the tree to model.init."
SPLIT_HINT = "That is an NNX module already split: pass the module itself, nnx.merge(graphdef, *states)."


def as_net(net: Any) -> Net:
    """The `Net` of a net of any kind.

    Raises:
        TypeError: ``net`` is of no known kind; the message says what to pass instead.
    """
    if inspect.isclass(net):
        raise TypeError(_refusal(net, CLASS_HINT))
    if isinstance(net, nn.Module):
        return FunctionNet(linen_apply(net), type(net).__name__, LINEN, "its variables")
    if isinstance(net, nnx.Module):
        return from_nnx(net)
    names = [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(net).__mro__]
    if "transformers.FlaxPreTrainedModel" in names:
        return TransformersNet(net)
    if "haiku.Transformed" in names or "haiku.TransformedWithState" in names:
        return FunctionNet(net.apply, net.apply.__name__, "a Haiku function", "what its init returned")
    if "equinox.Module" in names and _has_arrays(net):
        from lojax.nets.equinox import from_equinox

        return from_equinox(net)
    hint = SPLIT_HINT if _is_split(net) else next((HINTS[n] for n in names if n in HINTS), "")
    if not hint and isinstance(net, Mapping) and _has_arrays(net):
        hint = TREE_HINT
    if callable(net) and not hint:
        return FunctionNet(net, getattr(net, "__name__", type(net).__name__))
    raise TypeError(_refusal(net, hint))


def _has_arrays(net: Any) -> bool:
    """Whether a pytree is more than a wrapped function (as ``eqx.filter_jit(f)`` is)."""
    return any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(net))


def _is_split(net: Any) -> bool:
    """Whether ``net`` is what `nnx.split` returned, or one of its parts."""
    parts = net if isinstance(net, tuple) else (net,)
    return any(isinstance(part, (nnx.GraphDef, nnx.State)) for part in parts)


def _refusal(net: Any, hint: str) -> str:
    text = repr(net)
    text = text if len(text) <= 200 else text[:200] + "…"
    return f"lojax.wrap takes {KINDS}; got {type(net).__name__}: {text}." + (f" {hint}" if hint else "")
