"""`tame`, by the formula of its paper and of PEFT, on full matrices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message, trained

import lojax
from lojax.adapters.intruders import tame

RNG = np.random.default_rng(0)


def formula(w0: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, keep: float) -> tuple[np.ndarray, int]:
    """The new update of a matrix ``[m, n]`` as PEFT computes it, on full matrices, and the number of intruders."""
    merged = w0 + scale * a @ b
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    base = np.linalg.svd(w0, full_matrices=False)[2]
    cosines = np.abs(vt @ base.T).max(1)[:10]
    intruders = np.flatnonzero(cosines < 0.5)
    mitigated = merged + (keep - 1) * (u[:, intruders] * s[intruders]) @ vt[intruders]
    u, s, vt = np.linalg.svd(mitigated - w0, full_matrices=False)
    return (u[:, : a.shape[1]] * s[: a.shape[1]]) @ vt[: a.shape[1]], len(intruders)


def spiky(shape: tuple[int, ...], axes: tuple[str, ...], strength: float = 3.0, **settings):
    """A base and an adapter with strong directions of its own."""
    params = {"w": jnp.asarray(RNG.normal(size=shape) / 4, jnp.float32)}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=3, alpha=6, axes=axes, **settings)
    one = trained(lora)["w"]
    return frozen, {"w": dataclasses.replace(one, b=one.b * strength)}


@pytest.mark.parametrize("keep", [0.75, 0.0, 1.0])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_tame_is_the_formula(shape, keep):
    frozen, lora = spiky(shape, ("in", "out"))
    a, b = (np.asarray(x, np.float64) for x in (lora["w"].a, lora["w"].b))
    expected, count = formula(np.asarray(frozen["w"], np.float64), a, b, 2.0, keep)
    assert count == lojax.analyze(frozen, lora).rows[0].intruders > 0
    tamed = tame(frozen, lora, keep=keep)["w"]
    assert (tamed.rank, tamed.scale) == (3, 2.0)
    np.testing.assert_allclose(2 * np.asarray(tamed.a @ tamed.b), expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(tamed.a), np.linalg.norm(tamed.b), rtol=1e-4)  # shared evenly


def test_layers_axes_and_scales_each_by_itself():
    shape, axes = (4, 20, 12, 3, 8), ("stack", "out", "in", "stack", "in")
    frozen, lora = spiky(shape, axes)
    scales = tuple(np.linspace(0.001, 2, 12).tolist())
    lora = {"w": dataclasses.replace(lora["w"], scale=scales)}
    tamed = tame(frozen, lora, keep=0.5)["w"]
    w0 = np.asarray(frozen["w"], np.float64).transpose(0, 3, 2, 4, 1).reshape(12, 96, 20)
    old_a, old_b, new_a, new_b = (
        np.asarray(x).reshape(12, -1, 3) if x.shape[-1] == 3 else np.asarray(x).reshape(12, 3, 20)
        for x in (lora["w"].a, lora["w"].b, tamed.a, tamed.b)
    )
    counts = []
    for i, scale in enumerate(scales):
        expected, count = formula(w0[i], old_a[i], old_b[i], scale, 0.5)
        counts.append(count)
        if count:
            np.testing.assert_allclose(scale * new_a[i] @ new_b[i], expected, atol=2e-5)
        else:
            assert (new_a[i] == old_a[i]).all() and (new_b[i] == old_b[i]).all()
    assert tamed.scale == scales and {0} < {*counts}


def test_fewer_intruders_are_left_and_without_any_nothing_changes():
    frozen, lora = spiky((40, 40), ("in", "out"), 1.0)
    before = lojax.analyze(frozen, lora).rows[0].intruders
    after = lojax.analyze(frozen, tame(frozen, lora, keep=0.0)).rows[0].intruders
    assert 0 <= after < before
    small = lojax.rescale(lora, 1e-3)
    assert tame(frozen, small)["w"] is small["w"]


def test_a_quantized_base_and_ranks_of_layers():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 64, 64)) / 8, jnp.float32)}
    rule = lojax.Rule("w", rank=(0, 2, 3), axes=("stack", "in", "out"))
    frozen, lora = lojax.init(jax.random.key(0), lojax.quantize(params, "int8"), rule)
    mask = jnp.asarray((np.arange(3) < np.array([0, 2, 3])[:, None]), jnp.float32)
    lora = {"w": dataclasses.replace(trained(lora)["w"], b=trained(lora)["w"].b * mask[:, :, None])}
    tamed = tame(frozen, lora)["w"]
    assert tamed.ranks == (0, 2, 3) and not np.asarray(tamed.a)[1, :, 2:].any()
    w0 = np.asarray(frozen["w"].dense(), np.float64)
    for i in (1, 2):
        a, b = np.asarray(lora["w"].a)[i, :, : i + 1], np.asarray(lora["w"].b)[i, : i + 1]
        expected, count = formula(w0[i], a, b, 1.0, 0.75)
        assert count
        np.testing.assert_allclose(np.asarray(tamed.a[i] @ tamed.b[i]), expected, atol=1e-5)


def test_what_tame_refuses():
    frozen, lora = spiky((8, 6), ("in", "out"))
    for name, value in (("top", 0), ("threshold", 2), ("keep", -1)):
        assert f"{name}={value}" in message(ValueError, tame, frozen, lora, **{name: value})
    dora = {"w": dataclasses.replace(lora["w"], magnitude=jnp.ones(6))}
    assert "w: the adapter holds magnitude" in message(ValueError, tame, frozen, dora)
    moved = lojax.init(jax.random.key(0), frozen, "w", rank=2, init="pissa")
    assert "Use lojax.subtract(lora, start)" in message(ValueError, tame, *moved)
    f = lambda params, x: x @ (params["w"].astype(jnp.float32) * 0.1)
    codes = {"w": jnp.ones((8, 4), jnp.int8)}
    pair = lojax.init(jax.random.key(0), codes, "w", rank=2, apply_fn=f, example_args=(jnp.ones((1, 8)),))
    assert "w: holds codes (int8[8,4])" in message(ValueError, tame, *pair)
    assert "under jit" in message(ValueError, jax.jit(tame), frozen, lora)
