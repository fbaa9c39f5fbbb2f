"""A decoder of the Llama family as a pure function of its parameters: what plans are made of, and the pod example.

Its layers are scanned and rematerialized, so that a program has the size of one layer. Letters in shapes: ``B``
sequences, ``S`` positions, ``L`` layers, ``D`` width, ``F`` feed-forward width, ``H`` heads, ``G`` key and value
heads, ``K`` head width, ``V`` tokens.

On a mesh the batch lies over ``data`` and ``fsdp``, the weights over ``fsdp`` and ``tensor``, and between the
blocks the positions over ``tensor`` (Korthikanti et al. 2022, arXiv:2205.05198), which is what keeps the
activations of eighty layers small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lojax.planner.decoder_config import DecoderConfig

BATCH = ("data", "fsdp")
"""The mesh axes over which the sequences of a batch lie."""
TARGETS = "layers/**/kernel"
"""A target that adapts every linear layer of the blocks."""


def kernels(config: DecoderConfig) -> dict[str, tuple[int, int, bool]]:
    """The linear layers of a block: path, in, out, and whether the out axis (else the in axis) lies over tensor."""
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


def described(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    """The shape of every parameter and how it lies on a mesh, by path."""
    layers, d = config.layers, config.width
    found: dict[str, tuple[tuple[int, ...], PartitionSpec]] = {
        "embed_tokens/embedding": ((config.vocab, d), PartitionSpec("tensor", "fsdp")),
        "norm/scale": ((d,), PartitionSpec()),
        "layers/input_layernorm/scale": ((layers, d), PartitionSpec()),
        "layers/post_attention_layernorm/scale": ((layers, d), PartitionSpec()),
    }
    for path, (m, n, out) in kernels(config).items():
        spec = PartitionSpec(None, "fsdp", "tensor") if out else PartitionSpec(None, "tensor", "fsdp")
        found[f"layers/{path}/kernel"] = ((layers, m, n), spec)
        if config.qkv_bias and path[-6:] in ("q_proj", "k_proj", "v_proj"):
            found[f"layers/{path}/bias"] = ((layers, n), PartitionSpec(None, "tensor"))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            found[f"layers/self_attn/{name}/scale"] = ((layers, config.head_dim), PartitionSpec())
    if not config.tied:
        found["lm_head/kernel"] = ((d, config.vocab), PartitionSpec("fsdp", "tensor"))
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of values by path.

    >>> nested({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder on a mesh. Holds no arrays.

    Attributes:
        config: Its shape.
        mesh: The mesh, with axes among ``data``, ``fsdp`` and ``tensor``; None for one device.
        remat: The policy of `jax.checkpoint` for a layer: None keeps nothing but the input of each layer.
        group: How many positions the loss and the attention look at together, so that neither all logits nor
            all scores ever exist.
        fetch: Applied to the parameters of a layer where they are used, as to bring them from the host.
    """

    config: DecoderConfig
    mesh: Any = None
    remat: Callable[..., Any] | None = None
    group: int = 512
    fetch: Callable[[Any], Any] | None = None

    def shapes(self, dtype: Any = jnp.bfloat16) -> Any:
        """The parameters, as shapes with shardings."""
        flat = {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(spec))
            for path, (shape, spec) in described(self.config).items()
        }
        return nested(flat)

    def specs(self) -> Any:
        """The `PartitionSpec` of every parameter, for the axes that the mesh has."""
        return nested({path: self.spec(*spec) for path, (_, spec) in described(self.config).items()})

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
        """Random parameters: normal with standard deviation ``in ** -0.5``, norms at one. ``key`` is consumed."""
        flat = {}
        for i, (path, (shape, spec)) in enumerate(described(self.config).items()):
            if path.endswith("/scale"):
                start = jnp.zeros if self.config.offset_norm else jnp.ones
                flat[path] = self.placed(start(shape, dtype), *spec)
                continue
            deviation = 0.02 if path.endswith("bias") or "embed" in path else shape[-2] ** -0.5
            noise = jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
            flat[path] = self.placed(noise * jnp.asarray(deviation, dtype), *spec)
        return nested(flat)

    def spec(self, *names: Any) -> PartitionSpec:
        """A spec without the axes that the mesh lacks."""
        known = self.mesh.shape if self.mesh is not None else {}

        def keep(name: Any) -> Any:
            kept = tuple(n for n in (name if isinstance(name, tuple) else (name,)) if n in known)
            return None if not kept else kept if isinstance(name, tuple) else kept[0]

        return PartitionSpec(*(keep(name) for name in names))

    def sharding(self, spec: PartitionSpec) -> Any:
        """The sharding of a spec on the mesh; None without one."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(*spec))

    def placed(self, x: Any, *names: Any) -> Any:
        """``x`` constrained to lie over these mesh axes."""
        sharding = self.sharding(PartitionSpec(*names))
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    def logits(self, params: Any, tokens: Any, segments: Any = None, positions: Any = None) -> Any:
        """The logits ``[B, S, V]`` in float32, for tokens ``[B, S]``; see `loss` for the rest."""
        hidden = self.hidden(params, tokens, segments, positions)
        return jnp.einsum("bsd,dv->bsv", hidden, self.head(params), preferred_element_type=jnp.float32)

    def head(self, params: Any) -> Any:
        """The output head, ``[D, V]``."""
        if self.config.tied:
            return params["embed_tokens"]["embedding"].T
        return params["lm_head"]["kernel"]

    def hidden(self, params: Any, tokens: Any, segments: Any = None, positions: Any = None) -> Any:
        """The normed output of the last layer, ``[B, S, D]``."""
        segments = jnp.ones_like(tokens) if segments is None else segments
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = params["embed_tokens"]["embedding"].at[tokens].get(mode="clip")
        if self.config.offset_norm:
            x = x * jnp.asarray(math.sqrt(self.config.width), x.dtype)
        x = self.placed(x, BATCH, "tensor")
        rotary = self._rotary(positions)

        def layer(x: Any, weights: Any) -> tuple[Any, None]:
            weights = weights if self.fetch is None else self.fetch(weights)
            return self._layer(x, weights, segments, rotary), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=self.remat), x, params["layers"])
        return self.placed(self._norm(x, params["norm"]["scale"]), BATCH)

    def loss(self, params: Any, batch: Mapping[str, Any]) -> Any:
        """The mean cross-entropy of the next token, grouped so that no more than ``group`` positions have logits.

        Args:
            params: The parameters.
            batch: ``tokens`` and ``targets`` ``[B, S]``; optionally ``segments`` (packed sequences see only
                their own segment), ``positions``, and ``weights`` ``[B, S]`` (0 leaves a target out).
        """
        tokens, targets = batch["tokens"], batch["targets"]
        weights = batch["weights"] if "weights" in batch else jnp.ones(tokens.shape, jnp.float32)
        total = self.total_loss(params, {**batch, "targets": targets, "weights": weights})
        return total / jnp.maximum(weights.sum(), 1)

    def total_loss(self, params: Any, batch: Mapping[str, Any]) -> Any:
        """The weighted sum of the cross-entropies, in float32; ``batch`` as in `loss`, with ``weights``."""
        hidden = self.hidden(params, batch["tokens"], batch.get("segments"), batch.get("positions"))
        head = self.placed(self.head(params), None, "tensor")
        parts = [self._grouped(x) for x in (hidden, batch["targets"], batch["weights"])]

        @jax.checkpoint
        def group(total: Any, part: Any) -> tuple[Any, None]:
            x, target, weight = part
            logits = jnp.einsum("bsd,dv->bsv", x, head, preferred_element_type=jnp.float32)
            logits = self.placed(logits, BATCH, None, "tensor")
            is_target = target[..., None] == jnp.arange(self.config.vocab)  # a gather would collect the vocabulary
            chosen = jnp.where(is_target, logits, 0.0).sum(-1)
            losses = jax.nn.logsumexp(logits, axis=-1) - chosen
            return total + (losses * weight).sum(), None

        total, _ = jax.lax.scan(group, jnp.zeros((), jnp.float32), tuple(parts))
        return total

    def _grouped(self, x: Any) -> Any:
        """``[B, S, ...]`` as ``[S/group, B, group, ...]``."""
        size = math.gcd(self.group, x.shape[1])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def _norm(self, x: Any, scale: Any) -> Any:
        """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.config.norm_eps)
        if self.config.offset_norm:
            return (wide * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * scale

    def _layer(self, x: Any, weights: Any, segments: Any, rotary: Any) -> Any:
        y = self.placed(self._norm(x, weights["input_layernorm"]["scale"]), BATCH)
        x = x + self.placed(self._attention(y, weights["self_attn"], segments, rotary), BATCH, "tensor")
        y = self.placed(self._norm(x, weights["post_attention_layernorm"]["scale"]), BATCH)
        return x + self.placed(self._feed_forward(y, weights["mlp"]), BATCH, "tensor")

    def _feed_forward(self, x: Any, weights: Any) -> Any:
        gate, up = (self._project(x, weights[name], True) for name in ("gate_proj", "up_proj"))
        gate = jax.nn.silu(gate) if self.config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return self._project(gate * up, weights["down_proj"], False)

    def _project(self, x: Any, layer: Any, out: bool) -> Any:
        """A linear layer whose out axis (else its in axis) lies over tensor.

        The kernel is gathered over fsdp before its use and nowhere else: left to itself, the partitioner may
        gather it over the whole mesh in the backward pass.
        """
        kernel = self.placed(layer["kernel"], *((None, "tensor") if out else ("tensor", None)))
        y = x @ kernel + layer["bias"] if "bias" in layer else x @ kernel
        return self.placed(y, BATCH, None, "tensor") if out else y

    def _attention(self, x: Any, weights: Any, segments: Any, rotary: Any) -> Any:
        """Causal attention within segments, in groups of queries."""
        c = self.config
        q = self._heads(x, weights, "q", c.heads, rotary)
        k = self._heads(x, weights, "k", c.kv_heads, rotary)
        v = self._heads(x, weights, "v", c.kv_heads, None)
        k, v = (self.placed(jnp.repeat(y, c.heads // c.kv_heads, axis=2), BATCH, None, "tensor") for y in (k, v))
        index = jnp.arange(x.shape[1])
        groups = [self._grouped(q), self._grouped(segments), index.reshape(-1, math.gcd(self.group, index.size))]

        @jax.checkpoint
        def group(part: Any) -> Any:
            q, segment, at = part
            scores = jnp.einsum("bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32)
            seen = (at[:, None] >= index) & (segment[:, None, :, None] == segments[:, None, None, :])
            if c.window is not None:
                seen = seen & (at[:, None] - index < c.window)
            scores = jnp.where(seen, scores / math.sqrt(c.head_dim), -1e30)
            return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores).astype(v.dtype), v)

        out = jnp.moveaxis(jax.lax.map(group, tuple(groups)), 0, 1).reshape(*x.shape[:2], -1)
        return self._project(self.placed(out, BATCH, None, "tensor"), weights["o_proj"], False)

    def _heads(self, x: Any, weights: Any, name: str, heads: int, rotary: Any) -> Any:
        """One projection, normed and rotated, ``[B, S, heads, K]``."""
        y = self._project(x, weights[f"{name}_proj"], True)
        y = y.reshape(*y.shape[:2], heads, self.config.head_dim)
        divides = self.mesh is None or heads % self.mesh.shape.get("tensor", 1) == 0
        y = self.placed(y, BATCH, None, "tensor" if divides else None)
        if f"{name}_norm" in weights:
            y = self._norm(y, weights[f"{name}_norm"]["scale"])
        return y if rotary is None else _rotated(y, rotary)

    def _rotary(self, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines ``[B, S, K/2]`` (Su et al. 2021, arXiv:2104.09864, in the half-split layout)."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.config.rope_scaling:
            frequencies = _stretched(frequencies, **dict(self.config.rope_scaling))
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles), jnp.sin(angles)


def _rotated(x: Any, rotary: tuple[Any, Any]) -> Any:
    cos, sin = (y[:, :, None, :].astype(x.dtype) for y in rotary)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _stretched(
    frequencies: Any,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Any:
    """Llama 3.1's frequencies: slow ones divided by ``factor``, fast ones kept, those between interpolated."""
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)
