"""The fused way: the right numbers are in `test_equivalence`; here, what it keeps, forms and leaves to others."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lojax
from lojax.lowrank.frozen import DenseWeight
from lojax.lowrank.fused import fused_product
from lojax.lowrank.named_array import RANK, NamedArray
from lojax.lowrank.value import LowRank
from tests.helpers import PRODUCTS, equations
from tests.rewrite.programs import normal

T, M, N, R = 40, 32, 24, 3
W, A, B, X = normal(M, N), normal(M, R), normal(R, N), normal(T, M)


def dense(p, x):
    return x @ p["w"]


def adapted(f, params, *inputs, **settings):
    """``(model, frozen, lora)`` with an update that is not zero, fused unless ``settings`` say otherwise."""
    model = lojax.wrap(f, "**", **({"rank": R, "alpha": 2 * R, "execution": "fused"} | settings))
    frozen, lora = model.init(jax.random.key(0), params, *inputs)
    return model, frozen, jax.tree.map(lambda v: v + 0.1 * normal(*v.shape, seed=5, dtype=v.dtype), lora)


def residuals(f, *args) -> list[tuple[int, ...]]:
    """The shapes of what the forward pass of ``f`` keeps for the backward pass."""
    kept = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)
    return sorted(leaf.shape for leaf in jax.tree.leaves(kept))


def product_shapes(f, *args) -> list[tuple[int, ...]]:
    """The shapes of the results of every `dot_general`."""
    found = equations(jax.make_jaxpr(f)(*args))
    return [eqn.outvars[0].aval.shape for eqn in found if eqn.primitive.name in PRODUCTS]


def plain(x, w, a, b):
    """`fused_product` for ``[T, m] @ [m, n]``, with nothing of the engine around it."""
    value = LowRank(DenseWeight(w), ((NamedArray(a, (0, RANK)), NamedArray(b, (RANK, 1))),), "w")

    def update(x, term, like):
        first, second = (factor.transpose_to(dims) for factor, dims in zip(term, ((0, RANK), (RANK, 1)), strict=True))
        return (x @ first.array @ second.array).astype(like.dtype)

    return fused_product(x, value, base=lambda w, x: x @ w, update=update)


# --- numbers ---


def test_against_numpy_by_hand():
    """dA = x' (dy B'), dB = (x A)' dy, dx = dy (W + A B)', in float64."""
    w, a, b, x, dy = (np.asarray(v, np.float64) for v in (W, A, B, X, normal(T, N, seed=2)))
    y, pull = jax.vjp(lambda x, a, b: plain(x, W, a, b), X, A, B)
    np.testing.assert_allclose(y, x @ (w + a @ b), rtol=1e-4, atol=1e-4)
    for actual, expected in zip(
        pull(jnp.float32(dy)), (dy @ (w + a @ b).T, x.T @ (dy @ b.T), (x @ a).T @ dy), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_a_tangent_of_the_weight_itself_is_right():
    """lojax stops it, but `fused_product` alone is still the derivative of what it computes."""
    dy = normal(T, N, seed=2)
    (dw,) = jax.vjp(lambda w: plain(X, w, A, B), W)[1](dy)
    np.testing.assert_allclose(dw, X.T @ dy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2, 3)])
def test_forward_derivatives_of_any_of_the_operands(moving):
    args = X, W, A, B
    tangents = tuple(normal(*v.shape, seed=9) if i in moving else jnp.zeros_like(v) for i, v in enumerate(args))
    actual = jax.jvp(plain, args, tangents)[1]
    expected = jax.jvp(lambda x, w, a, b: x @ (w + a @ b), args, tangents)[1]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_the_update_is_summed_in_float32_and_rounded_once():
    w, a, b, x = (v.astype(jnp.bfloat16) for v in (W, A, B, X))
    expected = x @ (np.float32(w) + np.float32(a) @ np.float32(b)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(plain(x, w, a, b)), np.float32(expected))


# --- what it keeps and forms ---


def test_it_keeps_the_operands_and_nothing_else():
    assert residuals(lambda x, a, b: plain(x, W, a, b), X, A, B) == sorted([(T, M), (M, N), (M, R), (R, N)])
    factored = residuals(lambda x, a, b: x @ W + (x @ a) @ b, X, A, B)
    assert (T, R) in factored, "the factored way keeps x @ a, or this test sees nothing"


def test_in_a_scan_no_layer_keeps_its_formed_weight():
    layers = 5
    params = {"w": normal(layers, M, M)}

    def net(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    def stacked(**settings):
        model, frozen, lora = adapted(net, params, X, **settings)
        gradient = jax.make_jaxpr(jax.grad(lambda lora: jnp.sum(model.apply(frozen, lora, X))))(lora)
        scans = [eqn for eqn in equations(gradient) if eqn.primitive.name == "scan"]
        assert len(scans) == 2, "forward and backward"
        return [var.aval.shape for eqn in scans for var in eqn.outvars].count((layers, M, M))

    assert stacked() == 0
    assert stacked(execution="materialize") >= 1, "materialized weights are kept, or this test sees nothing"


def test_no_product_is_a_gradient_of_the_weight():
    """The only products of the weight's shape sum over the rank: they form the weight, twice."""
    model, frozen, lora = adapted(dense, {"w": W}, X)
    gradient = jax.grad(lambda lora, x: jnp.sum(model.apply(frozen, lora, x) ** 2), (0, 1))
    found = [eqn for eqn in equations(jax.make_jaxpr(gradient)(lora, X)) if eqn.primitive.name in PRODUCTS]
    weights = [eqn for eqn in found if sorted(eqn.outvars[0].aval.shape) == sorted((M, N))]
    assert len(weights) == 2
    for eqn in weights:
        assert eqn.primitive.name == "dot_general"
        ((left, _), _) = eqn.params["dimension_numbers"]
        assert math.prod(eqn.invars[0].aval.shape[d] for d in left) == R


