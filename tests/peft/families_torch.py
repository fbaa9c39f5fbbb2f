"""A tiny model of every family that both torch and Flax have. Needs torch and transformers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
IMAGE = {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
IMAGE |= {"image_size": 16, "patch_size": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Family:
    """Class names without the ``Flax``, the config, what an adapter targets, and the kind of input."""

    model: str
    config: str
    sizes: dict[str, Any]
    targets: list[str]
    saved: list[str] | None
    inputs: tuple[str, ...]

    def torch_model(self) -> Any:
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**self.sizes)).eval()

    def flax_model(self, model: Any) -> Any:
        """The Flax model, and the params that transformers itself makes of the torch model's weights."""
        flax = getattr(transformers, f"Flax{self.model}")(model.config, _do_init=False)
        flax._is_initialized, flax._params = True, flax.params_shape_tree  # shapes are all that the converter reads
        params = convert_pytorch_state_dict_to_flax(dict(model.state_dict()), flax)
        return flax, jax.tree.map(jnp.asarray, params)


FAMILIES = {
    "bert": Family(
        "BertForSequenceClassification", "BertConfig", TEXT, ["query", "output.dense"], ["classifier"], ("ids", "mask")
    ),
    "roberta": Family(
        "RobertaForSequenceClassification", "RobertaConfig", TEXT, ["query", "value"], ["classifier"], ("ids", "mask")
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20},
        ["c_attn", "c_proj", "c_fc"],
        None,
        ("ids", "mask"),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        TEXT | {"num_key_value_heads": 1},
        ["q_proj", "v_proj", "down_proj"],
        ["lm_head"],
        ("ids", "mask"),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        TEXT | {"num_key_value_heads": 1},
        ["k_proj", "o_proj"],
        None,
        ("ids", "mask"),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        "GemmaConfig",
        TEXT | {"num_key_value_heads": 1, "head_dim": 8},
        ["q_proj", "gate_proj"],
        None,
        ("ids", "mask"),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        ["q", "v", "wo"],
        None,
        ("ids", "decoder"),
    ),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig", IMAGE, ["query", "projection"], ["classifier"], ("pixels",)
    ),
    "clip": Family(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": TEXT | TOKENS | {"projection_dim": 8},
            "vision_config": IMAGE | {"projection_dim": 8},
            "projection_dim": 8,
        },
        ["q_proj", "out_proj", "fc1", "patch_embedding"],
        None,
        ("ids", "mask", "pixels"),
    ),
}
