"""Ready name maps, one for each family of models. Read one as a model for your own.

Each covers several layouts of the same network, told apart by path and number of axes: that of transformers
Flax; flat and per-head kernels (``[in, out]`` or ``[in, out, out]``) as NNX and plain code have them; numbered
layers as ``layers/0`` or ``layers_0``; and layers scanned over a leading axis. A map renames and reshapes: it
assumes that the base weights themselves were converted without permuting heads or rotary halves.
"""

from __future__ import annotations

import functools
import re

from lojax.store.peft.namemap import NameMap


def _encoder(base: str, heads: str) -> str:
    """BERT and its kin: ``base`` is the name under which a model with a head holds its encoder."""
    p, n = f"({base}/)", f"({base}.)"
    layer, torch = p + "encoder/layer/{i}", n + "encoder.layer.{i}"
    return f"""
    {p}embeddings/{{m:word_embeddings,position_embeddings,token_type_embeddings}}/* <-> {n}embeddings.{{m}}
    {p}embeddings/LayerNorm/*                                <-> {n}embeddings.LayerNorm
    {layer}/attention/self/{{m:query,key,value}}/*           <-> {torch}.attention.self.{{m}}
    {layer}/attention/{{m:query,key,value}}/*                <-> {torch}.attention.self.{{m}}
    {layer}/attention/{{m:query,key,value}}/*[in, out, out]  <-> {torch}.attention.self.{{m}}
    {layer}/attention/{{m:output/dense,output/LayerNorm}}/*  <-> {torch}.attention.{{m}}
    {layer}/attention/out/*[in, in, out]                     <-> {torch}.attention.output.dense
    {layer}/attention/out/*                                  <-> {torch}.attention.output.dense
    {layer}/crossattention/self/{{m:query,key,value}}/*      <-> {torch}.crossattention.self.{{m}}
    {layer}/crossattention/{{m:output/dense,output/LayerNorm}}/* <-> {torch}.crossattention.{{m}}
    {layer}/{{m:intermediate/dense,output/dense,output/LayerNorm}}/* <-> {torch}.{{m}}
    {p}pooler/dense/*                                        <-> {n}pooler.dense
    {heads}
    """


_BERT = _encoder(
    "bert",
    """
    {m:classifier,qa_outputs,cls/seq_relationship,cls/predictions/decoder}/* <-> {m}
    cls/predictions/transform/{m:dense,LayerNorm}/* <-> cls.predictions.transform.{m}
    cls/predictions/bias                            <-> cls.predictions.bias : param
    """,
)

_ROBERTA = _encoder(
    "roberta",
    """
    classifier/{m:dense,out_proj}/*          <-> classifier.{m}
    {m:classifier,qa_outputs}/*              <-> {m}
    lm_head/{m:dense,layer_norm,decoder}/*   <-> lm_head.{m}
    lm_head/bias                             <-> lm_head.bias : param
    """,
)

_GPT2 = """
    (transformer/){m:wte,wpe}/embedding                   <-> (transformer.){m}
    (transformer/)h/{i}/{m:ln_1,ln_2,ln_cross_attn}/*     <-> (transformer.)h.{i}.{m}
    (transformer/)h/{i}/{a:attn,crossattention}/{m:c_attn,c_proj,q_attn}/*[out, in] <-> (transformer.)h.{i}.{a}.{m} : conv1d
    (transformer/)h/{i}/mlp/{m:c_fc,c_proj}/*[out, in]    <-> (transformer.)h.{i}.mlp.{m} : conv1d
    (transformer/)ln_f/*                                  <-> (transformer.)ln_f
    {m:lm_head,score}/*                                   <-> {m}
    """
"""As transformers Flax has it: kernels ``[out, in]``."""

_GPT2_PLAIN = """
    (transformer/)h/{i}/attn/c_attn/*[in, out, out, out]  <-> (transformer.)h.{i}.attn.c_attn : conv1d
    (transformer/)h/{i}/attn/c_attn/*[in, out, out]       <-> (transformer.)h.{i}.attn.c_attn : conv1d
    (transformer/)h/{i}/attn/c_proj/*[in, in, out]        <-> (transformer.)h.{i}.attn.c_proj : conv1d
    (transformer/)h/{i}/{m:attn/c_attn,attn/c_proj,mlp/c_fc,mlp/c_proj}/*[in, out] <-> (transformer.)h.{i}.{m} : conv1d
    """
"""Kernels ``[in, out]``, as everyone else has them; fused qkv as ``[in, 3 * out]`` or ``[in, 3, heads, size]``."""

_LLAMA = """
    (model/)embed_tokens/embedding                            <-> (model.)embed_tokens
    (model/)layers/{i}/self_attn/{m:q_proj,k_proj,v_proj}/*[in, out, out] <-> (model.)layers.{i}.self_attn.{m}
    (model/)layers/{i}/self_attn/o_proj/*[in, in, out]        <-> (model.)layers.{i}.self_attn.o_proj
    (model/)layers/{i}/self_attn/{m:q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}/* <-> (model.)layers.{i}.self_attn.{m}
    (model/)layers/{i}/mlp/{m:gate_proj,up_proj,down_proj}/*  <-> (model.)layers.{i}.mlp.{m}
    (model/)layers/{i}/mlp/gate_up_proj/*[in, {m:gate_proj,up_proj}, out] <-> (model.)layers.{i}.mlp.{m}
    (model/)layers/{i}/mlp/gate_up_proj/*[in, {m:gate_proj,up_proj}*out]  <-> (model.)layers.{i}.mlp.{m}
    (model/)layers/{i}/mlp/{gate:router=gate}/*               <-> (model.)layers.{i}.mlp.{gate}
    (model/)layers/{i}/mlp/experts/{m:gate_proj,up_proj,down_proj}/*[{e}, in, out] <-> (model.)layers.{i}.mlp.experts.{e}.{m}
    (model/)layers/{i}/{m*}/*                                 <-> (model.)layers.{i}.{m}
    (model/)norm/*                                            <-> (model.)norm
    {m:lm_head,score}/*                                       <-> {m}
    """

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

