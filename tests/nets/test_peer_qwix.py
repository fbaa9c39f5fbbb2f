"""Bases that qwix quantized, adapted as they are, against the weights that qwix dequantizes.

Not in the extra ``peer``: ``pip install qwix``, then ``python -m pytest -m peer tests/nets/test_peer_qwix.py``. Last
seen to pass with qwix 0.1.8 on jax 0.10.2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lojax
from tests.helpers import message, trained

qwix = pytest.importorskip("qwix", reason="qwix is not installed")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what it uses of JAX is its own affair
]
WIDTH, OUT = 128, 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), jnp.float32)
KINDS = [("int8", None), ("int8", 32), ("int4", 32), ("nf4", 32)]
"""Kinds of weights, and the entries that share a scale."""


class Net(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(OUT, name="out")(jnp.tanh(nn.Dense(WIDTH, name="inner")(x)))


class NNXNet(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner, self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(jnp.tanh(self.inner(x)))


def provider(kind: str, tile: int | None, activations: str | None = None) -> Any:
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=kind, tile_size=tile, act_qtype=activations)
    return qwix.PtqProvider([rule])


def linen(kind: str, tile: int | None, activations: str | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """A quantized module, its variables, and its two weights as qwix has them."""
    params = Net().init(jax.random.key(0), X)["params"]
    module = qwix.quantize_model(Net(), provider(kind, tile, activations))
    abstract = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    params = qwix.quantize_params(params, abstract)
    return module, {"params": params}, {name: params[name]["kernel"].array for name in ("inner", "out")}


def in_nnx(kind: str, tile: int | None) -> tuple[Any, Any, dict[str, Any]]:
    module = qwix.quantize_model(NNXNet(nnx.Rngs(0)), provider(kind, tile), X)
    params = lojax.wrap(module, "**/qvalue").params
    return module, params, {"inner": module.inner.kernel.array, "out": module.out.kernel.array}


@pytest.mark.parametrize("make", [linen, in_nnx])
@pytest.mark.parametrize(("kind", "tile"), KINDS)
def test_the_update_is_added_to_what_qwix_dequantizes(make, kind, tile):
    module, params, arrays = make(kind, tile)
    model = lojax.wrap(module, "**/kernel/array/qvalue", rank=2, alpha=4, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, X)
    np.testing.assert_array_equal(jax.jit(model.apply)(frozen, lora, X), jax.jit(model.net.apply)(params, X))
    lora = jax.tree.map(lambda v: v / 4, trained(lora))
    adapters = [x for x in jax.tree.leaves(lora, is_leaf=is_adapter) if is_adapter(x)]
    by_width = {a.weight_shape[-1]: jax.tree.map(lambda v: np.asarray(v, np.float64), a) for a in adapters}
    x = np.asarray(X, np.float64)
    for name, width in (("inner", WIDTH), ("out", OUT)):
        w = np.asarray(qwix.dequantize(arrays[name]), np.float64)
        x = x @ (w + by_width[width].scale * by_width[width].a @ by_width[width].b)  # the biases are zero
        x = np.tanh(x) if name == "inner" else x
    np.testing.assert_allclose(jax.jit(model.apply)(frozen, lora, X), x, rtol=1e-3, atol=1e-4)
    backward = lambda frozen, lora: jax.vjp(lambda v: model.apply(frozen, v, X), lora)[1]
    kept = jax.tree.leaves(jax.eval_shape(backward, frozen, lora))
    assert not [k for k in kept if k.size >= WIDTH * OUT and k.dtype not in (jnp.int8, jnp.int4, jnp.uint4)]


def is_adapter(node: object) -> bool:
    return isinstance(node, lojax.Adapter)


def test_quantized_activations_and_float8_are_refused():
    for settings, expected in (
        (("int8", None, "int8"), "with an activation that it quantized to int8"),
        (("float8_e4m3fn", None), "holds float8_e4m3fn codes, which the net scales by itself"),
    ):
        module, params, _ = linen(*settings)
        model = lojax.wrap(module, "**/kernel/array/qvalue", rank=2)
        text = message(ValueError, model.init, jax.random.key(0), params, X)
        assert "/kernel/array/qvalue: " in text
        assert expected in text
