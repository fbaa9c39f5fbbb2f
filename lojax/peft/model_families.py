"""Ready name maps, one for each family of models. Read one as a model for your own.

Each covers several layouts of the same network, told apart by path and number of axes: that of transformers
Flax; flat and per-head kernels (``[in, out]`` or ``[in, out, out]``) as NNX and plain code have them; numbered
layers as ``layers/0`` or ``layers_0``; and layers scanned over a leading axis. A map renames and reshapes: it
assumes that the base weights themselves were converted without permuting heads or rotary halves.
"""

from __future__ import annotations

import functools
import re

from lojax.peft.name_map import NameMap
from lojax.text import suggest


def _under(path: str, name: str, rules: str) -> str:
    """The rules with a common start of the paths and of the names."""
    lines = (line.split("<->") for line in rules.strip().splitlines())
    return "\n".join(f"{path}{left.strip()} <-> {name}{right.strip()}" for left, right in lines) + "\n"


def _encoder(base: str) -> str:
    """BERT and its kin: ``base`` is the name under which a model with a head holds its encoder."""
    layer = """
    attention/self/{m:query,key,value}/*              <-> attention.self.{m}
    attention/{m:query,key,value}/*                   <-> attention.self.{m}
    attention/{m:query,key,value}/*[in, out, out]     <-> attention.self.{m}
    attention/output/{m:dense,LayerNorm}/*            <-> attention.output.{m}
    attention/out/*                                   <-> attention.output.dense
    attention/out/*[in, in, out]                      <-> attention.output.dense
    crossattention/self/{m:query,key,value}/*         <-> crossattention.self.{m}
    crossattention/output/{m:dense,LayerNorm}/*       <-> crossattention.output.{m}
    {m:intermediate/dense,output/dense,output/LayerNorm}/* <-> {m}
    """
    rest = """
    embeddings/{m:word_embeddings,position_embeddings,token_type_embeddings}/* <-> embeddings.{m}
    embeddings/LayerNorm/*                            <-> embeddings.LayerNorm
    pooler/dense/*                                    <-> pooler.dense
    """
    p, n = f"({base}/)", f"({base}.)"
    return _under(p + "encoder/layer/{i}/", n + "encoder.layer.{i}.", layer) + _under(p, n, rest)


_BERT_HEADS = """
    {m:classifier,qa_outputs,cls/seq_relationship,cls/predictions/decoder}/* <-> {m}
    cls/predictions/transform/{m:dense,LayerNorm}/* <-> cls.predictions.transform.{m}
    cls/predictions/bias                            <-> cls.predictions.bias : param
    """
_ROBERTA_HEADS = """
    classifier/{m:dense,out_proj}/*          <-> classifier.{m}
    {m:classifier,qa_outputs}/*              <-> {m}
    lm_head/{m:dense,layer_norm,decoder}/*   <-> lm_head.{m}
    lm_head/bias                             <-> lm_head.bias : param
    """

_GPT2 = _under(
    "(transformer/)",
    "(transformer.)",
    """
    {m:wte,wpe}/embedding                                    <-> {m}
    h/{i}/{m:ln_1,ln_2,ln_cross_attn}/*                      <-> h.{i}.{m}
    h/{i}/attn/{m:c_attn,c_proj}/*[out, in]                  <-> h.{i}.attn.{m} : conv1d
    h/{i}/crossattention/{m:c_attn,c_proj,q_attn}/*[out, in] <-> h.{i}.crossattention.{m} : conv1d
    h/{i}/mlp/{m:c_fc,c_proj}/*[out, in]                     <-> h.{i}.mlp.{m} : conv1d
    ln_f/*                                                   <-> ln_f
    """,
)
"""As transformers Flax has it: kernels ``[out, in]``."""
_GPT2_HEADS = "{m:lm_head,score}/* <-> {m}"

