"""The nets of the benchmarks: a GPT-2-like and a Llama-like stack as plain functions, and the real MiniLM in Linen.

Every product with a weight goes through `linear`, which takes an array or a `HandWritten` weight. So one function is
the base net, the net that lojax adapts, LoRA written by hand, and literal ``W0 + BA``.

Letters: B rows, T tokens a row, D width, H heads, F inner width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from measure import Array, PyTree

SCALE = 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class HandWritten:
    """A weight with LoRA written by hand: factored, or materialized as ``W0 + s A B``."""

    w: Any
    a: Any
    b: Any
    materialized: bool = dataclasses.field(default=False, metadata={"static": True})


def linear(x: Array, w: Array | HandWritten) -> Array:
    """``x @ w``."""
    if not isinstance(w, HandWritten):
        return x @ w
    a, b = (factor.astype(x.dtype) for factor in (w.a, w.b))
    if w.materialized:
        return x @ (w.w + SCALE * a @ b)
    return x @ w.w + (SCALE * (x @ a)) @ b


@dataclasses.dataclass(frozen=True)
class Net:
    """A stack of layers and a head, as a function ``loss(params, x, labels)`` of embedded tokens x [B, T, D]."""

    kind: str
    layers: int = 4
    width: int = 512
    heads: int = 8
    inner: int = 2048
    vocabulary: int = 4096
    scanned: bool = False
    dtype: Any = jnp.float32
    kv_heads: int | None = None
    remat: bool = False

    def shapes(self) -> dict[str, Any]:
        """The parameters, as shapes: under ``layers`` one stack where scanned, else one branch a layer."""
        kinds = {"gpt2": self._gpt2, "llama": self._llama}
        layer = kinds[self.kind]()
        stack = (self.layers,) if self.scanned else ()
        leaf = lambda shape: jax.ShapeDtypeStruct((*stack, *shape), self.dtype)
        one = {name: leaf(shape) for name, shape in layer.items()}
        layers = one if self.scanned else {f"layer_{i}": one for i in range(self.layers)}
        head = jax.ShapeDtypeStruct((self.width, self.vocabulary), self.dtype)
        return {"layers": layers, "norm": jax.ShapeDtypeStruct((self.width,), self.dtype), "head": head}

    def _gpt2(self) -> dict[str, tuple[int, ...]]:
        d, f = self.width, self.inner
        weights = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, f), "down": (f, d)}
        return weights | {"norm_1": (d,), "norm_2": (d,), "bias_qkv": (3 * d,), "bias_up": (f,)}

    def _llama(self) -> dict[str, tuple[int, ...]]:
        d, f, kv = self.width, self.inner, self.kv * self.width // self.heads
        weights = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        return weights | {"norm_1": (d,), "norm_2": (d,)}

    @property
    def kv(self) -> int:
        """The number of key and value heads."""
        return self.kv_heads or self.heads

    def layer(self, x: Array, p: PyTree) -> Any:
        """One layer, [B, T, D] -> [B, T, D]."""
        y = norm(x, p["norm_1"])
        if self.kind == "gpt2":
            q, k, v = jnp.split(linear(y, p["qkv"]) + p["bias_qkv"], 3, axis=-1)
            x = x + linear(self.attend(q, k, v), p["out"])
            inner = jax.nn.gelu(linear(norm(x, p["norm_2"]), p["up"]) + p["bias_up"])
        else:
            x = x + linear(self.attend(*(linear(y, p[name]) for name in "qkv")), p["o"])
            y = norm(x, p["norm_2"])
            inner = jax.nn.silu(linear(y, p["gate"])) * linear(y, p["up"])
        return x + linear(inner, p["down"])

    def attend(self, q: Array, k: Array, v: Array) -> Any:
        """Causal attention over [B, T, heads * K]."""
        k_size = self.width // self.heads
        q, k, v = (t.reshape(*t.shape[:-1], -1, k_size) for t in (q, k, v))
        with jax.named_scope("attention"):
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return mixed.reshape(*mixed.shape[:-2], self.width)

    def loss(self, params: PyTree, x: Array, labels: Array) -> Any:
        """The mean cross-entropy of the next token."""
        layer = jax.checkpoint(self.layer) if self.remat else self.layer
        if self.scanned:
            x, _ = lax.scan(lambda c, p: (layer(c, p), None), x, params["layers"])
        else:
            for i in range(self.layers):
                x = layer(x, params["layers"][f"layer_{i}"])
        logits = linear(norm(x, params["norm"]), params["head"]).astype(jnp.float32)
        label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - label_logits)


def norm(x: Array, scale: Any) -> Any:
    """RMS norm, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * scale


