"""`trim` against brute force, and `extract` against the difference of two checkpoints."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from helpers import assert_same_bits, message, trained

import lojax
from lojax.adapters.spectrum import leading_directions
from lojax.adapters.truncation import extract, trim
from tests.adapters.test_algebra import SHAPES, as_matrices, update
from tests.adapters.test_algebra import adapter as make

RNG = np.random.default_rng(0)


def uneven_adapter(kind: str, seed: int = 0) -> lojax.Adapter:
    """An adapter whose singular values fall by about 3 from one to the next, differently for each layer."""
    one = make(kind, seed, 4, 1.5)
    stack = 1 if "stack" in SHAPES[kind][1] else 0
    rng = np.random.default_rng(seed)
    decay = np.exp(-rng.uniform(0.3, 1.5, one.b.shape[: stack + 1]).cumsum(-1))
    return dataclasses.replace(
        one, b=one.b * jnp.asarray(decay, jnp.float32).reshape(*decay.shape, *[1] * (one.b.ndim - stack - 1))
    )


def kept_energy(matrix: np.ndarray, rank: int) -> float:
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return s[:rank].sum() / s.sum()


@pytest.mark.parametrize("energy", [0.6, 0.9, 0.999])
@pytest.mark.parametrize("kind", SHAPES)
def test_trim_keeps_the_energy_with_the_least_ranks(kind, energy):
    one = uneven_adapter(kind)
    small = trim({"w": one}, energy)["w"]
    before, after = (as_matrices(kind, update(kind, x)) for x in (one, small))
    ranks = small.ranks or (small.rank,) * len(before)
    assert small.scale == one.scale and max(ranks) == small.rank
    for w, kept, rank in zip(before, after, ranks, strict=True):
        assert rank == next(k for k in range(1, 5) if kept_energy(w, k) >= energy)  # brute force
        u, s, vt = np.linalg.svd(w)
        np.testing.assert_allclose(kept, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=2e-5)
        assert 1 - np.linalg.norm(w - kept) ** 2 / np.linalg.norm(w) ** 2 >= energy - 1e-6


def test_ranks_that_nothing_uses_go_and_others_stay_as_they_are():
    one = make("dense", 0, 3)
    wide = lojax.resize({"w": one}, 7)
    assert trim(wide, 1.0)["w"].rank == 3
    np.testing.assert_allclose(update("dense", trim(wide, 1.0)["w"]), update("dense", one), atol=1e-5)
    assert trim({"w": one}, 1.0)["w"] is one
    flat = dataclasses.replace(one, a=jnp.eye(6)[:, :3], b=jnp.eye(5)[:3])
    assert trim({"w": flat}, 0.99)["w"] is flat
    zero = dataclasses.replace(one, b=jnp.zeros_like(one.b))
    assert trim({"w": zero})["w"].rank == 1 and not update("dense", trim({"w": zero})["w"]).any()


def test_a_stack_gets_a_rank_for_each_layer_and_still_computes():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 8, 6)), jnp.float32), "b": jnp.zeros(6)}
    model = lojax.wrap(
        lambda p, x: jax.lax.scan(lambda x, w: ((x @ w)[..., :6] @ jnp.eye(6, 8), None), x, p["w"])[0], "w"
    )
    rule = dataclasses.replace(model, rules=(dataclasses.replace(model.rules[0], rank=4),))
    frozen, lora = rule.init(jax.random.key(0), params, jnp.ones((2, 8)))
    one = trained(lora)["w"]
    strength = jnp.asarray([[1, 0, 0, 0], [1, 0.5, 0, 0], [1, 0.6, 0.4, 0.2]], jnp.float32)
    lora = {"w": dataclasses.replace(one, b=one.b * strength[:, :, None]), "b": None}
    small = trim(lora, 1.0)
    assert small["w"].ranks == (1, 2, 4) and small["w"].rank == 4
    assert not np.asarray(small["w"].a)[0, :, 1:].any() and not np.asarray(small["w"].b)[1, 2:].any()
    x = jnp.asarray(RNG.normal(size=(2, 8)), jnp.float32)
    np.testing.assert_allclose(model.apply(frozen, small, x), model.apply(frozen, lora, x), rtol=1e-4, atol=1e-4)
    again = trim(small, 1.0)
    assert again["w"] is small["w"]


def test_scales_of_layers_negative_scales_and_boxes():
    one = make("scanned", 0, 4, 1.0)
    uneven = dataclasses.replace(one, scale=(0.5, 2.0, -1.0))
    small = trim({"w": uneven}, 0.8)["w"]
    assert small.scale == 1.0 and small.rank < 4
    expected = as_matrices("scanned", update("scanned", uneven))
    for w, kept in zip(expected, as_matrices("scanned", update("scanned", small)), strict=True):
        assert 1 - np.linalg.norm(w - kept) ** 2 / np.linalg.norm(w) ** 2 >= 0.8 - 1e-6
    negative = dataclasses.replace(uneven_adapter("dense"), scale=-2.0)
    kept, w = trim({"w": negative}, 0.9)["w"], update("dense", negative)
    assert kept.rank < 4 and kept.scale == -2.0
    assert np.linalg.norm(w - update("dense", kept)) ** 2 <= 0.1 * np.linalg.norm(w) ** 2
    boxed = meta.Partitioned(jnp.ones((6, 5)), names=("x", "y"))
    _, lora = lojax.init(jax.random.key(0), {"w": boxed}, "w", rank=3, dtype=jnp.bfloat16)
    small = trim(trained(lora), 0.5)["w"]
    assert small.a.names == ("x", None) and small.a.value.dtype == jnp.bfloat16 and small.rank < 3


def test_what_trim_refuses():
    lora = {"w": make("dense", 0)}
    for energy in (0, 1.5, "most", float("nan")):
        assert "expected a share above 0 and up to 1" in message(ValueError, trim, lora, energy)
    dora = {"w": dataclasses.replace(make("dense", 0), magnitude=jnp.ones(5))}
    assert "w: the adapter holds magnitude" in message(ValueError, trim, dora)
    _, pissa = lojax.init(jax.random.key(0), {"w": jnp.eye(6)}, "w", rank=2, init="pissa")
    assert "w: the start of this adapter (pissa) was taken out" in message(ValueError, trim, pissa)
    assert trim(lojax.subtract(pissa, pissa))["w"].rank == 1
    bad = {"w": dataclasses.replace(make("dense", 0), b=jnp.full((3, 5), jnp.nan))}
    assert "w: the adapter holds NaN or infinity" in message(ValueError, trim, bad)
    assert "under jit" in message(ValueError, jax.jit(trim), lora)


# --- extract ---


def checkpoints(kind: str):
    shape, axes = SHAPES[kind]
    base = {"w": jnp.asarray(RNG.normal(size=shape), jnp.float32), "bias": jnp.ones(3), "same": jnp.ones((2, 2))}
    tuned = {**base, "w": base["w"] + jnp.asarray(RNG.normal(size=shape), jnp.float32) * 0.1, "bias": jnp.zeros(3)}
    _, like = lojax.init(jax.random.key(0), base, "w", rank=1, axes=axes)
    return base, tuned, like


@pytest.mark.parametrize("kind", SHAPES)
def test_extract_is_the_nearest_of_its_rank_and_exact_at_full_rank(kind):
    base, tuned, like = checkpoints(kind)
    difference = as_matrices(kind, np.asarray(tuned["w"]) - np.asarray(base["w"]))
    for rank in (1, 2):
        lora = extract(base, tuned, rank=rank, like=like)
        assert (lora["w"].rank, lora["w"].scale, lora["w"].axes) == (rank, 1.0, SHAPES[kind][1])
        u, s, vt = np.linalg.svd(difference, full_matrices=False)
        nearest = (u[:, :, :rank] * s[:, None, :rank]) @ vt[:, :rank]
        np.testing.assert_allclose(as_matrices(kind, update(kind, lora["w"])), nearest, atol=1e-5)
    whole = extract(base, tuned, rank=100, like=jax.eval_shape(lambda: like))
    assert whole["same"] is None and whole["bias"] is tuned["bias"] and whole["w"].requested_rank == 100
    merged = lojax.merge(lojax.peft.freeze(base, whole), whole)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, tuned)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(16)(x))
        return nn.Dense(4)(nn.relu(nn.Dense(24)(x)))


def test_a_tuned_net_comes_back():
    net, x = Net(), jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)
    base, other = (net.init(jax.random.key(i), x) for i in range(2))
    tuned = jax.tree.map(lambda x, y: x + 0.5 * y + 0.1, base, other)
    lora = extract(base, tuned, energy=1.0)
    model = lojax.wrap(net, "**/kernel")
    got = model.apply(lojax.peft.freeze(base, lora), lora, x)
    np.testing.assert_allclose(got, net.apply(tuned, x), atol=1e-4)
    assert_same_bits(lora["params"]["Dense_0"]["bias"], tuned["params"]["Dense_0"]["bias"])


@pytest.mark.parametrize("kind", SHAPES)
def test_energy_gives_the_least_ranks(kind):
    base, tuned, like = checkpoints(kind)
    difference = as_matrices(kind, np.asarray(tuned["w"]) - np.asarray(base["w"]))
    for energy in (0.7, 0.95):
        one = extract(base, tuned, energy=energy, like=like)["w"]
        least = [next(k for k in range(1, 9) if kept_energy(w, k) >= energy) for w in difference]
        assert list(one.ranks or (one.rank,) * len(difference)) == least
        assert extract(base, tuned, energy=energy, rank=1, like=like)["w"].rank == 1


def test_what_like_and_full_leave_out():
    base = {"w": jnp.eye(4), "v": jnp.eye(4), "n": jnp.arange(3), "x": 1.0}
    tuned = {"w": 2 * jnp.eye(4), "v": 3 * jnp.eye(4), "n": jnp.arange(3) + 1, "x": 2.0}
    _, like = lojax.init(jax.random.key(0), base, "w", rank=1)
    lora = extract(base, tuned, rank=2, like=like)
    assert lora["w"].rank == 2 and lora["v"] is tuned["v"] and lora["n"] is tuned["n"] and lora["x"] == 2.0
    lora = extract(base, tuned, rank=2, like=like, full=False)
    assert lora["w"].rank == 2 and [lora[name] for name in "vnx"] == [None, None, None]
    assert [extract(base, tuned, rank=2)[name].rank for name in "wv"] == [2, 2]


def test_layers_that_did_not_change_have_rank_0():
    base = {"w": jnp.asarray(RNG.normal(size=(3, 6, 5)), jnp.float32)}
    tuned = {"w": base["w"].at[1].add(1.0)}
    _, like = lojax.init(jax.random.key(0), base, "w", rank=1, axes=("stack", "in", "out"))
    one = extract(base, tuned, energy=0.99, like=like)["w"]
    assert one.ranks == (0, 1, 0)
    np.testing.assert_allclose(lojax.merge(base, {"w": one})["w"], tuned["w"], atol=1e-5)
    assert [row.norm > 0 for row in lojax.analyze(base, {"w": one}).rows] == [False, True, False]
    assert lojax.trim({"w": one})["w"].ranks == (0, 1, 0)


def test_a_quantized_base_and_other_dtypes():
    base = lojax.quantize({"w": jnp.asarray(RNG.normal(size=(64, 6)), jnp.bfloat16)}, "int8")
    tuned = {"w": (base["w"].dense() + 1).astype(jnp.bfloat16)}
    lora = extract(base, tuned, rank=6)
    difference = np.asarray(tuned["w"], np.float32) - np.asarray(base["w"].dense(), np.float32)
    np.testing.assert_allclose(np.asarray(lora["w"].a @ lora["w"].b), difference, atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 60), (60, 200)])
def test_the_randomized_decomposition_is_near_the_exact_one(shape):
    u, v = (np.linalg.qr(RNG.normal(size=(n, 60)))[0] for n in shape)
    w = (u * 0.8 ** np.arange(60)) @ v.T
    s, found = leading_directions(w, 5, steps=4)
    np.testing.assert_allclose(s, 0.8 ** np.arange(5), rtol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(found * v[:, :5], 0)), 1, atol=1e-6)
    base, tuned = {"w": jnp.zeros(shape)}, {"w": jnp.asarray(w, jnp.float32)}
    quick, exact = (extract(base, tuned, rank=5, steps=steps)["w"] for steps in (4, None))
    np.testing.assert_allclose(quick.a @ quick.b, exact.a @ exact.b, atol=1e-5)
    # 1 - 0.64^k of the energy is in the first k: the rest that was never decomposed counts too.
    for energy, rank in ((0.5, 2), (0.8, 4), (0.99, 5)):
        assert extract(base, tuned, rank=5, energy=energy, steps=4)["w"].rank == rank


def test_what_extract_refuses():
    base, tuned, like = checkpoints("dense")
    assert "Pass rank=, energy=, or both" in message(ValueError, extract, base, tuned)
    assert "rank=0" in message(ValueError, extract, base, tuned, rank=0)
    assert "energy=2" in message(ValueError, extract, base, tuned, energy=2)
    assert "steps=2 with rank=None" in message(ValueError, extract, base, tuned, energy=0.9, steps=2)
    assert "full='no'" in message(TypeError, extract, base, tuned, rank=1, full="no")
    other = {**tuned, "w": jnp.ones((6, 6))}
    assert "w: base and tuned hold (6, 5) and (6, 6)" in message(ValueError, extract, base, other, rank=1)
    text = message(ValueError, extract, {"w": base["w"]}, tuned, rank=1)
    assert "is in tuned but not in base" in text
    assert "w: base and tuned hold nothing" in message(ValueError, extract, {**base, "w": None}, tuned, rank=1)
    wrong = {**like, "w": make("out first", 0)}
    text = message(ValueError, extract, base, tuned, rank=1, like={**wrong, "w": make("heads", 0)})
    assert "w: like has an adapter for a weight of shape (6, 2, 3), and base holds float32[6, 5]" in text
    bad = {**tuned, "w": tuned["w"].at[0, 0].set(jnp.nan)}
    assert "w: tuned - base holds NaN" in message(ValueError, extract, base, bad, rank=1)
    assert "under jit" in message(ValueError, jax.jit(lambda b, t: extract(b, t, rank=1)), base, tuned)
