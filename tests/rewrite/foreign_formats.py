"""Nets that dequantize by themselves, each in the manner of a library, and the weight that their codes stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RNG = np.random.default_rng(0)
IN, OUT, TILE, LAYERS = 64, 64, 16, 3
BOOK = np.sort(RNG.normal(size=16)).astype(np.float32)
CODES = RNG.integers(-8, 8, (IN, OUT))
SCALES = RNG.uniform(0.02, 0.06, (IN // TILE, OUT)).astype(np.float32)
ZEROS = RNG.integers(-2, 3, (IN // TILE, OUT)).astype(np.int8)
CHANNELS = SCALES[0]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A net ``f(params, x)``, its parameters with the adapted codes at ``codes``, and the weight ``[..., in, out]``."""

    f: Callable[[Any, Any], Any]
    params: dict[str, Any]
    weight: np.ndarray


def tiled(values: np.ndarray, scales: np.ndarray = SCALES, zeros: np.ndarray | float = 0) -> np.ndarray:
    """``(values - zeros) * scales``, where ``TILE`` rows share a scale."""
    rows = np.arange(IN) // TILE
    return (values.astype(np.float64) - (zeros[rows] if isinstance(zeros, np.ndarray) else zeros)) * scales[rows]


def packed(codes: np.ndarray) -> np.ndarray:
    """Two codes of four bits in each byte along the last axis, the first in the low half."""
    nibbles = (codes & 15).astype(np.uint8)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(np.int8)


