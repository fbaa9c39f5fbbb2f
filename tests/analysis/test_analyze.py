"""`analyze`: planted truth, and the definitions by full decompositions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import meta
from helpers import message, trained

import lojax
from lojax.adapters.spectrum import (
    effective_rank,
    largest_singular_value,
    least_rank,
    out_directions,
    stable_rank,
    thin_svd,
)
from lojax.analysis.analyze import analyze
from lojax.analysis.measures import lost_share

RNG = np.random.default_rng(0)
SIGMAS = np.array([3.0, 1.0, 0.25, 1e-3])


def orthonormal(rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(RNG.normal(size=(rows, columns)))[0]


def planted(m: int, n: int, sigmas: np.ndarray = SIGMAS) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``a`` and ``b`` of an update with these singular values, mixed so that neither shows them."""
    r = len(sigmas)
    mix = RNG.normal(size=(r, r))
    return orthonormal(m, r) * sigmas @ mix, np.linalg.inv(mix) @ orthonormal(n, r).T


def adapter(a: np.ndarray, b: np.ndarray, scale: float = 1.0, axes=("in", "out"), **fields) -> lojax.Adapter:
    return lojax.Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale, axes, **fields)


def definition(w0: np.ndarray, delta: np.ndarray, rank: int, top: int = 10, threshold: float = 0.5) -> dict[str, float]:
    """All measures as the papers define them, by full decompositions in float64."""
    u, s, vt = np.linalg.svd(delta)
    base, after = np.linalg.svd(w0, full_matrices=False), np.linalg.svd(w0 + delta, full_matrices=False)
    cosines = [max(abs(after[2][j] @ v) for v in base[2]) for j in range(min(top, len(after[1])))]
    return {
        "ratio": np.linalg.norm(delta) / np.linalg.norm(w0),
        "top_ratio": s[0] / base[1][0],
        "amplification": np.linalg.norm(delta) / np.linalg.norm(u[:, :rank].T @ w0 @ vt[:rank].T),
        "intruders": sum(cosine < threshold for cosine in cosines),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "norm": np.linalg.norm(delta),
    }


def assert_row(row, expected: dict[str, float], rtol: float = 1e-5) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(row, name), value, rtol=rtol, err_msg=name)


@pytest.mark.parametrize(("m", "n"), [(20, 30), (30, 20)])
def test_the_planted_spectrum_is_recovered(m, n):
    a, b = planted(m, n)
    (row,) = analyze(None, {"w": adapter(a, b, 2.0)}).rows
    np.testing.assert_allclose(row.spectrum, 2 * SIGMAS, rtol=1e-5, atol=1e-6)
    p = SIGMAS / SIGMAS.sum()
    assert row.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert row.stable_rank == pytest.approx((SIGMAS**2).sum() / 9, rel=1e-5)
    assert (row.rank, row.ratio, row.intruders, row.parameters) == (4, None, None, 4 * (m + n))


@pytest.mark.parametrize(("m", "n"), [(20, 30), (30, 20), (24, 24)])
def test_measures_are_their_definitions(m, n):
    w0 = RNG.normal(size=(m, n)).astype(np.float32)
    a, b = planted(m, n, np.array([9.0, 2.0, 0.5]))
    (row,) = analyze({"w": jnp.asarray(w0)}, {"w": adapter(a, b, 1.5)}).rows
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert_row(row, definition(w0.astype(float), 1.5 * (a.astype(float) @ b), 3))


def test_planted_intruders_are_counted_and_others_are_not():
    u, v = orthonormal(20, 20), orthonormal(20, 20)
    w0 = (u * np.linspace(5, 1, 20)) @ v.T
    # Even over all directions of the base: cosine 1 / sqrt(20) with each. And one that only strengthens the base.
    foreign_u, foreign_v = u @ np.ones(20) / np.sqrt(20), v @ np.ones(20) / np.sqrt(20)
    a = np.stack([50 * foreign_u, 7 * u[:, 0]], 1)
    b = np.stack([foreign_v, v[:, 0]])
    (row,) = analyze({"w": jnp.asarray(w0, jnp.float32)}, {"w": adapter(a, b)}).rows
    assert row.intruders == 1
    assert row.cosines[0] < 0.3 < 0.9 < row.cosines[1]
    (row,) = analyze({"w": jnp.asarray(w0, jnp.float32)}, {"w": adapter(a[:, 1:], b[1:])}).rows
    assert row.intruders == 0 and row.cosines.shape == (10,)
    np.testing.assert_allclose(row.cosines, 1, atol=1e-5)