def test_without_a_gradient_of_x_the_weight_is_formed_once():
    model, frozen, lora = adapted(dense, {"w": W}, X)
    first = product_shapes(jax.grad(lambda lora: jnp.sum(model.apply(frozen, lora, X) ** 2)), lora)
    assert first.count((M, N)) == 1
    assert product_shapes(lambda lora: model.apply(frozen, lora, X), lora) == [(M, N), (T, N)]


def test_a_policy_that_saves_products_saves_no_formed_weight():
    """`dots_saveable` would save ``a @ b``, if anything behind it asked for it."""
    policy = jax.checkpoint_policies.dots_saveable

    def net(p, x):
        return jax.checkpoint(lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]), policy=policy)(p, x)

    params = {"w": W, "v": normal(N, M)}
    model, frozen, lora = adapted(net, params, X)
    kept = residuals(lambda lora, x: model.apply(frozen, lora, x), lora, X)
    assert kept.count((M, N)) == 1 and kept.count((N, M)) == 1, "the frozen ones, which are there anyway"
    assert kept.count((T, N)) == 1, "the product itself"


# --- what is left to the factored way ---


def how(f, params, *inputs, **settings):
    model, frozen, lora = adapted(f, params, *inputs, **settings)
    return {weight.path: weight.how for weight in model.report(frozen, lora, *inputs).weights}


def test_a_look_up_stays_factored_and_a_tied_head_is_fused():
    def net(p, i):
        return jnp.tanh(p["table"][i]) @ p["table"].T

    assert how(net, {"table": normal(50, 16)}, jnp.arange(7)) == {"table": "factored, fused"}


def test_a_convolution_stays_factored():
    def net(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert how(net, {"w": normal(3, 3, 4, 6)}, normal(2, 9, 9, 4)) == {"w": "factored"}


def test_under_dropout_it_stays_factored():
    """Dropout is on the input of the update alone, which one product with one weight cannot say."""
    runs = {}
    for execution in ("factored", "fused"):
        model, frozen, lora = adapted(dense, {"w": W}, X, dropout=0.5, execution=execution)
        runs[execution] = model.apply(frozen, lora, X, dropout_key=jax.random.key(3))
        plain = model.apply(frozen, lora, X)
        assert not np.allclose(runs[execution], plain)
    np.testing.assert_array_equal(runs["fused"], runs["factored"])


def test_a_sum_of_two_updates_stays_factored():
    @jax.custom_jvp
    def squared(x, w):
        return (x @ w) ** 2

    squared.defjvp(lambda p, t: (squared(*p), 2 * (p[0] @ p[1]) * (t[0] @ p[1] + p[0] @ t[1])))
    net = lambda p, x: squared(x, p["w"])
    model, frozen, lora = adapted(net, {"w": W}, X)
    actual = jax.jvp(lambda lora: model.apply(frozen, lora, X), (lora,), (lora,))[1]
    expected = jax.jvp(lambda lora: net(lojax.merge(frozen, lora), X), (lora,), (lora,))[1]
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("head", [False, True], ids=["dense", "transposed"])
def test_dora_s_gain_goes_outside(head):
    net = (lambda p, x: x @ p["w"].T) if head else dense
    x = normal(T, N) if head else X
    # the tied use sums the out axis: the roles are those of the first use
    model, frozen, lora = adapted(net, {"w": W}, x, variant="dora", axes=("in", "out"))
    assert model.report(frozen, lora, x).weights[0].how == "fused"

    def grads(model):
        return jax.value_and_grad(lambda lora: jnp.sum(jnp.sin(model.apply(frozen, lora, x))))(lora)

    factored = dataclasses.replace(model, execution="factored")
    for actual, expected in zip(jax.tree.leaves(grads(model)), jax.tree.leaves(grads(factored)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


# --- materialize, for comparison ---


def test_materialize_forms_every_weight_and_says_so():
    model, frozen, lora = adapted(dense, {"w": W}, X, execution="materialize")
    (use,) = model.report(frozen, lora, X).weights[0].uses
    assert (use.how, use.reason) == ("materialized", "execution='materialize' asks for it")
    gradient = jax.grad(lambda lora, x: jnp.sum(model.apply(frozen, lora, x) ** 2), (0, 1))
    assert product_shapes(gradient, lora, X).count((M, N)) + product_shapes(gradient, lora, X).count((N, M)) >= 2
    expected = jax.grad(lambda lora, x: jnp.sum(dense(lojax.merge(frozen, lora), x) ** 2), (0, 1))(lora, X)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), gradient(lora, X), expected)
