"""Keras layers after ``quantize``, adapted as they are, against weights that are dequantized in NumPy.

Not in the extra ``peer``: ``pip install keras``, then ``KERAS_BACKEND=jax python -m pytest -m peer
tests/nets/test_peer_keras.py``. Last seen to pass with keras 3.15.1 on jax 0.10.2.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from tests.helpers import trained

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", reason="keras is not installed")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras runs on another backend"),
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # what it uses of JAX is its own affair
]
WIDTH, OUT = 64, 33  # an odd number of outputs is padded
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, WIDTH)), jnp.float32)
MODES = {
    "int8": lambda: "int8",  # with quantized activations
    "int8, weights only": lambda: keras.quantizers.Int8QuantizationConfig(activation_quantizer=None),
    "int4": lambda: "int4",  # in blocks
    "int4, by channel": lambda: keras.quantizers.Int4QuantizationConfig(block_size=-1),
}


def quantized(mode: str) -> Any:
    model = keras.Sequential([keras.layers.Dense(WIDTH, activation="tanh"), keras.layers.Dense(OUT)])
    model.build((None, WIDTH))
    how = MODES[mode]()
    model.quantize(how) if isinstance(how, str) else model.quantize(config=how)
    return model


def dequantized(layer: Any) -> np.ndarray:
    codes, scale = np.asarray(layer._kernel.value), np.asarray(layer.kernel_scale.value, np.float64)
    if layer.quantization_mode == "int8":
        return codes / scale
    nibbles = np.stack([codes & 15, codes >> 4 & 15], -1).reshape(len(codes), -1)[:, : layer.units].astype(int)
    values = np.where(nibbles > 7, nibbles - 16, nibbles)
    if scale.ndim == 1:
        return values / scale
    groups = np.asarray(layer.g_idx.value).astype(int)
    return (values - np.asarray(layer.kernel_zero.value)[groups]) * scale[groups]


def rounded(x: Any) -> Any:
    """``x`` through eight bits; the derivative passes that, as in Keras."""
    step = 127 / (jnp.max(jnp.abs(x), -1, keepdims=True) + 1e-7)
    return x + jax.lax.stop_gradient(jnp.clip(jnp.round(x * step), -127, 127) / step - x)


@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_are_those_of_the_dequantized_weights(mode):
    keras_model = quantized(mode)

    def net(params: dict[str, Any], x: Any) -> Any:
        values = [[params[v.path] for v in group] for group in (keras_model.trainable_variables, state)]
        return keras_model.stateless_call(*values, x)[0]

    state = keras_model.non_trainable_variables
    params = {v.path: v.value for v in keras_model.variables}
    model = lojax.wrap(net, "**/kernel", rank=2, alpha=4, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, X)
    np.testing.assert_array_equal(jax.jit(model.apply)(frozen, lora, X), jax.jit(net)(params, X))
    lora = jax.tree.map(lambda v: v / 8, trained(lora))
    weights = [dequantized(layer) for layer in keras_model.layers]
    paths = [f"{layer.path}/kernel" for layer in keras_model.layers]

    def plain(lora: dict[str, Any], x: Any) -> Any:
        for i, (path, w) in enumerate(zip(paths, weights, strict=True)):
            x = rounded(x) if mode == "int8" else x
            x = x @ (w + lora[path].scale * lora[path].a @ lora[path].b)  # the biases are zero
            x = jnp.tanh(x) if i == 0 else x
        return jnp.sum(jnp.sin(x))

    def adapted(lora: dict[str, Any], x: Any) -> Any:
        return jnp.sum(jnp.sin(model.apply(frozen, lora, x)))

    actual = jax.jit(jax.value_and_grad(adapted, (0, 1)))(lora, X)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), ({path: lora[path] for path in paths}, X))
        expected = jax.value_and_grad(plain, (0, 1))(*wide)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    actual_leaves, expected_leaves = jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1])
    assert len(actual_leaves) == len(expected_leaves) == 5
    for a, b in zip(actual_leaves, expected_leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-3)