def test_without_intruders_nothing_else_changes():
    w0 = {"w": jnp.asarray(RNG.normal(size=(20, 30)), jnp.float32)}
    lora = {"w": adapter(*planted(20, 30))}
    (full,), (quick,) = (analyze(w0, lora, top=top).rows for top in (10, 0))
    assert quick.intruders is None and quick.cosines is None
    assert_row(quick, {name: getattr(full, name) for name in ("ratio", "top_ratio", "amplification", "lost")}, 1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (200, 160), (1, 4)])
def test_the_largest_singular_value(shape):
    w = RNG.normal(size=shape)
    assert largest_singular_value(w) == pytest.approx(np.linalg.norm(w, 2), rel=1e-6)
    assert largest_singular_value(np.zeros(shape)) == 0


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_directions_are_those_of_the_svd_without_the_null_space(shape):
    w = RNG.normal(size=shape)
    w[:, 0] = w[:, 1]
    s, v = out_directions(w)
    _, expected, vt = np.linalg.svd(w, full_matrices=False)
    count = int((expected > 1e-6).sum())
    np.testing.assert_allclose(s, expected[:count], rtol=1e-7)
    np.testing.assert_allclose(np.abs(np.sum(v * vt[:count].T, 0)), 1, rtol=1e-6)


def test_the_thin_svd_is_that_of_the_product():
    a, b = RNG.normal(size=(6, 9)), RNG.normal(size=(9, 4))  # a rank above both sides
    u, s, vt = thin_svd(a, b)
    np.testing.assert_allclose((u * s) @ vt, a @ b, atol=1e-12)
    np.testing.assert_allclose(s, np.linalg.svd(a @ b, compute_uv=False), atol=1e-12)


def test_least_rank_is_that_of_brute_force():
    for _ in range(50):
        s = np.sort(RNG.exponential(size=6))[::-1] * (RNG.random(6) > 0.2)
        s = np.sort(s)[::-1]
        for energy in (0.3, 0.9, 0.99, 1.0):
            kept = [(s[:k] ** 2).sum() / max((s**2).sum(), 1e-30) for k in range(7)]
            expected = next((k for k in range(7) if kept[k] >= energy - 1e-13), 0) if s.any() else 0
            assert least_rank(s, energy) == expected


def test_ranks_of_nothing_and_of_what_is_not_finite():
    assert stable_rank(np.zeros(2)) == effective_rank(np.zeros(2)) == least_rank(np.zeros(2), 1.0) == 0
    assert np.isnan(stable_rank(np.array([np.nan]))) and np.isnan(effective_rank(np.array([np.nan])))
    (row,) = analyze({"w": jnp.ones((4, 3))}, {"w": adapter(np.full((4, 1), np.nan), np.ones((1, 3)))}).rows
    assert np.isnan([row.norm, row.ratio, row.amplification, row.lost]).all() and row.intruders is None


def test_what_a_merge_in_bfloat16_loses():
    w0 = RNG.normal(size=(50, 40)).astype(np.float32)
    a, b = RNG.normal(size=(50, 2)) * 1e-3, RNG.normal(size=(2, 40))
    (row,) = analyze({"w": jnp.asarray(w0)}, {"w": adapter(a, b)}).rows
    delta = np.asarray(a, np.float32).astype(float) @ np.asarray(b, np.float32)
    rounded = (w0 + delta.astype(np.float32)).astype(ml_dtypes.bfloat16)
    assert row.lost == pytest.approx(np.mean(rounded == w0.astype(ml_dtypes.bfloat16)), abs=1e-3)
    assert 0.5 < row.lost < 1
    u, s, vt = thin_svd(np.eye(50)[:, :1], np.ones((1, 40)))  # one row moves, and by much
    assert lost_share(w0.astype(float), (u, 100 * s, vt)) == 0


# --- what an Adapter can hold ---

AXES = {
    "heads": ((6, 2, 3), ("in", "out", "out")),
    "out first": ((5, 6), ("out", "in")),
    "conv": ((3, 3, 2, 5), ("in", "in", "in", "out")),
    "scanned": ((3, 6, 2, 2), ("stack", "in", "out", "out")),
    "experts, out first": ((2, 3, 5, 6), ("stack", "stack", "out", "in")),
    "stack in the middle": ((6, 3, 5), ("in", "stack", "out")),
}


