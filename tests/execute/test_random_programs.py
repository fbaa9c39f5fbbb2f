"""Random programs: value and gradient equal those of the merged weight, in float64."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lojax
from tests.execute.random_programs import Drawn, programs

SHARDS = int(os.environ.get("LOJAX_RANDOM_SHARDS", "1"))
CASES = int(os.environ.get("LOJAX_RANDOM_CASES", "20"))
"""Programs drawn by each shard. The full run of .ci/run draws thousands."""

NO_FACTORED_FORM = (
    "a reshape that merges in axes with out axes",
    "an outer product sums no axis",
    "no axis of one factor alone is summed",
    "a sum of two adapted weights",  # the drawn cast step adds the weight to a copy of itself
)


def check(drawn: Drawn, execution: str) -> None:
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=drawn.shape)), jnp.asarray(drawn.x)
    model = lojax.wrap(drawn.f, "w", rank=drawn.rank, alpha=3, axes=drawn.axes, dtype=jnp.float64, execution=execution)
    frozen, fresh = model.init(jax.random.key(0), {"w": w}, x)
    lora = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), fresh)
    both = jax.jit(jax.value_and_grad(lambda v: jnp.sum(model.apply(frozen, v, x) ** 2)))
    value, grads = both(lora)
    oracle = jax.jit(jax.value_and_grad(lambda v: jnp.sum(drawn.f(lojax.merge(frozen, v), x) ** 2)))
    expected, expected_grads = oracle(lora)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    for actual, right in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-7, atol=1e-9)
    for use in model.report(frozen, lora, x).weights[0].uses:
        assert use.how in ("factored", "fused") or use.reason in NO_FACTORED_FORM, use


@pytest.mark.parametrize("shard", range(SHARDS))
@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=False,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(drawn=programs(), execution=st.sampled_from(("auto", "factored", "fused")))
def test_random_programs(shard: int, drawn: Drawn, execution: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.enable_x64(True):
            check(drawn, execution)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
