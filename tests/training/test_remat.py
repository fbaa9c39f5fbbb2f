"""What a block keeps under remat: bytes of what `jax.vjp` keeps, for the usual policies and for ours."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import lojax
from lojax.lowrank.factored import PRODUCT, opaque_product
from lojax.lowrank.named_array import RANK, NamedArray, multiply
from tests.helpers import PRODUCTS, equations, trained

T, D, F, HEADS, R = 24, 16, 64, 2, 4
SHAPES = {**dict.fromkeys("qkvo", (D, D)), "up": (D, F), "down": (F, D)}
PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=shape) / math.sqrt(shape[0]), jnp.bfloat16)
    for i, (name, shape) in enumerate(SHAPES.items())
}
X = jnp.asarray(np.random.default_rng(9).normal(size=(T, D)), jnp.bfloat16)
POLICIES = jax.checkpoint_policies
ways = pytest.mark.parametrize("execution", ["factored", "fused"])


def norm(x):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def block(params, x):
    """Attention and MLP with norms before them, x ``[T, D]`` in bfloat16."""
    q, k, v = ((norm(x) @ params[name]).reshape(T, HEADS, -1) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k).astype(jnp.float32)).astype(x.dtype)
    x = x + jnp.tanh(jnp.einsum("hts,shk->thk", scores, v).reshape(T, D)) @ params["o"]
    return x + jax.nn.gelu(norm(checkpoint_name(x, "middle")) @ params["up"]) @ params["down"]


def activations(f, *args) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of everything kept for the backward pass of ``f`` that has tokens in it, but ``X``."""
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))
    found = sorted((x.shape, str(x.dtype)) for x in kept if T in x.shape)
    found.remove(((T, D), "bfloat16"))  # the input, which remat always keeps
    return found


def of_frozen(policy):
    return activations(lambda x: jax.checkpoint(block, policy=policy)(PARAMS, x), X)


def of_adapted(policy, execution, targets="*"):
    model = lojax.wrap(jax.checkpoint(block, policy=policy), targets, rank=R, strict=True, execution=execution)
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    return activations(lambda lora, x: model.apply(frozen, lora, x), lora, X)


def size(kept) -> int:
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in kept)


@ways
@pytest.mark.parametrize("targets", ["*", ("q", "v"), ("up", "down")])
def test_weight_products_are_kept_once_and_beside_them_rank_sized_numbers(execution, targets):
    """`dots_with_no_batch_dims_saveable`: what the frozen block keeps, and ``x @ A`` of every adapted weight."""
    policy = POLICIES.dots_with_no_batch_dims_saveable
    frozen, adapted = of_frozen(policy), of_adapted(policy, execution, targets)
    large = [kept for kept in adapted if kept[0] != (T, R)]
    count = len(targets) if targets != "*" else len(SHAPES)
    assert sorted(large) == sorted(frozen)
    assert adapted.count(((T, R), "bfloat16")) == len(adapted) - len(large) <= count


@ways
def test_with_every_product_kept_rank_sized_numbers_come_on_top_here_too(execution):
    """`dots_saveable` keeps scores and mixtures as well."""
    policy = POLICIES.dots_saveable
    extra = list(of_adapted(policy, execution))
    for kept in of_frozen(policy):
        extra.remove(kept)
    assert extra == [((T, R), "bfloat16")] * len(SHAPES)


def test_written_out_the_same_policy_keeps_twice_as_much():
    """The contrast: three products in the open are three products to a policy."""

    def written(params, x):
        return block({name: Written(*w) for name, w in params.items()}, x)

    class Written:
        def __init__(self, w, a, b):
            self.w, self.a, self.b = w, a.astype(w.dtype), b.astype(w.dtype)

        def __rmatmul__(self, x):
            return x @ self.w + (x @ self.a) @ self.b

    _, lora = lojax.init(jax.random.key(0), PARAMS, "*", rank=R)
    policy = POLICIES.dots_with_no_batch_dims_saveable

    def adapted(pairs, x):
        params = {name: (PARAMS[name], *pair) for name, pair in pairs.items()}
        return jax.checkpoint(written, policy=policy)(params, x)

    kept = activations(adapted, {name: (adapter.a, adapter.b) for name, adapter in lora.items()}, X)
    assert size(kept) >= 1.9 * size(of_frozen(policy))


@ways
@pytest.mark.parametrize("targets", ["*", ("q", "v")])
def test_save_products_keeps_the_sum_once_in_its_own_dtype(execution, targets):
    kept = of_adapted(lojax.remat.save_products(), execution, targets)
    names = SHAPES if targets == "*" else targets
    needed = [name for name in names if name not in ("down",)]  # the last product ends the block: nothing needs it
    expected = [((T, SHAPES[name][1]), "bfloat16") for name in needed]
    left = list(expected)
    for one in kept:
        assert one in left or one[0] == (T, R), one
        if one in left:
            left.remove(one)
    assert size(left) <= size([((T, D), "bfloat16")]), "the result of o only shifts x: it may be left out"