def as_matrices(x: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
    order = [i for role in ("stack", "in", "out") for i, r in enumerate(axes) if r == role]
    m = int(np.prod([n for n, r in zip(x.shape, axes, strict=True) if r == "in"]))
    stack = int(np.prod([n for n, r in zip(x.shape, axes, strict=True) if r == "stack"]))
    return x.transpose(order).reshape(stack, m, -1)


def check_against_merge(frozen, lora, *, path: str = "w", rtol: float = 1e-4) -> list:
    """Every row of an analysis against the definitions, on what `lojax.merge` makes of the weight."""
    rows = [row for row in analyze(frozen, lora).rows if row.path == path]
    axes = lora[path].axes
    w0 = frozen[path]
    w0 = np.asarray(w0.dense() if isinstance(w0, lojax.Quantized) else meta.unbox(w0), np.float64)
    merged = np.asarray(meta.unbox(lojax.merge(frozen, lora)[path]), np.float64)
    pairs = list(zip(as_matrices(w0, axes), as_matrices(merged, axes), strict=True))
    assert len(rows) == len(pairs)
    for row, (before, after) in zip(rows, pairs, strict=True):
        rank = len(row.spectrum) if lora[path].magnitude is None else row.rank
        assert_row(row, definition(before, after - before, rank), rtol)
    return rows


@pytest.mark.parametrize("kind", AXES)
def test_every_layout_of_axes(kind):
    shape, axes = AXES[kind]
    params = {"w": jnp.asarray(RNG.normal(size=shape), jnp.float32), "bias": jnp.zeros(3)}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, alpha=3, axes=axes)
    rows = check_against_merge(frozen, trained(lora))
    stack = [n for n, role in zip(shape, axes, strict=True) if role == "stack"]
    assert [row.index for row in rows] == [*np.ndindex(*stack)]
    assert rows[0].ins == tuple(n for n, role in zip(shape, axes, strict=True) if role == "in")
    assert rows[-1].name == "w" + (f"[{', '.join(str(n - 1) for n in stack)}]" if stack else "")


def test_a_rank_and_a_scale_for_each_layer():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 8, 6)), jnp.float32)}
    rule = lojax.Rule("w", rank=(1, 3, 2), alpha=4, axes=("stack", "in", "out"))
    frozen, lora = lojax.init(jax.random.key(0), params, rule)
    one = trained(lora)["w"]
    mask = (np.arange(3) < np.array([1, 3, 2])[:, None]).astype(np.float32)
    lora = {"w": dataclasses.replace(one, b=one.b * mask[:, :, None])}
    rows = check_against_merge(frozen, lora)
    assert [(row.rank, len(row.spectrum), row.parameters) for row in rows] == [(1, 1, 14), (3, 3, 42), (2, 2, 28)]
    assert [row.scale for row in rows] == pytest.approx([4.0, 4 / 3, 2.0])


def test_dora_by_its_merged_weight_and_without_a_base_its_factors_alone():
    params = {"w": jnp.asarray(RNG.normal(size=(2, 8, 6)), jnp.float32)}
    axes = ("stack", "in", "out")
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, axes=axes, variant="dora")
    fresh = analyze(frozen, lora).rows
    assert all(row.idle for row in fresh)
    lora = trained(lora)
    lora = {"w": dataclasses.replace(lora["w"], magnitude=lora["w"].magnitude * 1.5)}
    rows = check_against_merge(frozen, lora, rtol=1e-3)
    assert all(len(row.spectrum) == 6 and not row.note for row in rows)
    bare = analyze(None, lora)
    expected = np.linalg.svd(np.asarray(lora["w"].a @ lora["w"].b), compute_uv=False)[:, :2]
    np.testing.assert_allclose([row.spectrum for row in bare.rows], expected, rtol=1e-5)
    assert "w[0], w[1]: of a and b alone: what its dora part does needs the base." in bare.text


@pytest.mark.parametrize("with_factors", [True, False])
def test_token_rows(with_factors):
    params = {"w": jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)}
    settings = {"rank": 2} if with_factors else {"train": "tokens"}
    frozen, lora = lojax.init(jax.random.key(0), params, lojax.Rule("w", tokens=(1, 7, 3), **settings))
    rows = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    one = dataclasses.replace(lora["w"], rows=rows)
    lora = {"w": dataclasses.replace(one, b=jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)) if with_factors else one}
    (row,) = check_against_merge(frozen, lora)
    (bare,) = analyze(None, lora).rows
    np.testing.assert_allclose(bare.spectrum, row.spectrum, rtol=1e-5, atol=1e-6)
    assert row.parameters == (12 + 2 * 13 if with_factors else 12)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_its_dense_values(kind):
    params = {"w": jnp.asarray(RNG.normal(size=(2, 64, 8)), jnp.float32)}
    frozen, lora = lojax.init(jax.random.key(0), lojax.quantize(params, kind), "w", rank=2, axes=("stack", "in", "out"))
    check_against_merge(frozen, trained(lora))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_start_that_was_taken_out_of_the_weight(init):
    params = {"w": jnp.asarray(RNG.normal(size=(2, 64, 8)), jnp.float32)}
    settings = {"rank": 2, "axes": ("stack", "in", "out"), "init": init}
    base = {"base": "nf4"} if init == "loftq" else {}
    frozen, start = lojax.init(jax.random.key(0), params, "w", **settings, **base)
    a, b = (x + jnp.asarray(RNG.normal(size=x.shape), jnp.float32) for x in (start["w"].a, start["w"].b))
    lora = {"w": dataclasses.replace(start["w"], a=a, b=b)}
    rows = analyze(frozen, lora, start=start).rows
    before = np.asarray(lojax.merge(frozen, start)["w"], np.float64)
    after = np.asarray(lojax.merge(frozen, lora)["w"], np.float64)
    for row, w0, w1 in zip(rows, before, after, strict=True):
        assert_row(row, definition(w0, w1 - w0, 4), 1e-3)
    for bare in (analyze(frozen, lora), analyze(None, lora)):
        assert all(row.ratio is None and row.spectrum is not None for row in bare.rows)
        assert f"w[0], w[1]: with its start ({lora['w'].moved_base}) in it; pass start=" in bare.text
    assert all(row.norm < 1e-5 for row in analyze(frozen, start, start=start).rows)


