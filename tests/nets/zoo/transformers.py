"""Flax models of Hugging Face transformers, tiny and random. Imported inside, as transformers is optional."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from tests.nets.zoo.case import Case, Example, fill, normal, tokens

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 16}
T5 = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
VIT = {"image_size": 16, "patch_size": 8}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
DISTIL = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": 64, "max_position_embeddings": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def model(name: str, config: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """A model without parameters, and parameters for it; the library's own random init takes seconds."""
    transformers = importlib.import_module("transformers")
    if name.startswith("FlaxT5"):
        _patch_t5()
    net = getattr(transformers, name)(getattr(transformers, config)(**settings), _do_init=False)
    return net, fill(net.params_shape_tree)


def _patch_t5() -> None:
    """The T5 of transformers 4.57 calls ``jnp.clip(x, a_max=...)``, which JAX has since renamed to ``max``."""
    module = importlib.import_module("transformers.models.t5.modeling_flax_t5")

    def clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
        return jnp.clip(x, min=a_min, max=a_max)

    module.jnp = SimpleNamespace(**{**vars(jnp), "clip": clip})  # type: ignore[attr-defined]


def build(name: str, config: str, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return functools.partial(example, name, config, settings, args, kwargs)


def example(name: str, config: str, settings: dict[str, Any], args: Any, kwargs: Any) -> Example:
    net, params = model(name, config, settings)
    return Example(net, params, lambda p: net(*args, params=p, **kwargs), args, kwargs)


def row(name: str, count: int, build: Any, *more: str, **settings: Any) -> Case:
    targets = ["**/kernel", *more]
    return Case(name, "transformers", build, targets, count, requires="transformers", promotion="standard", **settings)


IDS, IMAGES = tokens(0, 64, 1, 7), normal(0, 1, 3, 16, 16)
PAIR = {"decoder_input_ids": tokens(1, 64, 1, 5)}
GATED = BERT | {"num_key_value_heads": 2}
CASES = (
    row("bert", 7, build("FlaxBertModel", "BertConfig", BERT, IDS)),
    row("roberta", 10, build("FlaxRobertaModel", "RobertaConfig", BERT, IDS), "**/*_embeddings/embedding"),
    row("gpt2", 5, build("FlaxGPT2LMHeadModel", "GPT2Config", GPT2, IDS), "**/wte/embedding"),
    row("llama", 8, build("FlaxLlamaForCausalLM", "LlamaConfig", BERT, IDS)),
    row("t5", 17, build("FlaxT5ForConditionalGeneration", "T5Config", T5, IDS, **PAIR), "shared/embedding"),
    row("vit", 8, build("FlaxViTModel", "ViTConfig", BERT | VIT, IMAGES)),
    row("distilbert", 6, build("FlaxDistilBertModel", "DistilBertConfig", DISTIL, IDS), slow=True),
    row("electra", 6, build("FlaxElectraModel", "ElectraConfig", BERT | {"embedding_size": 32}, IDS), slow=True),
    row("albert", 8, build("FlaxAlbertModel", "AlbertConfig", BERT | {"embedding_size": 16}, IDS), slow=True),
    row("mistral_grouped_query", 8, build("FlaxMistralForCausalLM", "MistralConfig", GATED, IDS), slow=True),
    row("gemma", 7, build("FlaxGemmaForCausalLM", "GemmaConfig", GATED | {"head_dim": 8}, IDS), slow=True),
    row("bart", 17, build("FlaxBartModel", "BartConfig", BART, IDS, **PAIR), "shared/embedding", slow=True),
    row("resnet", 6, build("FlaxResNetModel", "ResNetConfig", RESNET, IMAGES), slow=True),
)
