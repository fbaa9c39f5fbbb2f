"""Where adapted products are most of the work, a step takes at most 0.75 of the FLOPs of the materialized one.

The nets of Hugging Face, as in the zoo but wide, on shapes alone: nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lojax
from lojax.adapters.adapter import is_adapter
from lojax.adapters.paths import map_paths
from tests.nets.zoo import Case
from tests.nets.zoo.transformers import BERT, GPT2, IMAGES, T5, VIT, build, row

pytestmark = pytest.mark.optimized(False)  # FLOPs are counted before the optimizations that this leaves out

WIDE = BERT | {"hidden_size": 256, "intermediate_size": 1024}
IDS = jnp.zeros((8, 16), jnp.int32)
NETS = (
    row("bert", 7, build("FlaxBertModel", "BertConfig", WIDE, IDS)),
    row("gpt2", 4, build("FlaxGPT2Model", "GPT2Config", GPT2 | {"n_embd": 256}, IDS)),
    row("llama", 8, build("FlaxLlamaForCausalLM", "LlamaConfig", WIDE | {"max_position_embeddings": 128}, IDS)),
    row("t5", 16, build("FlaxT5EncoderModel", "T5Config", T5 | {"d_model": 256, "d_ff": 1024, "d_kv": 64}, IDS)),
    row("vit", 8, build("FlaxViTModel", "ViTConfig", WIDE | VIT, jnp.zeros((8, *IMAGES.shape[1:])))),
)


@pytest.mark.parametrize("case", NETS, ids=lambda case: case.name)
def test_a_step_takes_no_more_than_three_quarters_of_the_materialized_one(case: Case) -> None:
    pytest.importorskip(case.requires)
    with jax.numpy_dtype_promotion(case.promotion):
        net = case.build()
        model = lojax.wrap(net.net, case.targets, rank=4, strict=True)
        trees = model.init(jax.random.key(0), net.params, *net.args)

        def materialize(weight: Any, trained: Any) -> Any:
            if not is_adapter(trained):
                return weight if trained is None else trained
            return weight + trained.scale * (trained.a @ trained.b.reshape(4, -1)).reshape(weight.shape)

        def ours(lora: Any, frozen: Any) -> Any:
            return model.apply(frozen, lora, *net.args)

        def theirs(lora: Any, frozen: Any) -> Any:
            return net.native(map_paths(lambda _, *leaf: materialize(*leaf), frozen, lora))

        assert flops(ours, trees) <= 0.75 * flops(theirs, trees)


def flops(f: Callable[..., Any], trees: Any) -> float:
    """FLOPs of a compiled gradient step, by XLA's own count."""

    def step(lora: Any, frozen: Any) -> Any:
        return sum(jnp.sum(y) for y in jax.tree.leaves(f(lora, frozen)) if jnp.issubdtype(y.dtype, jnp.floating))

    compiled = jax.jit(jax.grad(step)).lower(*trees[::-1]).compile({"xla_backend_optimization_level": 0})
    return compiled.cost_analysis()["flops"]