_T5 = """
    shared/embedding                                                        <-> shared
    {s:encoder,decoder}/block/{i}/layer/{j}/{a:SelfAttention,EncDecAttention}/{m:q,k,v,o}/* <-> {s}.block.{i}.layer.{j}.{a}.{m}
    {s:encoder,decoder}/block/{i}/layer/{j}/{a:SelfAttention,EncDecAttention}/{m:q,k,v}/*[in, out, out] <-> {s}.block.{i}.layer.{j}.{a}.{m}
    {s:encoder,decoder}/block/{i}/layer/{j}/{a:SelfAttention,EncDecAttention}/o/*[in, in, out] <-> {s}.block.{i}.layer.{j}.{a}.o
    {s:encoder,decoder}/block/{i}/layer/{j}/SelfAttention/relative_attention_bias/embedding <-> {s}.block.{i}.layer.{j}.SelfAttention.relative_attention_bias
    {s:encoder,decoder}/block/{i}/layer/{j}/DenseReluDense/{m:wi,wi_0,wi_1,wo}/* <-> {s}.block.{i}.layer.{j}.DenseReluDense.{m}
    {s:encoder,decoder}/block/{i}/layer/{j}/layer_norm/*                    <-> {s}.block.{i}.layer.{j}.layer_norm
    {s:encoder,decoder}/final_layer_norm/*                                  <-> {s}.final_layer_norm
    lm_head/*                                                               <-> lm_head
    """

_VIT = """
    (vit/)embeddings/patch_embeddings/projection/kernel  <-> (vit.)embeddings.patch_embeddings.projection : conv
    (vit/)embeddings/patch_embeddings/projection/bias    <-> (vit.)embeddings.patch_embeddings.projection
    (vit/)embeddings/{m:cls_token,position_embeddings}   <-> (vit.)embeddings.{m} : param
    (vit/)encoder/layer/{i}/attention/attention/{m:query,key,value}/* <-> (vit.)encoder.layer.{i}.attention.attention.{m}
    (vit/)encoder/layer/{i}/attention/attention/{m:query,key,value}/*[in, out, out] <-> (vit.)encoder.layer.{i}.attention.attention.{m}
    (vit/)encoder/layer/{i}/{m:attention/output/dense,intermediate/dense,output/dense}/* <-> (vit.)encoder.layer.{i}.{m}
    (vit/)encoder/layer/{i}/{m:layernorm_before,layernorm_after}/* <-> (vit.)encoder.layer.{i}.{m}
    (vit/)layernorm/*                                    <-> (vit.)layernorm
    (vit/)pooler/dense/*                                 <-> (vit.)pooler.dense
    classifier/*                                         <-> classifier
    """

_CLIP = """
    {t:text_model,vision_model}/embeddings/{m:token_embedding,position_embedding}/embedding <-> {t}.embeddings.{m}
    vision_model/embeddings/patch_embedding/kernel       <-> vision_model.embeddings.patch_embedding : conv
    vision_model/embeddings/class_embedding              <-> vision_model.embeddings.class_embedding : param
    {t:text_model,vision_model}/encoder/layers/{i}/self_attn/{m:q_proj,k_proj,v_proj}/*[in, out, out] <-> {t}.encoder.layers.{i}.self_attn.{m}
    {t:text_model,vision_model}/encoder/layers/{i}/self_attn/out_proj/*[in, in, out] <-> {t}.encoder.layers.{i}.self_attn.out_proj
    {t:text_model,vision_model}/encoder/layers/{i}/{m:self_attn/q_proj,self_attn/k_proj,self_attn/v_proj,self_attn/out_proj}/* <-> {t}.encoder.layers.{i}.{m}
    {t:text_model,vision_model}/encoder/layers/{i}/{m:mlp/fc1,mlp/fc2,layer_norm1,layer_norm2}/* <-> {t}.encoder.layers.{i}.{m}
    text_model/final_layer_norm/*                        <-> text_model.final_layer_norm
    vision_model/{m:pre_layrnorm,post_layernorm}/*       <-> vision_model.{m}
    {m:visual_projection,text_projection}/*              <-> {m}
    logit_scale                                          <-> logit_scale : param
    """

_TEXTS = {
    "bert": (_BERT,),
    "roberta": (_ROBERTA,),
    "gpt2": (_GPT2,),
    "gpt2_plain": (_GPT2.replace("[out, in]", "[in, out]"), _GPT2_PLAIN),
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen": (_LLAMA,),
    "gemma": (_LLAMA, _GEMMA_EINSUM),
    "t5": (_T5,),
    "vit": (_VIT,),
    "clip": (_CLIP,),
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
        known = ", ".join(_TEXTS)
        raise ValueError(f"There is no ready name map {name!r}; there are {known}. Or write a NameMap of your own.")
    return _ready(name)