def test_start_is_refused_where_nothing_moved():
    frozen, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=1)
    assert "lora holds none" in message(ValueError, analyze, frozen, lora, start=lora)


def test_a_base_of_codes_says_so():
    f = lambda params, x: x @ (params["w"].astype(jnp.float32) * 0.1)
    params = {"w": jnp.ones((8, 4), jnp.int8)}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, apply_fn=f, example_args=(jnp.ones((1, 8)),))
    analysis = analyze(frozen, trained(lora))
    assert analysis.rows[0].ratio is None and analysis.rows[0].norm > 0
    assert "w: its base are codes that the net dequantizes" in analysis.text


def test_boxes_other_dtypes_and_frozen_a():
    params = {"w": meta.Partitioned(jnp.asarray(RNG.normal(size=(8, 6)), jnp.bfloat16), names=("x", None))}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, dtype=jnp.bfloat16, variant="lora-fa")
    lora = trained(lora)
    (row,) = analyze(frozen, lora).rows
    a, b = (np.asarray(meta.unbox(x), np.float64) for x in (lora["w"].a, lora["w"].b))
    assert_row(row, definition(np.asarray(params["w"].value, np.float64), a @ b, 2))
    assert row.parameters == 12


def test_parameters_trained_in_full_and_adapters_that_never_moved():
    params = {"w": jnp.ones((4, 3)), "head": jnp.ones((3, 2))}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=1, train="head")
    analysis = analyze(frozen, lora)
    head, w = analysis.rows
    assert (head.path, head.spectrum, head.outs, head.parameters) == ("head", None, (3, 2), 6)
    assert w.idle and w.ratio == w.stable_rank == w.effective_rank == w.lost == 0 and w.amplification is None
    assert analysis.matrices == (w,)
    assert "w: b never moved from zero" in analysis.text and "head    (3, 2)     full" in analysis.text


def test_what_cannot_be_analyzed_says_why():
    frozen, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, "w", rank=1)
    assert "is traced" in message(ValueError, jax.jit(lambda lora: analyze(None, lora).rows[0].norm), lora)
    shapes = jax.eval_shape(lambda: lora)
    assert "is a shape" in message(ValueError, analyze, None, shapes)
    assert "top=-1" in message(ValueError, analyze, frozen, lora, top=-1)
    assert "threshold=2" in message(ValueError, analyze, frozen, lora, threshold=2)
    assert "different structure" in message(ValueError, analyze, {"v": jnp.ones((4, 3))}, lora)


def test_the_text_says_what_stands_out():
    u, v = orthonormal(20, 20), orthonormal(20, 20)
    w0 = jnp.asarray((u * np.linspace(5, 1, 20)) @ v.T, jnp.float32)
    foreign = adapter(50 * (u @ np.ones((20, 1))) / np.sqrt(20), (v @ np.ones((20, 1))).T / np.sqrt(20))
    small = adapter(1e-4 * orthonormal(20, 1), orthonormal(20, 1).T)
    text = analyze({"w": w0, "x": w0}, {"w": foreign, "x": small}).text
    assert "1 intruder dimensions in 1 of 2 matrices (cosine < 0.5 among the top 10)" in text
    assert "A merge in bfloat16 would leave" in text and text.splitlines()[0].split()[-1] == "lost"
    many = {"w": jnp.ones((300, 2, 2)), "x": jnp.ones((300, 2, 2))}
    _, lora = lojax.init(jax.random.key(0), many, "*", rank=1, axes=("stack", "in", "out"))
    lines = analyze(None, trained(lora)).text.splitlines()
    assert len(lines) == 6 and lines[2].startswith("w (mean of 300)  2 -> 2")
