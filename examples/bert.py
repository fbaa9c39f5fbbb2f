"""A compact Flax Linen BERT encoder with a classifier head, and its loader from Hugging Face files.

The one idea: the parameter tree is plain and its paths are readable, so that a target such as
``**/query/kernel`` says what it means::

    params/embeddings/{word,position,token_type}/embedding      params/embeddings/norm/{scale,bias}
    params/encoder/layer_0/attention/{query,key,value,output}/{kernel,bias}
    params/encoder/layer_0/{attention_norm,output_norm}/{scale,bias}
    params/encoder/layer_0/{intermediate,output}/{kernel,bias}
    params/classifier/{kernel,bias}

Letters in shapes: B rows, T tokens a row, D hidden size, C classes. Every kernel is ``[in, out]``.
There is nothing about adapters in this file.
"""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from safetensors import safe_open

Array = jax.Array

ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT, under the names that ``config.json`` gives them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    @classmethod
    def from_file(cls, path: str | Path) -> "BertConfig":
        """Reads ``config.json``.

        Args:
            path: The file.

        Returns:
            The configuration; keys that do not affect the encoder are ignored.

        Raises:
            ValueError: A required key is missing, or the file describes a net that this module does not implement.
        """
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        fields = dataclasses.fields(cls)
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in stored]:
            raise ValueError(
                f"{path}: no {', '.join(missing)}. A BERT config.json has "
                f"{', '.join(required)}; is this the directory of a BERT model?"
            )
        for key, expected in (("model_type", "bert"), ("position_embedding_type", "absolute")):
            if (got := stored.get(key, expected)) != expected:
                raise ValueError(f"{path}: {key} is {got!r}; this encoder needs {expected!r}.")
        config = cls(**{f.name: stored[f.name] for f in fields if f.name in stored})
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"{path}: hidden_act is {config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}.")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"{path}: hidden_size {config.hidden_size} is not a multiple of "
                f"num_attention_heads {config.num_attention_heads}."
            )
        return config


class Embeddings(nn.Module):
    """Word + position + segment (always 0 here), normalized: ``[B, T]`` -> ``[B, T, D]``."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Array, deterministic: bool) -> Array:
        """Embeds tokens."""
        c = self.config
        x = nn.Embed(c.vocab_size, c.hidden_size, name="word")(tokens)
        positions = jnp.arange(tokens.shape[-1])
        x += nn.Embed(c.max_position_embeddings, c.hidden_size, name="position")(positions)
        segments = jnp.zeros_like(positions)
        x += nn.Embed(c.type_vocab_size, c.hidden_size, name="token_type")(segments)
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, name="norm")(x)
        return nn.Dropout(c.hidden_dropout_prob, deterministic=deterministic)(x)


class Attention(nn.Module):
    """Self-attention over the real tokens: ``[B, T, D]``, mask ``[B, T]`` -> ``[B, T, D]``."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> Array:
        """Mixes the values of all real tokens, head by head."""
        c = self.config
        heads = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query = nn.Dense(c.hidden_size, name="query")(x).reshape(heads)
        key = nn.Dense(c.hidden_size, name="key")(x).reshape(heads)
        value = nn.Dense(c.hidden_size, name="value")(x).reshape(heads)
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / heads[-1] ** 0.5
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
        weights = nn.softmax(scores)
        weights = nn.Dropout(c.attention_probs_dropout_prob, deterministic=deterministic)(weights)
        mixed = jnp.einsum("bhqs,bshk->bqhk", weights, value).reshape(x.shape)
        return nn.Dense(c.hidden_size, name="output")(mixed)


class Layer(nn.Module):
    """One transformer layer, normalized after each residual sum: ``[B, T, D]`` -> ``[B, T, D]``."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> Array:
        """Attends, then transforms each token."""
        c = self.config
        dropout = partial(nn.Dropout, c.hidden_dropout_prob, deterministic=deterministic)
        norm = partial(nn.LayerNorm, epsilon=c.layer_norm_eps)
        attended = dropout()(Attention(c, name="attention")(x, mask, deterministic))
        x = norm(name="attention_norm")(x + attended)
        inner = ACTIVATIONS[c.hidden_act](nn.Dense(c.intermediate_size, name="intermediate")(x))
        return norm(name="output_norm")(x + dropout()(nn.Dense(c.hidden_size, name="output")(inner)))


class Encoder(nn.Module):
    """All layers in sequence: ``[B, T, D]`` -> ``[B, T, D]``."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> Array:
        """Applies every layer."""
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, mask, deterministic)
        return x


