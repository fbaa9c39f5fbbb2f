"""Published numbers and the design's own, recomputed: known answers that no code of ours wrote."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from lojax import Adapter


def shapes(tree):
    """Nested dicts of shapes as a tree of `ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def dense(m, n):
    return {"kernel": (m, n), "bias": (n,)}


def norm(d):
    return {"scale": (d,), "bias": (d,)}


def counted(params, targets, **settings):
    def init(params):
        return lojax.init(jax.random.key(0), params, targets, **settings)

    return lojax.summary(*jax.eval_shape(init, shapes(params)))


# --- the worked example of four by four ---

A = ((0.2, -0.1, 0.3, 0.05), (0.1, 0.4, -0.2, 0.15))
B = ((0.5, 0.0), (0.1, 0.3), (-0.2, 0.4), (0.0, -0.1))
DELTA = (
    (0.10, -0.05, 0.15, 0.025),
    (0.05, 0.11, -0.03, 0.05),
    (0.00, 0.18, -0.14, 0.05),
    (-0.01, -0.04, 0.02, -0.015),
)


def test_the_four_by_four_example():
    # The paper's A is [r, in] and B [out, r]; a kernel here is [in, out], so everything is transposed.
    adapter = Adapter(a=jnp.asarray(A).T, b=jnp.asarray(B).T, scale=1.0, axes=("in", "out"))
    merged = lojax.merge(jnp.zeros((4, 4)), adapter)
    np.testing.assert_allclose(merged.T, DELTA, atol=1e-7)
    rows = lojax.transform(lambda w, x: x @ w)(jnp.zeros((4, 4)), adapter, jnp.eye(4))
    np.testing.assert_allclose(rows.T, DELTA, atol=1e-7)
    torch_layout = Adapter(a=jnp.asarray(A).T, b=jnp.asarray(B).T, scale=1.0, axes=("out", "in"))
    np.testing.assert_allclose(lojax.merge(jnp.zeros((4, 4)), torch_layout), DELTA, atol=1e-7)


# --- counts by shapes alone ---


def test_a_thousand_by_a_thousand():
    for rank, trainable in ((2, 4_000), (8, 16_000)):
        summary = counted({"w": (1000, 1000)}, "w", rank=rank)
        assert (summary.trainable, summary.total - summary.trainable) == (trainable, 1_000_000)


def test_opt_6_7b():
    d, hidden = 4096, 16384
    layer = {"self_attn": {name: dense(d, d) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}}
    layer |= {"norm_1": norm(d), "fc1": dense(d, hidden), "fc2": dense(hidden, d), "norm_2": norm(d)}
    params = {"tokens": (50272, d), "positions": (2050, d), "norm": norm(d)}
    params |= {"layers": {str(i): layer for i in range(32)}}
    summary = counted(params, ["**/q_proj/kernel", "**/v_proj/kernel"], rank=16)
    assert summary.line == "trainable params: 8,388,608 || all params: 6,666,862,592 || trainable%: 0.1258"
    assert summary.percent == 0.12582542214183376


def test_roberta_base_with_a_head_of_two_classes():
    d, hidden = 768, 3072
    layer = {
        "attention": {"self": {name: dense(d, d) for name in ("query", "key", "value")}},
        "intermediate": {"dense": dense(d, hidden)},
        "output": {"dense": dense(hidden, d), "norm": norm(d)},
    }
    layer["attention"]["output"] = {"dense": dense(d, d), "norm": norm(d)}
    params = {
        "embeddings": {"words": (50265, d), "positions": (514, d), "types": (1, d), "norm": norm(d)},
        "layer": {str(i): layer for i in range(12)},
        "classifier": {"dense": dense(d, d), "out_proj": dense(d, 2)},
    }
    targets = ["**/query/kernel", "**/attention/output/dense/kernel", "layer/*/output/dense/kernel"]
    summary = counted(params, targets, rank=4, train="classifier/**")
    assert summary.line == "trainable params: 923,906 || all params: 124,978,946 || trainable%: 0.7392"
    (row,) = (row for row in summary.rows if row.path == "layer/0/output/dense/kernel")
    assert row.trainable == 12_288 + 3_072  # lora_A and lora_B


@pytest.mark.parametrize(("rank", "trainable"), [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_gpt_3_175b(rank, trainable):
    d, layers = 12_288, 96
    stacked = ("q", "k", "v", "o")
    params = {"tokens": (50257, d), "positions": (2048, d)}
    params |= dict.fromkeys(stacked, (layers, d, d)) | {"up": (layers, d, 4 * d), "down": (layers, 4 * d, d)}
    summary = counted(params, ["q", "v"], rank=rank, axes=("stack", "in", "out"))
    assert summary.trainable == trainable
    base = summary.total - trainable
    assert round(base / 1e9) == 175
    if rank == 4:  # "10,000 times fewer", and 350 GB against 35 MB at two bytes each
        assert 9_000 < base / trainable < 10_000
        assert (round(2 * base / 1e9), round(2 * trainable / 2**20)) == (349, 36)


# --- the design's table of costs ---


def products(strategy, *, t, m, n, r):
    """Floating-point operations of forward and backward (dA, dB, dx), as the design gives them."""
    return {
        "frozen": 4 * t * m * n,
        "materialize": 6 * t * m * n + 6 * m * n * r,
        "factored": 4 * t * m * n + 6 * t * r * (m + n),
        "fused": 4 * t * m * n + 4 * t * r * (m + n) + 4 * m * n * r,
    }[strategy]


def test_the_design_table_of_costs():
    size = {"t": 8192, "m": 4096, "n": 4096, "r": 16}
    floor = products("frozen", **size)
    ratios = {name: round(products(name, **size) / floor, 3) for name in ("materialize", "factored", "fused")}
    assert ratios == {"materialize": 1.503, "factored": 1.012, "fused": 1.010}


def test_a_merge_in_bfloat16_loses_small_updates():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(1024, 1024)).astype(np.float32)
    a, b = rng.normal(size=(1024, 8)).astype(np.float32), rng.normal(size=(8, 1024)).astype(np.float32)
    adapter = Adapter(a=a, b=b, scale=1e-3 * np.linalg.norm(w) / np.linalg.norm(a @ b), axes=("in", "out"))
    base = jnp.asarray(w, jnp.bfloat16)
    before, after = (np.asarray(x, np.float32) for x in (base, lojax.merge(base, adapter)))
    assert 0.77 < (before == after).mean() < 0.79
    update = adapter.scale * a @ b
    assert 0.77 < np.linalg.norm(after - before - update) / np.linalg.norm(update) < 0.80


# --- what XLA counts for one layer: d = 2048, T = 4096, r = 16, float32 ---

D, TOKENS, RANK = 2048, 4096, 16


def compiled(forward):
    def loss(lora, w, x):
        return jnp.sum(forward(w, lora, x) ** 2)

    w, x = jax.ShapeDtypeStruct((D, D), jnp.float32), jax.ShapeDtypeStruct((TOKENS, D), jnp.float32)
    lora = jax.eval_shape(lambda w: lojax.init(jax.random.key(0), w, "", rank=RANK, alpha=32)[1], w)
    return jax.jit(jax.grad(loss, argnums=(0, 2))).lower(lora, w, x).compile()


def test_one_factored_layer_costs_what_the_design_says():
    program = compiled(lojax.transform(lambda w, x: x @ w, strict=True, execution="factored"))
    bound = products("factored", t=TOKENS, m=D, n=D, r=RANK)
    assert bound <= program.cost_analysis()["flops"] <= 1.02 * bound
    assert program.memory_analysis().temp_size_in_bytes <= 33 * 2**20


def test_one_materialized_layer_costs_half_as_much_again():
    program = compiled(lambda w, lora, x: x @ lojax.merge(w, lora))
    bound = products("materialize", t=TOKENS, m=D, n=D, r=RANK)
    assert bound <= program.cost_analysis()["flops"] <= 1.02 * bound
    assert program.memory_analysis().temp_size_in_bytes >= 48 * 2**20
