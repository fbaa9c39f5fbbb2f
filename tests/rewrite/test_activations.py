"""The terms of the updates in an activation's cotangent are summed apart from the frozen ones."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lojax
from lojax.rewrite.activations import separate_cotangents
from tests.helpers import PRODUCTS, written_out

M, N, R = 12, 16, 3
ANYWHERE = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * 3)


def siblings(params, x):
    """Three products of one activation, which is itself a function of ``x``."""
    y = jnp.tanh(x)
    return sum((y @ params[name]).sum() for name in params)


def started(f, *args, targets="*", count=3):
    params = {name: jax.random.normal(jax.random.key(i), (M, N)) for i, name in enumerate("qkvgu"[:count])}
    model = lojax.wrap(f, targets, rank=R, strict=True, execution="factored")
    frozen, lora = model.init(jax.random.key(9), params, *args)
    return model, frozen, jax.tree.map(lambda t: t + 0.1, lora)


def terms(jaxpr):
    """For every variable, of how many frozen terms and terms of updates (of one weight or several) it is the sum."""
    found = {}
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [v for v in eqn.invars if not isinstance(v, Literal)]
        if name in PRODUCTS:
            shapes = {v.aval.shape for v in eqn.invars}
            if eqn.outvars[0].aval.shape[-1] == M and {
                s for s in shapes if s == (M, N) or (s[0] == M and not s[1] % R)
            }:
                found[eqn.outvars[0]] = Counter(["frozen" if (M, N) in shapes else "update"])
        elif name in ("add_any", "add", "copy") and any(v in found for v in inputs):
            found[eqn.outvars[0]] = sum((found.get(v, Counter(other=1)) for v in inputs), Counter())
    return list(found.values())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_frozen_terms_lie_side_by_side(count):
    x = jnp.ones((4, M))
    model, frozen, lora = started(siblings, x, count=count)
    gradient = jax.make_jaxpr(jax.grad(lambda x: model.apply(frozen, lora, x)))(x)
    (cotangents,) = [eqn for eqn in gradient.jaxpr.eqns if eqn.primitive.name == "lojax_adapted_product_cotangent"]
    sums = terms(written_out(cotangents))
    assert Counter(frozen=count) in sums and Counter(update=1) in sums  # siblings: the updates are one product
    mixed = [s for s in sums if s["frozen"] and s["update"]]
    assert mixed == [Counter(frozen=count, update=1)]


def test_nothing_is_kept_twice():
    """`exp` keeps its result for its derivative, and so do the factors: one array a layer."""

    def f(params, x):
        return jax.lax.scan(lambda x, w: (jnp.exp(x) @ w, None), x, params["w"])[0].sum()

    params, x = {"w": jnp.ones((7, M, M))}, jnp.ones((4, M))
    model = lojax.wrap(f, "w", rank=R, strict=True, execution="factored")
    frozen, lora = model.init(jax.random.key(0), params, x)
    program = jax.make_jaxpr(jax.grad(lambda t, x: model.apply(frozen, t, x), argnums=(0, 1)))(lora, x)
    forward = next(eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan")
    assert [v.aval.shape for v in forward.outvars].count((7, 4, M)) == 1


def test_the_update_branches_off_before_a_constraint():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    placed = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def f(params, x):
        y = placed(placed(jnp.tanh(x), "data", "tensor"), "data", None)
        return sum(placed(y @ params[name], "data", None, "tensor") for name in params)

    x = jax.random.normal(jax.random.key(3), (8, 16, M))
    model, frozen, lora = started(f, x)
    program = jax.make_jaxpr(model.apply)(frozen, lora, x).jaxpr
    made = {v: eqn.primitive.name for eqn in program.eqns for v in eqn.outvars}
    taken = {v: eqn.invars[0] for eqn in program.eqns for v in eqn.outvars}
    (products,) = [eqn for eqn in program.eqns if eqn.primitive.name == "custom_jvp_call" and len(eqn.invars) > 2]
    x_, z = products.invars[:2]
    assert made[x_] == "sharding_constraint" and made[z] == "custom_jvp_call"
    before = taken[z]
    assert made[before] == "sharding_constraint" and made[taken[before]] == "tanh"
    assert [str(eqn.params["sharding"].spec) for eqn in program.eqns if before in eqn.outvars] == [str(ANYWHERE)]
    loss = lambda apply, t, x: (apply(t, x) ** 2).mean()
    ours = jax.value_and_grad(lambda t, x: loss(lambda t, x: model.apply(frozen, t, x), t, x), argnums=(0, 1))
    merged = jax.value_and_grad(lambda x: loss(f, model.merge(frozen, lora), x))
    (got, (_, dx)), (want, want_dx) = jax.jit(ours)(lora, x), merged(x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-6)


def test_no_chip_does_the_work_of_another():
    """Positions lie over ``tensor`` and are gathered for the frozen product alone: dA is summed over shards."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    over = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    batch, positions, width, rank = 4, 64, 128, 32

    def f(params, x):
        y = jax.lax.with_sharding_constraint(jnp.tanh(x), over("data"))
        w = jax.lax.with_sharding_constraint(params["w"], over(None, "tensor"))
        return (jax.lax.with_sharding_constraint(y @ w, over("data", None, "tensor")) ** 2).sum()

    params = {"w": jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=over(None, "tensor"))}
    x = jax.ShapeDtypeStruct((batch, positions, width), jnp.float32, sharding=over("data", "tensor"))
    model = lojax.wrap(f, "w", rank=rank, strict=True, execution="factored")
    lora = jax.eval_shape(model.init, jax.random.key(0), params, x)[1]
    gradient = jax.jit(jax.value_and_grad(lambda lora, frozen, x: model.apply(frozen, lora, x)))
    found = gradient.lower(lora, params, x).compile().cost_analysis()["flops"] * mesh.size
    products = 2 * batch * positions * width * (width + 5 * rank)  # x W, then x A, (x A) B, dy B^T, dA and dB
    assert products <= found <= 1.1 * products


def test_what_is_no_traced_float_is_passed_on():
    x = jnp.ones(3)
    assert separate_cotangents(x) is x
    assert "custom_jvp_call" not in str(jax.make_jaxpr(separate_cotangents)(jnp.ones(3, jnp.int32)))


def test_derivatives_of_any_order():
    x = jax.random.normal(jax.random.key(1), (4, M))
    model, frozen, lora = started(siblings, x)
    ours = lambda x: model.apply(frozen, lora, x)
    plain = lambda x: siblings(model.merge(frozen, lora), x)
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum())):
        np.testing.assert_allclose(derivative(ours)(x), derivative(plain)(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(ours))(jnp.stack([x, 2 * x]))[1], jax.grad(plain)(2 * x), rtol=1e-4, atol=1e-4
    )