class BertClassifier(nn.Module):
    """BERT, the mean over the real tokens, and a dense head."""

    config: BertConfig
    classes: int

    def setup(self) -> None:
        """Creates the three submodules."""
        self.embeddings = Embeddings(self.config)
        self.encoder = Encoder(self.config)
        self.classifier = nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.02))

    def hidden(self, tokens: Array, mask: Array, deterministic: bool = True) -> Array:
        """The last hidden states.

        Args:
            tokens: ``[B, T]`` integers.
            mask: ``[B, T]``, 1 at a real token, 0 at padding.
            deterministic: False applies dropout, with the ``dropout`` rng.

        Returns:
            ``[B, T, D]``, as ``transformers.BertModel(...).last_hidden_state``.
        """
        return self.encoder(self.embeddings(tokens, deterministic), mask, deterministic)

    def pooled(self, tokens: Array, mask: Array, deterministic: bool = True) -> Array:
        """The mean of ``hidden`` over the real tokens, ``[B, D]``."""
        x = self.hidden(tokens, mask, deterministic)
        weights = mask[..., None].astype(x.dtype)
        return jnp.sum(x * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)

    def __call__(self, tokens: Array, mask: Array, deterministic: bool = True) -> Array:
        """Logits ``[B, C]``; arguments as for ``hidden``."""
        return self.classifier(self.pooled(tokens, mask, deterministic))


# From a Linen path below `params` to the tensor's name in a Hugging Face file.
_RENAMES = (
    (r"^embeddings/(word|position|token_type)/embedding$", r"embeddings.\1_embeddings.weight"),
    (r"^embeddings/norm/", "embeddings.LayerNorm."),
    (r"^encoder/layer_(\d+)/", r"encoder.layer.\1."),
    (r"\.attention/(query|key|value)/", r".attention.self.\1."),
    (r"\.attention/output/", ".attention.output.dense."),
    (r"\.attention_norm/", ".attention.output.LayerNorm."),
    (r"\.output_norm/", ".output.LayerNorm."),
    (r"\.(intermediate|output)/", r".\1.dense."),
    (r"(kernel|scale)$", "weight"),
)


def huggingface_name(path: str) -> str:
    """The Hugging Face name of a parameter.

    Args:
        path: The path below ``params``, such as ``encoder/layer_0/attention/query/kernel``.

    Returns:
        Such as ``encoder.layer.0.attention.self.query.weight``.

    Example:
        >>> huggingface_name("encoder/layer_3/output_norm/scale")
        'encoder.layer.3.output.LayerNorm.weight'
    """
    name = path
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load(
    directory: str | Path, classes: int, *, key: Array, dropout: float | None = None
) -> tuple[BertClassifier, dict[str, Any]]:
    """Loads a BERT from a local Hugging Face directory and gives it a new head.

    Args:
        directory: The directory with ``config.json`` and ``model.safetensors``.
        classes: C, the width of the new head.
        key: A PRNG key for the kernel of the head; consumed.
        dropout: The dropout rate inside the encoder; None takes that of ``config.json``.

    Returns:
        The module and its variables ``{"params": ...}``, all float32.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: A tensor is missing, or its shape does not match ``config.json``.
    """
    directory = Path(directory)
    for file in ("config.json", "model.safetensors"):
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"{directory} has no {file}. A model directory holds config.json, "
                "model.safetensors and tokenizer.json, as Hugging Face writes them."
            )
    config = BertConfig.from_file(directory / "config.json")
    if dropout is not None:
        config = dataclasses.replace(config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    net = BertClassifier(config, classes)
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = dict(jax.eval_shape(net.init, key, example, example)["params"])
    head = nn.Dense(classes, kernel_init=nn.initializers.normal(0.02))
    params.pop("classifier")
    params = _read_tensors(directory / "model.safetensors", params)
    params["classifier"] = head.init(key, jnp.zeros((1, net.config.hidden_size)))["params"]
    return net, {"params": params}


def _read_tensors(file: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Reads one tensor for each leaf of `expected`, a nested dict of shapes."""
    with safe_open(file, framework="flax") as tensors:
        stored = {_canonical_name(name): name for name in tensors.keys()}  # noqa: SIM118, no dict

        def read(path, leaf):
            path = "/".join(entry.key for entry in path)
            name = huggingface_name(path)
            if name not in stored:
                raise ValueError(
                    f"{file}: no tensor {name!r}, which config.json asks for (parameter {path}). "
                    f"It holds {len(stored)} tensors, such as {', '.join(sorted(stored)[:3])}."
                )
            value = tensors.get_tensor(stored[name])
            value = value.T if path.endswith("/kernel") else value
            if value.shape != leaf.shape:
                flip = slice(None, None, -1 if path.endswith("/kernel") else 1)
                raise ValueError(
                    f"{file}: tensor {stored[name]!r} has shape {list(value.shape[flip])}, "
                    f"expected {list(leaf.shape[flip])} from config.json (parameter {path})."
                )
            return jnp.asarray(value, jnp.float32)

        return jax.tree_util.tree_map_with_path(read, expected)


def _canonical_name(name: str) -> str:
    """A stored name without the prefixes of larger models, and with the current names of a norm."""
    name = re.sub(r"^(?:[a-z0-9_]+\.)*?(?=(?:embeddings|encoder\.layer)\.)", "", name)
    return re.sub(r"LayerNorm\.(gamma|beta)$", _norm_name, name)


def _norm_name(match: re.Match) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]]
