"""Random programs: value and gradient equal those of the merged weight, in float64."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, seed, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lojax
from tests.rewrite.random_programs import Drawn, programs

SHARDS = int(os.environ.get("LOJAX_RANDOM_SHARDS", "1"))
CASES = int(os.environ.get("LOJAX_RANDOM_CASES", "20"))
"""Programs drawn by each shard, and a fifth as many on a mesh. .ci/run draws 150 in all, .ci/thorough 10,000."""
SEED = int(os.environ.get("LOJAX_RANDOM_SEED", "0"))
"""Other seeds draw other programs. By default they are always the same, so that a change is blamed for its own faults;
CI draws a new seed for each run and prints it."""

NO_FACTORED_FORM = (
    "a reshape that merges in axes with out axes",
    "an outer product sums no axis",
    "the product sums no axis that one factor has alone",
    "a convolution whose window or input features are out axes of the adapter",
    "experts whose group axis is no stack, or whose in axes are not the summed ones",
    # the drawn cast step adds the weight to a copy of itself
    "a convolution with a sum of updates",
    "experts with a sum of updates",
    "a concatenation of sums of updates, under dropout, or with DoRA",
)
UNDER_DORA = (
    "a product that sums some of the axes of a DoRA magnitude",
    "a convolution whose DoRA magnitude is not along the output features",
    "DoRA inside a function with its own forward derivative",
    "experts whose DoRA magnitude is not along their output features",
    "a sum of two adapted weights of different shapes, under dropout, or with DoRA",
    "a sum with a weight under DoRA",
    "a sum over some of the axes of a DoRA magnitude",
)


def gradients(f):
    """The value, and the gradient of what trains and of the input."""
    return jax.value_and_grad(lambda v, x: jnp.sum(f(v, x) ** 2), (0, 1))


def forward(f):
    """The value and its derivative along all of the arguments."""
    return lambda v, x: jax.jvp(f, (v, x), jax.tree.map(jnp.cos, (v, x)))


def over_adapters(f):
    """Gradients of two adapters at once."""
    return lambda v, x: jax.vmap(gradients(f), (0, None))(jax.tree.map(lambda y: jnp.stack([y, jnp.sin(y)]), v), x)


def second(f):
    """The gradient of a gradient."""

    def steepness(v, x):
        return sum(jnp.vdot(g, jnp.sin(g)) for g in jax.tree.leaves(jax.grad(lambda v: jnp.sum(f(v, x) ** 2))(v)))

    return jax.grad(steepness)


def ill_conditioned(f, v, x, values) -> bool:
    """Whether rounding alone moves the values of ``f(v, x)`` by a hundredth of what is asked of them, or more.

    Products that feed a sine can grow until a last bit of the input decides everything: one draw in ten thousand. Such
    a program says nothing about how it was computed.
    """
    tilted = jax.tree.map(lambda y: y * (1 + 2.0**-51 * np.cos(np.arange(y.size)).reshape(y.shape)), (v, x))
    return not agree(jax.jit(f)(*tilted), values, 0.01)


def agree(one, two, share: float = 1.0) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    scales = [(a, b, max(1.0, float(np.max(np.abs(b), initial=0)))) for a, b in pairs]
    return all(np.allclose(a, b, share * 1e-7, share * 1e-9 * scale, equal_nan=True) for a, b, scale in scales)


def check(drawn: Drawn, execution: str, variant: str, transform, spec: PartitionSpec | None = None) -> None:
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=drawn.shape)), jnp.asarray(drawn.x)
    placed = w if spec is None else jax.device_put(w, NamedSharding(jax.sharding.get_mesh(), spec))
    try:
        jax.jit(transform(drawn.f)).lower({"w": placed}, x)
    except Exception:  # JAX has no such derivative of the program itself, or cannot tell where its results lie
        reject()
    model = lojax.wrap(
        drawn.f,
        "w",
        rank=drawn.rank,
        alpha=3,
        axes=drawn.axes,
        init=lambda key, shape, dtype, **sizes: jnp.zeros(shape, dtype),  # replaced by noise below
        dtype=jnp.float64,
        execution=execution,
        variant=variant,
    )
    frozen, fresh = model.init(jax.random.key(0), {"w": placed}, x)
    noise = jax.tree.map(lambda v: rng.normal(size=v.shape), fresh)
    lora = jax.tree.map(lambda v, n: jax.device_put(n, v.sharding), fresh, noise)
    oracle = transform(lambda v, x: drawn.f(lojax.merge({"w": w}, v), x))
    expected = jax.jit(oracle)(jax.tree.map(jnp.asarray, noise), x)
    actual = jax.jit(transform(lambda v, x: model.apply(frozen, v, x)))(lora, x)
    if not agree(actual, expected):
        if ill_conditioned(oracle, jax.tree.map(jnp.asarray, noise), x, expected):
            reject()
        raise AssertionError(f"got\n{actual}\nexpected\n{expected}")
    for use in model.report(frozen, lora, x).weights[0].uses:
        allowed = NO_FACTORED_FORM + UNDER_DORA * (variant == "dora")
        assert use.how in ("factored", "fused") or use.reason in allowed, use


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def draw(test, shard: int, cases: int, **more) -> None:
    """Runs ``test`` on so many draws; the seed is among what pytest shows of a failure."""
    number = 1000 * SEED + shard
    print(f"LOJAX_RANDOM_SEED={SEED}, shard {shard}: hypothesis seed {number}")
    drawn = {
        "drawn": programs(),
        "execution": st.sampled_from(("auto", "factored", "fused")),
        "variant": st.sampled_from(("lora", "lora", "dora")),
        "transform": st.sampled_from((gradients, gradients, forward, over_adapters, second)),
    }
    how = settings(
        max_examples=cases, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    seed(number)(how(given(**drawn | more)(test)))()


shards = pytest.mark.parametrize("shard", range(SHARDS))


@shards
def test_random_programs(shard: int) -> None:
    def test(drawn, execution, variant, transform):
        check(drawn, execution, variant, transform)

    draw(test, shard, CASES)


@shards
def test_on_a_mesh_of_explicit_axes(shard: int) -> None:
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])

    def test(drawn, execution, variant, transform, data):
        left, entries = ["a", "b"], []
        for n in drawn.shape:
            entries.append(data.draw(st.sampled_from([None, *left] if n % 2 == 0 else [None])))
            left = [name for name in left if name != entries[-1]]
        with jax.set_mesh(mesh):
            check(drawn, execution, variant, transform, PartitionSpec(*entries))

    draw(test, shard, max(1, CASES // 5), data=st.data())
