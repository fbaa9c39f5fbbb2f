"""The dimensions of a decoder of the Llama family, from a Hugging Face ``config.json`` or by name."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lojax.text import suggest

Fields: TypeAlias = Mapping[str, Any]
"""A parsed ``config.json``, or an object in it."""

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers that define a decoder.

    Attributes:
        vocab: The number of tokens, ``V``.
        width: The model width, ``D``.
        mlp: The hidden width of the feed-forward block, ``F``.
        layers: The number of layers, ``L``.
        heads: The number of query heads, ``H``.
        kv_heads: The number of key and value heads, ``G``; it divides ``H``.
        head_dim: The width of a head, ``K``.
        rope_theta: The base of the rotary frequencies.
        rope_scaling: The fields of Llama 3.1's ``rope_scaling``, as ``(name, value)`` pairs, or ``()``.
        norm_eps: The epsilon of the norms.
        tied: Whether the output head is the embedding.
        qkv_bias: Whether q, k and v have biases (Qwen 2).
        qk_norm: Whether q and k are normalized head by head (Qwen 3).
        activation: ``"silu"``, or ``"gelu"`` (tanh form, Gemma).
        offset_norm: Whether norms scale by ``1 + weight`` and embeddings by ``sqrt(D)`` (Gemma).
        window: How many positions a token attends to, itself included, or None for all before it.
    """

    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, float], ...] = ()
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    offset_norm: bool = False
    window: int | None = None

    @property
    def parameters(self) -> int:
        """The number of parameters of the weight matrices, without norms and biases (a ten-thousandth)."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.width * self.mlp
        return self.layers * layer + self.vocab * self.width * (1 if self.tied else 2)


PRESETS = {
    "tiny": DecoderConfig(256, 64, 128, 2, 4, 2, 16),
    "8B": DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500000.0),
    "70B": DecoderConfig(128256, 8192, 28672, 80, 64, 8, 128, rope_theta=500000.0),
    "405B": DecoderConfig(128256, 16384, 53248, 126, 128, 8, 128, rope_theta=500000.0),
}
"""Llama 3 in its three sizes (Grattafiori et al. 2024, arXiv:2407.21783, table 3), and one for a laptop."""


def open_config(config: DecoderConfig | str | os.PathLike[str]) -> DecoderConfig:
    """A configuration from itself, from the name of a preset, or from the path of a ``config.json``.

    Raises:
        ValueError: There is neither a preset nor a file of that name.

    >>> open_config("8B").layers
    32
    """
    if isinstance(config, DecoderConfig):
        return config
    if config in PRESETS:
        return PRESETS[str(config)]
    if not Path(config).exists():
        options = f"expected one of {', '.join(PRESETS)}, or the path of a config.json."
        raise ValueError(f"There is no preset and no file {str(config)!r}; {options}{suggest(config, PRESETS)}")
    return read_config(config)


def read_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """The configuration in a Hugging Face ``config.json``, or in the directory that holds one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, lacks a field, or describes another kind of model.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Expected a Hugging Face config.json.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object. Expected a Hugging Face config.json.")
    return from_fields(fields, source=str(path))


def from_fields(fields: Fields, *, source: str = "config") -> DecoderConfig:
    """The configuration that the fields of a Hugging Face ``config.json`` describe.

    Args:
        fields: The parsed file.
        source: What errors call it.
    """
    kind = fields.get("model_type", "llama")
    if kind not in KINDS:
        raise ValueError(f"{source}: model_type={kind!r}; expected one of {', '.join(KINDS)}.{suggest(kind, KINDS)}")
    missing = [name for name in REQUIRED if name not in fields]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}. Expected the config.json of a {kind} model.")
    for name in REQUIRED:
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"{source}: {name}={fields[name]!r}; expected a whole number of at least 1.")
    heads = fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"{source}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}.")
    gemma = kind == "gemma"
    window = fields.get("sliding_window") if kind == "mistral" or fields.get("use_sliding_window") else None
    return DecoderConfig(
        vocab=fields["vocab_size"],
        width=fields["hidden_size"],
        mlp=fields["intermediate_size"],
        layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        rope_theta=float(fields.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(fields.get("rope_scaling") or {}, source),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        tied=bool(fields.get("tie_word_embeddings", gemma)),
        qkv_bias=bool(fields.get("attention_bias", kind == "qwen2")),
        qk_norm=kind == "qwen3",
        activation="gelu" if gemma else "silu",
        offset_norm=gemma,
        window=window,
    )


def _rope_scaling(fields: Fields, source: str) -> tuple[tuple[str, float], ...]:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return ()
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3":
        raise ValueError(f"{source}: rope_scaling of type {kind!r}; expected 'default' or 'llama3'.")
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"{source}: rope_scaling lacks {', '.join(missing)}.")
    return tuple((name, float(fields[name])) for name in names)