@ways
def test_save_products_keeps_what_the_user_named_as_well(execution):
    ours, both = (of_adapted(lojax.remat.save_products(*names), execution, ["up"]) for names in ((), ("middle",)))
    assert size(both) == size(ours) + size([((T, D), "bfloat16")])


@ways
def test_nothing_is_computed_again_that_was_kept(execution):
    """With `save_products` the backward pass of a block of two products has no frozen product but those of dx."""

    def two(params, x):
        return jnp.tanh(jnp.tanh(x @ params["up"]) @ params["down"])

    def frozen_products(policy):
        model = lojax.wrap(jax.checkpoint(two, policy=policy), ["up", "down"], rank=R, execution=execution)
        frozen, lora = model.init(jax.random.key(0), PARAMS, X)
        gradient = jax.grad(lambda lora, x: jnp.sum(model.apply(frozen, lora, x).astype(jnp.float32)), (0, 1))
        found = [eqn for eqn in equations(jax.make_jaxpr(gradient)(lora, X)) if eqn.primitive.name in PRODUCTS]
        weights = {SHAPES["up"], SHAPES["down"]}
        return sum(any(v.aval.shape in weights for v in eqn.invars) for eqn in found)

    assert frozen_products(lojax.remat.save_products()) == 4
    assert frozen_products(POLICIES.nothing_saveable) > 4


@ways
@pytest.mark.parametrize(
    "policy", [lojax.remat.save_products(), POLICIES.dots_saveable, None], ids=["ours", "dots", "none"]
)
def test_policies_change_no_number(execution, policy):
    params = jax.tree.map(lambda w: w.astype(jnp.float32), PARAMS)
    x = X.astype(jnp.float32)

    def grads(net):
        model = lojax.wrap(net, "*", rank=R, strict=True, execution=execution)
        frozen, lora = model.init(jax.random.key(0), params, x)
        loss = lambda lora, x: jnp.sum(jnp.sin(model.apply(frozen, lora, x)))
        return jax.jit(jax.grad(loss, (0, 1)))(trained(lora), x)

    plain, rematted = grads(block), grads(jax.checkpoint(block, policy=policy))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()))


def test_products_of_every_kind_have_the_name():
    def net(p, x):
        kernel = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "window_strides": (1, 1), "padding": "SAME"}
        y = jax.lax.conv_general_dilated(x, p["conv"], **kernel)
        return (y @ p["dense"]).sum() + p["table"][jnp.array([1, 2])].sum()

    params = {"conv": jnp.ones((3, 3, 4, 6)), "dense": jnp.ones((6, 5)), "table": jnp.ones((9, 7))}
    x = jnp.ones((2, 8, 8, 4))
    model = lojax.wrap(net, "*", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    found = equations(jax.make_jaxpr(model.apply)(frozen, lora, x))
    assert [eqn.params["name"] for eqn in found if eqn.primitive.name == "name"] == [PRODUCT] * 3


def test_offloaded_products_are_moved_and_back():
    model = lojax.wrap(jax.checkpoint(block, policy=lojax.remat.offload_products()), "*", rank=R, strict=True)
    frozen, lora = model.init(jax.random.key(0), PARAMS, X)
    gradient = jax.grad(lambda lora: jnp.sum(model.apply(frozen, lora, X).astype(jnp.float32)))
    moved = [eqn for eqn in equations(jax.make_jaxpr(gradient)(lora)) if eqn.primitive.name == "device_put"]
    assert len(moved) >= 2 * 4 and len(moved) % 2 == 0


def test_one_step_leaves_out_what_does_not_move():
    """A frozen ``A`` (LoRA-FA) has no tangent, not one of zeros: then ``x`` is not kept for it."""
    meet = lambda x, a: [multiply(NamedArray(x, ("t", "d")), a[0], ("t", RANK)).array]
    spread = lambda u, b: multiply(NamedArray(u, ("t", RANK)), b, ("t", "f")).array
    step = opaque_product(meet, [spread])
    f = lambda x, a, b: step(x, [NamedArray(a, ("d", RANK))], [NamedArray(b, (RANK, "f"))])[0]
    x, a, b = jnp.ones((T, D)), jnp.ones((D, R)), jnp.ones((R, F))
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda b: f(x, a, b), b)[1])]
    assert (T, R) in kept and (T, D) not in kept
    both = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda a, b: f(x, a, b), a, b)[1])]
    assert (T, D) in both