_GPT2_PLAIN = _under(
    "(transformer/)h/{i}/",
    "(transformer.)h.{i}.",
    """
    attn/c_attn/*[in, out, out, out]  <-> attn.c_attn : conv1d
    attn/c_attn/*[in, out, out]       <-> attn.c_attn : conv1d
    attn/c_proj/*[in, in, out]        <-> attn.c_proj : conv1d
    """,
)
"""Kernels ``[in, out]``, as everyone else has them; fused qkv as ``[in, 3 * out]`` or ``[in, 3, heads, size]``."""

_LLAMA = _under(
    "(model/)layers/{i}/",
    "(model.)layers.{i}.",
    """
    self_attn/{m:q_proj,k_proj,v_proj}/*[in, out, out]         <-> self_attn.{m}
    self_attn/o_proj/*[in, in, out]                            <-> self_attn.o_proj
    self_attn/{m:q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}/*  <-> self_attn.{m}
    mlp/{m:gate_proj,up_proj,down_proj}/*                      <-> mlp.{m}
    mlp/gate_up_proj/*[in, {m:gate_proj,up_proj}, out]         <-> mlp.{m}
    mlp/gate_up_proj/*[in, {m:gate_proj,up_proj}*out]          <-> mlp.{m}
    mlp/{gate:router=gate}/*                                   <-> mlp.{gate}
    mlp/experts/{m:gate_proj,up_proj,down_proj}/*[{e}, in, out] <-> mlp.experts.{e}.{m}
    {m*}/*                                                     <-> {m}
    """,
) + _under("(model/)", "(model.)", "embed_tokens/embedding <-> embed_tokens\nnorm/* <-> norm")
_LLAMA_HEADS = "{m:lm_head,score}/* <-> {m}"

_GEMMA_EINSUM = """
    embedder/input_embedding[in, out]                           <-> model.embed_tokens : embedding
    layer_{i}/attn/q_einsum/w[out, in, out]                     <-> model.layers.{i}.self_attn.q_proj
    layer_{i}/attn/kv_einsum/w[{m:k_proj,v_proj}, out, in, out] <-> model.layers.{i}.self_attn.{m}
    layer_{i}/attn/qkv_einsum/w[{m:q_proj,k_proj,v_proj}, out, in, out] <-> model.layers.{i}.self_attn.{m}
    layer_{i}/attn/attn_vec_einsum/w[in, in, out]               <-> model.layers.{i}.self_attn.o_proj
    layer_{i}/mlp/gating_einsum[{m:gate_proj,up_proj}, in, out] <-> model.layers.{i}.mlp.{m}
    layer_{i}/mlp/linear[in, out]                               <-> model.layers.{i}.mlp.down_proj
    layer_{i}/pre_attention_norm/scale                          <-> model.layers.{i}.input_layernorm
    layer_{i}/pre_ffw_norm/scale                                <-> model.layers.{i}.post_attention_layernorm
    final_norm/scale                                            <-> model.norm
    """
"""As Google's own Gemma code has it, with heads before features."""

_T5 = _under(
    "{s:encoder,decoder}/block/{i}/layer/{j}/",
    "{s}.block.{i}.layer.{j}.",
    """
    {a:SelfAttention,EncDecAttention}/{m:q,k,v,o}/*              <-> {a}.{m}
    {a:SelfAttention,EncDecAttention}/{m:q,k,v}/*[in, out, out]  <-> {a}.{m}
    {a:SelfAttention,EncDecAttention}/o/*[in, in, out]           <-> {a}.o
    SelfAttention/relative_attention_bias/embedding              <-> SelfAttention.relative_attention_bias
    DenseReluDense/{m:wi,wi_0,wi_1,wo}/*                         <-> DenseReluDense.{m}
    layer_norm/*                                                 <-> layer_norm
    """,
)
_T5_REST = """
    shared/embedding                       <-> shared
    {s:encoder,decoder}/final_layer_norm/* <-> {s}.final_layer_norm
    lm_head/*                              <-> lm_head
    """

