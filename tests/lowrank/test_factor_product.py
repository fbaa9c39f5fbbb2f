"""The product with a moving factor: the same numbers and derivatives as an einsum, on a CPU and elsewhere."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lojax.lowrank.factor_product import FactorTangent, factor_product
from lojax.lowrank.named_array import NamedArray
from tests.rewrite.programs import normal


@dataclasses.dataclass(frozen=True)
class Case:
    """``multiply(x, y, out)`` as an einsum; one letter names one axis."""

    x: str
    y: str
    out: str

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple({"b": 3, "t": 64, "s": 2, "m": 12, "n": 10, "r": 4}[c] for c in letters)

    def named(self, x: Any, y: Any, **settings: Any) -> Any:
        return factor_product(
            NamedArray(x, tuple(self.x)), FactorTangent(y, tuple(self.y)), tuple(self.out), **settings
        ).array

    def by_einsum(self, x: Any, y: Any) -> Any:
        return jnp.einsum(f"{self.x},{self.y}->{self.out}", x, y)

    @property
    def operands(self) -> tuple[jax.Array, ...]:
        return tuple(normal(*self.shape(d), seed=i, dtype=jnp.float64) for i, d in enumerate((self.x, self.y)))


CASES = {
    "first": Case("tm", "mr", "tr"),
    "second": Case("tr", "rn", "tn"),
    "second, rank last": Case("tr", "nr", "tn"),
    "rows of tokens": Case("btm", "mr", "btr"),
    "rows of tokens, second": Case("btr", "rn", "bnt"),
    "stack": Case("tsm", "smr", "str"),
    "stack, second": Case("str", "srn", "tsn"),
    "two axes in": Case("tsm", "msr", "tr"),
    "two axes out": Case("btr", "rmn", "btmn"),
}


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_close(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=1e-9, atol=1e-9)


@cases
def test_values_and_derivatives_are_those_of_the_einsum(case: Case) -> None:
    tangents = tuple(normal(*v.shape, seed=3, dtype=jnp.float64) for v in case.operands)
    cotangent = normal(*case.shape(case.out), seed=4, dtype=jnp.float64)

    def all_of(f: Any, x: Any, y: Any) -> Any:
        loss = lambda x, y: jnp.sum(jnp.sin(f(x, y)) * cotangent)
        slope = lambda x, y: sum(jnp.vdot(g, g) for g in jax.grad(loss, (0, 1))(x, y))
        return (
            f(x, y),
            jax.jvp(f, (x, y), tangents)[1],
            jax.vjp(f, x, y)[1](cotangent),
            jax.linear_transpose(lambda y: f(x, y), y)(cotangent),
            jax.grad(slope, (0, 1))(x, y),
            jax.jvp(jax.grad(loss, (0, 1)), (x, y), tangents)[1],
        )

    run = jax.jit(all_of, static_argnums=0)
    assert_close(run(case.named, *case.operands), run(case.by_einsum, *case.operands))


def test_outside_of_jit() -> None:
    case = CASES["rows of tokens"]
    value, pull = jax.vjp(case.named, *case.operands)
    expected, pull_expected = jax.vjp(case.by_einsum, *case.operands)
    assert_close((value, pull(value)), (expected, pull_expected(value)))


@cases
@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 0)], ids=["activation", "factor", "both"])
def test_vmap_of_values_and_gradients(case: Case, axes: tuple[int | None, int | None]) -> None:
    operands = [
        v if axis is None else jnp.stack([v, -2 * v, v + 1], axis) for v, axis in zip(case.operands, axes, strict=True)
    ]

    def mapped(f: Any) -> Any:
        gradient = jax.grad(lambda x, y: jnp.sum(jnp.sin(f(x, y))), (0, 1))
        more = [jnp.stack([v, v]) for v in operands]
        return (
            jax.vmap(f, axes)(*operands),
            jax.vmap(gradient, axes)(*operands),
            jax.vmap(jax.vmap(f, axes))(*more),
        )

    run = jax.jit(mapped, static_argnums=0)
    assert_close(run(case.named), run(case.by_einsum))


def test_low_precision_accumulates_and_returns_as_asked() -> None:
    case = CASES["first"]
    x, y = (v.astype(jnp.bfloat16) for v in case.operands)
    out = case.named(x, y, dtype=jnp.float32, precision=(jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST))
    assert out.dtype == jnp.float32
    dx, dy = jax.grad(lambda x, y: jnp.sum(case.named(x, y, dtype=jnp.float32)), (0, 1))(x, y)
    expected = np.asarray(x, np.float64).sum(0)
    assert dx.dtype == dy.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(dy, np.float64), np.broadcast_to(expected[:, None], dy.shape), rtol=1e-2)


def test_elsewhere_it_is_the_plain_product() -> None:
    case = CASES["first"]
    gradient = jax.jit(jax.grad(lambda y, x: jnp.sum(jnp.sin(case.named(x, y)))))
    x, y = case.operands
    lowered = {p: gradient.trace(y, x).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert "reduce_precision" in lowered["cpu"]
    assert "reduce_precision" not in lowered["tpu"] + lowered["cuda"]
