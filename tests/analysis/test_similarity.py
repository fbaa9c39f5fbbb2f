"""`similarity`: section 7.2 of the LoRA paper, by its formula."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message, trained

import lojax
from lojax.analysis.similarity import similarity

PARAMS = {"w": jnp.ones((3, 12, 2, 4)), "v": jnp.ones((12, 5)), "head": jnp.ones((4, 2))}
AXES = ("stack", "in", "out", "out")


def make(seed: int, rank: int):
    rules = [lojax.Rule("w", axes=AXES), "v"]
    return trained(lojax.init(jax.random.key(seed), PARAMS, rules, rank=rank, alpha=3, train="head")[1], seed)


def phi(u1: np.ndarray, u2: np.ndarray) -> np.ndarray:
    """The formula of the paper, entry by entry."""
    result = np.zeros((u1.shape[1], u2.shape[1]))
    for i in range(1, u1.shape[1] + 1):
        for j in range(1, u2.shape[1] + 1):
            result[i - 1, j - 1] = np.linalg.norm(u1[:, :i].T @ u2[:, :j], "fro") ** 2 / min(i, j)
    return result


def spaces(adapter: lojax.Adapter, i: int | None) -> dict[str, np.ndarray]:
    a, b = (np.asarray(x if i is None else x[i], np.float64) for x in (adapter.a, adapter.b))
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
    u, s, vt = np.linalg.svd(a @ b)
    count = int((s > 1e-9 * s[0]).sum())
    left = lambda x: np.linalg.svd(x, full_matrices=False)[0]
    return {"a": left(a), "b": left(b.T), "in": u[:, :count], "out": vt[:count].T}


@pytest.mark.parametrize("of", ["a", "b", "in", "out"])
def test_phi_is_the_formula_of_the_paper(of):
    one, two = make(0, 3), make(1, 2)
    result = similarity(one, two, of=of)
    assert [row.name for row in result.rows] == ["v", "w[0]", "w[1]", "w[2]"]
    for row in result.rows:
        i = row.index[0] if row.index else None
        expected = phi(spaces(one[row.path], i)[of], spaces(two[row.path], i)[of])
        np.testing.assert_allclose(row.phi, expected, atol=1e-6)
        assert row.width == {"a": 12, "in": 12}.get(of, 8 if row.path == "w" else 5)


def test_the_cosine_is_that_of_the_updates():
    one, two = make(0, 3), make(1, 2)
    updates = [np.asarray(tree["v"].a @ tree["v"].b).ravel() for tree in (one, two)]
    expected = updates[0] @ updates[1] / np.linalg.norm(updates[0]) / np.linalg.norm(updates[1])
    assert similarity(one, two).rows[0].cosine == pytest.approx(expected, abs=1e-6)
    opposite = {**one, "v": dataclasses.replace(one["v"], scale=-7.0), "w": one["w"]}
    assert similarity(one, opposite).rows[0].cosine == pytest.approx(-1)
    assert similarity(one, lojax.rescale({**one, "head": None}, 0.5) | {"head": one["head"]}).rows[
        1
    ].cosine == pytest.approx(1)


def test_equal_spaces_share_all_and_random_ones_what_chance_gives():
    same = similarity(make(0, 3), make(0, 3))
    assert all(np.allclose(np.diag(row.phi), 1) for row in same.rows)
    params = {"w": jnp.ones((4000, 3))}
    loras = [lojax.init(jax.random.key(i), params, "w", rank=3)[1] for i in range(2)]
    (row,) = similarity(*loras).rows
    assert row.random == 3 / 4000 and 0.1 < row.phi[2, 2] / row.random < 5


def test_what_only_one_adapts_is_named_and_what_is_zero_has_no_directions():
    one, two = make(0, 2), make(1, 2)
    result = similarity({**one, "v": None}, two)
    assert result.alone == ("v",) and "Adapted by one of them alone: v." in result.text
    zero = {**two, "v": dataclasses.replace(two["v"], b=jnp.zeros_like(two["v"].b))}
    row = similarity(one, zero, of="out").rows[0]
    assert row.phi.shape == (2, 0) and row.cosine == 0
    assert similarity(one, zero, of="out").text.splitlines()[2].split() == ["v", "2", "and", "0", "0.000"]


def test_what_cannot_be_compared_says_why():
    one = make(0, 2)
    other = lojax.init(jax.random.key(0), {**PARAMS, "v": jnp.ones((5, 12))}, "v", rank=2, train="head")[1]
    assert "v: the adapters are of different weights" in message(ValueError, similarity, one, other)
    assert "nothing to compare" in message(ValueError, similarity, {"v": one["v"]}, {"v": None})
    assert "of='q'; expected one of 'a', 'b', 'in', 'out'" in message(ValueError, similarity, one, one, of="q")
    assert "lora2 is a stack of 1 adapters" in message(ValueError, similarity, one, lojax.stack([one]))
    assert "head is in lora1 but not in lora2" in message(ValueError, similarity, one, {"w": one["w"]})