def draw(shapes: PyTree, seed: int = 0) -> Any:
    """Random arrays of these shapes; those with one axis are ones."""
    rng = np.random.default_rng(seed)

    def draw_leaf(s: PyTree) -> Any:
        if jnp.issubdtype(s.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 2, s.shape), s.dtype)
        scale = 1 / np.sqrt(s.shape[-2]) if len(s.shape) > 1 else 0.0
        return jnp.asarray(rng.normal(size=s.shape) * scale + (len(s.shape) == 1), s.dtype)

    return jax.tree.map(draw_leaf, shapes)


def insert_by_hand(params: PyTree, lora: PyTree, *, materialized: bool = False) -> Any:
    """The parameters with each `lojax.Adapter` of ``lora`` as a `HandWritten` weight."""
    import lojax

    def join(adapter: PyTree, weight: PyTree) -> Any:
        if isinstance(adapter, lojax.Adapter):
            assert adapter.scale == SCALE, adapter.scale
            return HandWritten(lax.stop_gradient(weight), adapter.a, adapter.b, materialized)
        return lax.stop_gradient(weight) if adapter is None else adapter

    stop = lambda node: node is None or isinstance(node, lojax.Adapter)
    return jax.tree.map(join, lora, params, is_leaf=stop)


# --- the net of examples/ ---


def examples() -> Any:
    """The modules ``bert`` and ``model_files`` from examples/."""
    folder = str(Path(__file__).parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    import bert
    import model_files

    return bert, model_files


def minilm(classes: int = 7) -> tuple[Any, Any]:
    """The Linen BERT from examples/ with the weights of all-MiniLM-L6-v2: ``(module, variables)``."""
    bert, model_files = examples()
    return bert.load(model_files.find(), classes, key=jax.random.key(0))


class LoRADense(nn.Module):
    """A Linen Dense with LoRA written by hand, as a user without a library would."""

    features: int
    rank: int = 8

    @nn.compact
    def __call__(self, x: Array) -> Any:
        """``[..., m] -> [..., n]``."""
        m = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (m, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        a = self.param("a", nn.initializers.lecun_normal(), (m, self.rank))
        b = self.param("b", nn.initializers.zeros, (self.rank, self.features))
        return linear(x, HandWritten(kernel, a, b)) + bias


def minilm_by_hand(names: tuple[str, ...] = ("query", "value"), classes: int = 7) -> Callable[..., Any]:
    """``apply(variables, tokens, mask)`` of the same BERT with `LoRADense` at the layers called ``names``."""
    bert, model_files = examples()
    config = bert.BertConfig.from_file(model_files.find() / "config.json")

    class Linen:
        """`flax.linen` except for Dense."""

        def __getattr__(self, name: str) -> Any:
            return getattr(nn, name)

        def Dense(self, features: int, *, name: str | None = None, **settings: Any) -> Any:
            """A Dense, or a `LoRADense`."""
            return LoRADense(features, name=name) if name in names else nn.Dense(features, name=name, **settings)

    def apply(variables: PyTree, *args: PyTree, **kwargs: Any) -> Any:
        with mock.patch.object(bert, "nn", Linen()):
            return bert.BertClassifier(config, classes).apply(variables, *args, **kwargs)

    return apply


def minilm_by_hand_variables(variables: PyTree, lora: PyTree) -> Any:
    """The variables of `minilm_by_hand` with these parameters and adapters."""
    import lojax

    def join(weights: PyTree, adapters: PyTree) -> Any:
        out = {}
        for name, adapter in adapters.items():
            if isinstance(adapter, dict):
                out[name] = join(weights[name], adapter)
            elif isinstance(adapter, lojax.Adapter):
                out |= {name: lax.stop_gradient(weights[name]), "a": adapter.a, "b": adapter.b}
            else:
                out[name] = lax.stop_gradient(weights[name]) if adapter is None else adapter
        return out

    return join(variables, lora)