def multiply(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


# --- qwix: tiles that share a scale, code books ---


def broadcast_tiles(values: Any, scales: Any) -> Any:
    """As `qarray.call_with_generic_broadcast` multiplies."""
    return (values.reshape(IN // TILE, TILE, OUT) * scales.reshape(IN // TILE, 1, OUT)).reshape(IN, OUT)


def qwix_tiles(p, x):
    return multiply(x, broadcast_tiles(p["codes"].astype(jnp.float32), p["scales"]))


def qwix_book(p, x):
    values = jnp.asarray(BOOK).at[p["codes"].reshape(-1, 1)].get(mode="clip").reshape(IN, OUT)
    return multiply(x, broadcast_tiles(values, p["scales"]))


def selects(p, x):
    codes = p["codes"]
    values = jnp.full(codes.shape, BOOK[0])
    for i in range(1, 16):
        values = jnp.where(codes >= i, BOOK[i], values)
    return multiply(x, values * p["channels"])


def batch_of_tiles(p, x):
    """A product for each tile, scaled and summed."""
    tiles = p["codes"].reshape(IN // TILE, TILE, OUT)
    y = jnp.einsum("btk,tko->bto", x.reshape(-1, IN // TILE, TILE), tiles.astype(x.dtype))
    return jnp.tanh(jnp.sum(y * p["scales"], 1))


# --- Keras: four bits, functions with their own derivatives, quantized activations ---


def unpack(codes: Any) -> Any:
    """As `keras.quantizers.unpack_int4` does along the last axis."""
    codes = codes.T
    low, high = ((half ^ 8) - 8 for half in (codes & 15, (codes >> 4) & 15))
    return jnp.stack([low, high], 1).reshape(-1, IN)[:OUT].T


def with_input_gradient(f: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``f(x, *base)`` with a derivative in ``x`` alone, the product with ``kernel(*base)``, as Keras writes it."""

    @jax.custom_gradient
    def call(x, *base):
        return f(x, *base), lambda upstream: (upstream @ kernel(*base).T, *[None] * len(base))

    return call


def keras_int4_kernel(codes, scales, zeros, rows):
    rows = rows.astype(jnp.int32)
    scales, zeros = jnp.take(scales, rows, axis=0), jnp.take(zeros, rows, axis=0)
    return (unpack(codes).astype(jnp.float32) - zeros.astype(jnp.float32)) * scales


def keras_int4(p, x):
    layer = with_input_gradient(lambda x, *base: x @ keras_int4_kernel(*base), keras_int4_kernel)
    return jnp.tanh(layer(x, p["codes"], p["scales"], p["zeros"], p["rows"]))


def divided(unpack: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda codes, scale: unpack(codes).astype(jnp.float32) / scale


def keras_int4_channels(p, x):
    def forward(x, codes, scale):
        return lax.dot(x, unpack(codes), preferred_element_type=jnp.float32) / scale

    return jnp.tanh(with_input_gradient(forward, divided(unpack))(x, p["codes"], 1 / p["channels"]))


def keras_int8(p, x):
    """Activations are quantized as well; the derivative passes that."""

    def forward(x, codes, scale):
        step = 127 / (jnp.max(jnp.abs(x), -1, keepdims=True) + 1e-7)
        small = jnp.clip(jnp.round(x * step), -127, 127).astype(jnp.int8)
        y = lax.dot(small, codes, preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) / (scale * step)

    return jnp.tanh(with_input_gradient(forward, divided(lambda codes: codes))(x, p["codes"], 1 / p["channels"]))


# --- written by hand ---


def scaled_output(p, x):
    return jnp.tanh((x @ p["codes"].astype(x.dtype)) * p["channels"] * p["gain"])


def mixed_product(p, x):
    return jnp.tanh(lax.dot(x, p["codes"], preferred_element_type=jnp.float32) * p["channels"])


def words(p, x):
    """Eight codes in each word of 32 bits along the input axis, as GPTQ packs them."""
    shifts = jnp.arange(0, 32, 4, dtype=jnp.int32)
    codes = (p["codes"][:, None, :] >> shifts[None, :, None]) & 15
    return multiply(x, (codes.reshape(IN, OUT) - 8).astype(jnp.float32) * p["channels"])


def halves(p, x):
    """The two halves of each byte are the two halves of the outputs."""
    codes = p["codes"]
    values = jnp.concatenate([(codes << 4) >> 4, codes >> 4], axis=-1)
    return multiply(x, values.astype(jnp.float32) * p["channels"])


def bitcast(p, x):
    codes = lax.bitcast_convert_type(p["codes"], jnp.int4).reshape(IN, OUT)
    return multiply(x, codes.astype(jnp.float32) * p["channels"])


def scanned(p, x):
    def layer(x, codes):
        return multiply(x, unpack(codes).astype(x.dtype) * p["channels"]), None

    return lax.scan(layer, x, p["codes"])[0]


def picked(p, x):
    for i in range(LAYERS):
        x = multiply(x, unpack(p["codes"][i]).astype(x.dtype) * p["channels"])
    return x


def unpacked_before_a_scan(p, x):
    low, high = (p["codes"] << 4) >> 4, p["codes"] >> 4
    stack = jnp.stack([low, high], -1).reshape(LAYERS, IN, OUT).astype(x.dtype) * p["channels"]
    return lax.scan(lambda x, w: (multiply(x, w), None), x, stack)[0]


INT8, UINT4 = jnp.asarray(CODES, jnp.int8), jnp.asarray(CODES & 15, jnp.uint4)
BOOKED = BOOK[CODES & 15]
STACK = np.stack([np.roll(CODES, i, 0) for i in range(LAYERS)])
GAIN = RNG.uniform(0.5, 2, OUT).astype(np.float32)
WORDS = sum((CODES[i::8] & 15).astype(np.uint32) << np.uint32(4 * i) for i in range(8)).astype(np.int64)
HALVES = ((CODES[:, : OUT // 2] & 15) | (CODES[:, OUT // 2 :] & 15) << 4).astype(np.uint8).view(np.int8)
ROWS = (np.arange(IN) // TILE).astype(np.float32)
TILES, PACKED = {"codes": INT8, "scales": SCALES}, {"codes": packed(CODES), "channels": CHANNELS}
PACKED_STACK = {"codes": packed(STACK), "channels": CHANNELS}

FORMATS = {
    "qwix tiles": Foreign(qwix_tiles, TILES, tiled(CODES)),
    "qwix code book": Foreign(qwix_book, {"codes": UINT4, "scales": SCALES}, tiled(BOOKED)),
    "selects": Foreign(selects, {"codes": UINT4, "channels": CHANNELS}, BOOKED.astype(np.float64) * CHANNELS),
    "batch of tiles": Foreign(batch_of_tiles, TILES, tiled(CODES)),
    "keras int4": Foreign(
        keras_int4,
        {"codes": packed(CODES), "scales": SCALES, "zeros": ZEROS, "rows": ROWS},
        tiled(CODES, zeros=ZEROS),
    ),
    "keras int4 by channel": Foreign(keras_int4_channels, PACKED, CODES * CHANNELS.astype(np.float64)),
    "keras int8": Foreign(keras_int8, {"codes": INT8, "channels": CHANNELS}, CODES * CHANNELS.astype(np.float64)),
    "mixed product": Foreign(mixed_product, {"codes": INT8, "channels": CHANNELS}, CODES * CHANNELS.astype(np.float64)),
    "scaled output": Foreign(
        scaled_output, {"codes": INT8, "channels": CHANNELS, "gain": GAIN}, CODES * CHANNELS.astype(np.float64)
    ),
    "words": Foreign(
        words,
        {"codes": jnp.asarray(WORDS.astype(np.uint32).view(np.int32)), "channels": CHANNELS},
        ((CODES & 15) - 8) * CHANNELS.astype(np.float64),
    ),
    "halves": Foreign(halves, {"codes": HALVES, "channels": CHANNELS}, CODES * CHANNELS.astype(np.float64)),
    "bitcast": Foreign(bitcast, PACKED, CODES * CHANNELS.astype(np.float64)),
    "scan": Foreign(scanned, PACKED_STACK, STACK * CHANNELS.astype(np.float64)),
    "picked layers": Foreign(picked, PACKED_STACK, STACK * CHANNELS.astype(np.float64)),
    "before a scan": Foreign(unpacked_before_a_scan, PACKED_STACK, STACK * CHANNELS.astype(np.float64)),
}