_VIT = _under(
    "(vit/)encoder/layer/{i}/",
    "(vit.)encoder.layer.{i}.",
    """
    attention/attention/{m:query,key,value}/*              <-> attention.attention.{m}
    attention/attention/{m:query,key,value}/*[in, out, out] <-> attention.attention.{m}
    {m:attention/output/dense,intermediate/dense,output/dense}/* <-> {m}
    {m:layernorm_before,layernorm_after}/*                 <-> {m}
    """,
) + _under(
    "(vit/)",
    "(vit.)",
    """
    embeddings/patch_embeddings/projection/kernel          <-> embeddings.patch_embeddings.projection : conv
    embeddings/patch_embeddings/projection/bias            <-> embeddings.patch_embeddings.projection
    embeddings/{m:cls_token,position_embeddings}           <-> embeddings.{m} : param
    layernorm/*                                            <-> layernorm
    pooler/dense/*                                         <-> pooler.dense
    """,
)
_VIT_HEADS = "classifier/* <-> classifier"

_CLIP = _under(
    "{t:text_model,vision_model}/encoder/layers/{i}/",
    "{t}.encoder.layers.{i}.",
    """
    self_attn/{m:q_proj,k_proj,v_proj,out_proj}/*          <-> self_attn.{m}
    self_attn/{m:q_proj,k_proj,v_proj}/*[in, out, out]     <-> self_attn.{m}
    self_attn/out_proj/*[in, in, out]                      <-> self_attn.out_proj
    {m:mlp/fc1,mlp/fc2,layer_norm1,layer_norm2}/*          <-> {m}
    """,
)
_CLIP_REST = """
    {t:text_model,vision_model}/embeddings/{m:token_embedding,position_embedding}/embedding <-> {t}.embeddings.{m}
    vision_model/embeddings/patch_embedding/kernel         <-> vision_model.embeddings.patch_embedding : conv
    vision_model/embeddings/class_embedding                <-> vision_model.embeddings.class_embedding : param
    text_model/final_layer_norm/*                          <-> text_model.final_layer_norm
    vision_model/{m:pre_layrnorm,post_layernorm}/*         <-> vision_model.{m}
    {m:visual_projection,text_projection}/*                <-> {m}
    logit_scale                                            <-> logit_scale : param
    """

_TEXTS = {
    "bert": (_encoder("bert"), _BERT_HEADS),
    "roberta": (_encoder("roberta"), _ROBERTA_HEADS),
    "gpt2": (_GPT2, _GPT2_HEADS),
    "gpt2_plain": (_GPT2.replace("[out, in]", "[in, out]"), _GPT2_PLAIN, _GPT2_HEADS),
    "llama": (_LLAMA, _LLAMA_HEADS),
    "mistral": (_LLAMA, _LLAMA_HEADS),
    "qwen": (_LLAMA, _LLAMA_HEADS),
    "gemma": (_LLAMA, _LLAMA_HEADS, _GEMMA_EINSUM),
    "t5": (_T5, _T5_REST),
    "vit": (_VIT, _VIT_HEADS),
    "clip": (_CLIP, _CLIP_REST),
}


def name_maps() -> tuple[str, ...]:
    """The names of the ready maps."""
    return tuple(_TEXTS)


@functools.cache
def _ready(name: str) -> NameMap:
    text = "\n".join(_TEXTS[name])
    numbered = NameMap.parse(text)
    underscored = NameMap.parse(re.sub(r"/\{i\}(?=/)", "_{i}", text)) if "/{i}/" in text else numbered
    return numbered | underscored | numbered.scanned()


def name_map(name: NameMap | str) -> NameMap:
    """The ready map of a family, or ``name`` itself where it is a map already.

    Raises:
        ValueError: There is no ready map of that name.

    >>> import jax.numpy as jnp
    >>> print(name_map("llama").table({"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 4, 8))}}}}))
    layers/mlp/up_proj/kernel[0] <-> layers.0.mlp.up_proj.weight
    layers/mlp/up_proj/kernel[1] <-> layers.1.mlp.up_proj.weight
    """
    if isinstance(name, NameMap):
        return name
    if name not in _TEXTS:
        raise ValueError(
            f"There is no ready name map {name!r}; there are {', '.join(_TEXTS)}.{suggest(name, _TEXTS)} "
            "Or write a NameMap of your own."
        )
    return _ready(name)
