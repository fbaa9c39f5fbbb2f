"""A decoder of the Llama family as a pure function of its parameters, for plans and for the pod example.

Its layers are scanned and rematerialized, so the program is as large as one layer. Letters in shapes: ``B`` sequences,
``S`` positions, ``L`` layers, ``D`` width, ``F`` feed-forward width, ``H`` heads, ``G`` key and value heads, ``K`` head
width, ``V`` tokens.

On a mesh the batch is sharded over ``data`` and ``fsdp``, the weights over ``fsdp`` and ``tensor``. Between the blocks
the positions are sharded over ``tensor`` (Korthikanti et al. 2022, arXiv:2205.05198), which keeps the activations of
eighty layers small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lojax.adapters.paths import unflatten
from lojax.planner.decoder_config import DecoderConfig
from lojax.sharding.weight_specs import AnyMesh, mesh_axes
from lojax.types import Array, Dtype, Key, Params, Path, Shape

Weights: TypeAlias = Mapping[str, Any]
"""A branch of the parameters."""
Batch: TypeAlias = Mapping[str, Array]
"""The arrays of a batch by name; see `Decoder.loss`."""
SpecEntry: TypeAlias = str | tuple[str, ...] | None
"""The mesh axes that one axis of an array is sharded over."""

BATCH = ("data", "fsdp")
"""The mesh axes that the sequences of a batch are sharded over."""
TARGETS = "layers/**/kernel"
"""A target that adapts every linear layer of the blocks."""


def linear_layers(config: DecoderConfig) -> dict[Path, tuple[int, int, bool]]:
    """The linear layers of a block by path: in, out, and whether the out axis (else the in axis) is over ``tensor``."""
    d, f, k = config.width, config.mlp, config.head_dim
    return {
        "self_attn/q_proj": (d, config.heads * k, True),
        "self_attn/k_proj": (d, config.kv_heads * k, True),
        "self_attn/v_proj": (d, config.kv_heads * k, True),
        "self_attn/o_proj": (config.heads * k, d, False),
        "mlp/gate_proj": (d, f, True),
        "mlp/up_proj": (d, f, True),
        "mlp/down_proj": (f, d, False),
    }


def parameter_specs(config: DecoderConfig) -> dict[Path, tuple[Shape, PartitionSpec]]:
    """The shape and the sharding of every parameter by path."""
    layers, d = config.layers, config.width
    specs: dict[Path, tuple[Shape, PartitionSpec]] = {
        "embed_tokens/embedding": ((config.vocab, d), PartitionSpec("tensor", "fsdp")),
        "norm/scale": ((d,), PartitionSpec()),
        "layers/input_layernorm/scale": ((layers, d), PartitionSpec()),
        "layers/post_attention_layernorm/scale": ((layers, d), PartitionSpec()),
    }
    for path, (m, n, out) in linear_layers(config).items():
        spec = PartitionSpec(None, "fsdp", "tensor") if out else PartitionSpec(None, "tensor", "fsdp")
        specs[f"layers/{path}/kernel"] = ((layers, m, n), spec)
        if config.qkv_bias and path[-6:] in ("q_proj", "k_proj", "v_proj"):
            specs[f"layers/{path}/bias"] = ((layers, n), PartitionSpec(None, "tensor"))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            specs[f"layers/self_attn/{name}/scale"] = ((layers, config.head_dim), PartitionSpec())
    if not config.tied:
        specs["lm_head/kernel"] = ((d, config.vocab), PartitionSpec("fsdp", "tensor"))
    return specs


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder on a mesh. Holds no arrays.

    Attributes:
        config: Its shape.
        mesh: The mesh, with axes among ``data``, ``fsdp`` and ``tensor``; None for one device.
        chunk: How many positions the loss and the attention compute at a time, so that only their logits and scores
            are in memory.
    """

    config: DecoderConfig
    mesh: AnyMesh | None = None
    chunk: int = 512

    def shapes(self, dtype: Dtype = jnp.bfloat16) -> Params:
        """The parameters, as shapes with shardings."""
        return unflatten({
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(spec))
            for path, (shape, spec) in parameter_specs(self.config).items()
        })  # fmt: skip

    def specs(self) -> Params:
        """The `PartitionSpec` of every parameter, for the axes that the mesh has."""
        return unflatten({path: self.spec(*spec) for path, (_, spec) in parameter_specs(self.config).items()})

    def init(self, key: Key, dtype: Dtype = jnp.float32) -> Params:
        """Random parameters: normal with standard deviation ``in ** -0.5``, norms at one. ``key`` is consumed."""
        params = {}
        for i, (path, (shape, spec)) in enumerate(parameter_specs(self.config).items()):
            if path.endswith("/scale"):
                values = jnp.zeros(shape, dtype) if self.config.offset_norm else jnp.ones(shape, dtype)
            else:
                deviation = 0.02 if path.endswith("bias") or "embed" in path else shape[-2] ** -0.5
                values = jax.random.normal(jax.random.fold_in(key, i), shape, dtype) * jnp.asarray(deviation, dtype)
            params[path] = self.constrain(values, *spec)
        return unflatten(params)

    def spec(self, *entries: SpecEntry) -> PartitionSpec:
        """A spec without the axes that the mesh lacks."""
        sizes = self.mesh.shape if self.mesh is not None else {}

        def restrict(entry: SpecEntry) -> SpecEntry:
            names = tuple(name for name in mesh_axes(entry) if name in sizes)
            return None if not names else names if isinstance(entry, tuple) else names[0]

        return PartitionSpec(*map(restrict, entries))

    def sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        """The sharding of a spec on the mesh; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(*spec))

    def constrain(self, x: Array, *entries: SpecEntry) -> Array:
        """``x`` constrained to be sharded over these mesh axes."""
        sharding = self.sharding(PartitionSpec(*entries))
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    def logits(
        self, params: Params, tokens: Array, segments: Array | None = None, positions: Array | None = None
    ) -> Array:
        """The logits ``[B, S, V]`` in float32, for tokens ``[B, S]``; see `loss` for the rest."""
        hidden = self.hidden(params, tokens, segments, positions)
        return jnp.einsum("bsd,dv->bsv", hidden, self.head(params), preferred_element_type=jnp.float32)

    def head(self, params: Params) -> Array:
        """The output head, ``[D, V]``."""
        if self.config.tied:
            return params["embed_tokens"]["embedding"].T
        return params["lm_head"]["kernel"]

    def hidden(
        self, params: Params, tokens: Array, segments: Array | None = None, positions: Array | None = None
    ) -> Array:
        """The normalized output of the last layer, ``[B, S, D]``."""
        segments = jnp.ones_like(tokens) if segments is None else segments
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = params["embed_tokens"]["embedding"].at[tokens].get(mode="clip")
        if self.config.offset_norm:
            x = x * jnp.asarray(math.sqrt(self.config.width), x.dtype)
        x = self.constrain(x, BATCH, "tensor")
        rotary = self._rotary(positions)

        @jax.checkpoint
        def layer(x: Array, weights: Weights) -> tuple[Array, None]:
            return self._layer(x, weights, segments, rotary), None

        x, _ = jax.lax.scan(layer, x, params["layers"])
        return self.constrain(self._norm(x, params["norm"]["scale"]), BATCH)

    def loss(self, params: Params, batch: Batch) -> Array:
        """The mean cross-entropy of the next token, computed for ``chunk`` positions at a time.

        Args:
            params: The parameters.
            batch: ``tokens`` and ``targets`` ``[B, S]``; optionally ``segments`` (tokens attend only within their
                segment), ``positions``, and ``weights`` ``[B, S]`` (0 ignores a target).
        """
        weights = batch["weights"] if "weights" in batch else jnp.ones(batch["tokens"].shape, jnp.float32)
        return self.total_loss(params, {**batch, "weights": weights}) / jnp.maximum(weights.sum(), 1)

    def total_loss(self, params: Params, batch: Batch) -> Array:
        """The weighted sum of the cross-entropies, in float32; ``batch`` as in `loss`, with ``weights``."""
        hidden = self.hidden(params, batch["tokens"], batch.get("segments"), batch.get("positions"))
        head = self.constrain(self.head(params), None, "tensor")
        chunks = tuple(self._split_positions(x) for x in (hidden, batch["targets"], batch["weights"]))

        @jax.checkpoint
        def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
            x, target, weight = chunk
            logits = jnp.einsum("bsd,dv->bsv", x, head, preferred_element_type=jnp.float32)
            logits = self.constrain(logits, BATCH, None, "tensor")
            # Indexing would gather the vocabulary axis, which is sharded; a masked sum reduces within the shards.
            is_target = target[..., None] == jnp.arange(self.config.vocab)
            target_logits = jnp.where(is_target, logits, 0.0).sum(-1)
            losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
            return total + (losses * weight).sum(), None

        total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)
        return total

    def _split_positions(self, x: Array) -> Array:
        """``[B, S, ...]`` as ``[S/chunk, B, chunk, ...]``."""
        size = math.gcd(self.chunk, x.shape[1])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def _norm(self, x: Array, scale: Array) -> Array:
        """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.config.norm_eps)
        # Where to round differs: Gemma multiplies by 1 + scale in float32, the others by scale in the dtype of x.
        if self.config.offset_norm:
            return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * scale

    def _layer(self, x: Array, weights: Weights, segments: Array, rotary: tuple[Array, Array]) -> Array:
        y = self.constrain(self._norm(x, weights["input_layernorm"]["scale"]), BATCH)
        x = x + self.constrain(self._attention(y, weights["self_attn"], segments, rotary), BATCH, "tensor")
        y = self.constrain(self._norm(x, weights["post_attention_layernorm"]["scale"]), BATCH)
        return x + self.constrain(self._feed_forward(y, weights["mlp"]), BATCH, "tensor")

    def _feed_forward(self, x: Array, weights: Weights) -> Array:
        gate, up = (self._project(x, weights[name], True) for name in ("gate_proj", "up_proj"))
        gate = jax.nn.silu(gate) if self.config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return self._project(gate * up, weights["down_proj"], False)

    def _project(self, x: Array, layer: Weights, out: bool) -> Array:
        """A linear layer whose out axis (else its in axis) is sharded over ``tensor``."""
        # Without the constraint the partitioner may gather the kernel over the whole mesh in the backward pass. With
        # it, the kernel is gathered over fsdp before each use, and nowhere else.
        kernel = self.constrain(layer["kernel"], *((None, "tensor") if out else ("tensor", None)))
        y = x @ kernel + layer["bias"] if "bias" in layer else x @ kernel
        return self.constrain(y, BATCH, None, "tensor") if out else y

    def _attention(self, x: Array, weights: Weights, segments: Array, rotary: tuple[Array, Array]) -> Array:
        """Causal attention within segments, for one chunk of queries at a time."""
        c = self.config
        q = self._heads(x, weights, "q", c.heads, rotary)
        k = self._heads(x, weights, "k", c.kv_heads, rotary)
        v = self._heads(x, weights, "v", c.kv_heads, None)
        k, v = (self.constrain(jnp.repeat(y, c.heads // c.kv_heads, axis=2), BATCH, None, "tensor") for y in (k, v))
        index = jnp.arange(x.shape[1])
        positions = index.reshape(-1, math.gcd(self.chunk, index.size))
        chunks = (self._split_positions(q), self._split_positions(segments), positions)

        @jax.checkpoint
        def attend(chunk: tuple[Array, Array, Array]) -> Array:
            q, segment, position = chunk
            scores = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32)
            mask = (position[:, None] >= index) & (segment[:, None, :, None] == segments[:, None, None, :])
            if c.window is not None:
                mask = mask & (position[:, None] - index < c.window)
            scores = jnp.where(mask, scores / math.sqrt(c.head_dim), -1e30)
            return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores).astype(v.dtype), v)

        out = jnp.moveaxis(jax.lax.map(attend, chunks), 0, 1).reshape(*x.shape[:2], -1)
        return self._project(self.constrain(out, BATCH, None, "tensor"), weights["o_proj"], False)

    def _heads(self, x: Array, weights: Weights, name: str, heads: int, rotary: tuple[Array, Array] | None) -> Array:
        """One projection, normalized and rotated, ``[B, S, heads, K]``."""
        y = self._project(x, weights[f"{name}_proj"], True)
        y = y.reshape(*y.shape[:2], heads, self.config.head_dim)
        divides = self.mesh is None or heads % self.mesh.shape.get("tensor", 1) == 0
        y = self.constrain(y, BATCH, None, "tensor" if divides else None)
        if f"{name}_norm" in weights:
            y = self._norm(y, weights[f"{name}_norm"]["scale"])
        return y if rotary is None else _rotate(y, rotary)

    def _rotary(self, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines ``[B, S, K/2]`` (Su et al. 2021, arXiv:2104.09864, in the half-split layout)."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.config.rope_scaling:
            frequencies = _scale_frequencies(frequencies, **dict(self.config.rope_scaling))
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    cos, sin = (y[:, :, None, :].astype(x.dtype) for y in rotary)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _scale_frequencies(
    frequencies: Array,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Array:
    """Llama 3.1's frequencies: low ones divided by ``factor``, high ones unchanged, those between interpolated."""
    rotations = original_max_position_embeddings * frequencies / (2 * math.pi)
    unchanged = jnp.clip((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return frequencies * (unchanged + (1 - unchanged) / factor)
