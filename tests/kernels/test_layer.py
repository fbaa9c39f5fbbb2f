"""The layer of the kernels: its derivatives, under vmap and shard_map, and which form a device gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lojax.kernels.layer import layer
from tests.kernels.matrices import DTYPES, assert_close, formula, layer_operands

SHAPE = (40, 48, 72, 4)


def y_and_gradients(form, x, w, a, b, g):
    """The result of a layer and its gradients in x, a and b."""
    y, pullback = jax.vjp(lambda x, a, b: form(x, w, a, b, 2.0), x, a, b)
    return y, *pullback(g)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("lowering", ["triton", "mosaic", "plain", "device"])
def test_the_layer_and_its_gradients(lowering, dtype):
    x, w, a, b, g = layer_operands(SHAPE, dtype)
    form = functools.partial(layer, lowering=lowering, interpret=True)
    y, dx, da, db = jax.jit(functools.partial(y_and_gradients, form))(x, w, a, b, g)
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (dtype, dtype, jnp.float32, jnp.float32)
    *expected, db_scaled = formula(x, w, a, 2 * b, g)
    for got, value in zip((y, dx, da, db), (*expected, 2 * db_scaled), strict=True):
        assert_close(got, value, dtype, 2 * max(SHAPE))


def test_without_a_gradient_of_x_no_dx_is_computed():
    x, w, a, b, g = layer_operands(SHAPE, jnp.float32)

    def of_factors(a, b):
        return jnp.vdot(layer(x, w, a, b, 2.0, lowering="triton", interpret=True), g)

    traced = jax.jit(jax.grad(of_factors, (0, 1))).trace(a, b)
    assert "name=cotangents" in str(traced.jaxpr) and "name=gradients" not in str(traced.jaxpr)
    da, db = traced.lower().compile()(a, b)
    _, _, da_expected, db_expected = formula(x, w, a, 2 * b, g)
    assert_close(da, da_expected, jnp.float32, 40)
    assert_close(db, 2 * db_expected, jnp.float32, 40)


def test_vmap_over_adapters():
    x, w, a, b, g = layer_operands(SHAPE, jnp.float32)
    banks = [jnp.stack([v, -v, 2 * v]) for v in (a, b)]
    run = lambda form: jax.vmap(functools.partial(y_and_gradients, form), (None, None, 0, 0, None))
    got = jax.jit(run(functools.partial(layer, lowering="triton", interpret=True)))(x, w, *banks, g)
    for i in range(3):
        y, dx, da, db = formula(x, w, banks[0][i], 2 * banks[1][i], g)
        for value, expected in zip(got, (y, dx, da, 2 * db), strict=True):
            assert_close(value[i], expected, jnp.float32, 2 * max(SHAPE))


@pytest.mark.parametrize("lowering", ["triton", "device"])
def test_shard_map_over_tokens(lowering):
    """The gradients of the factors are sums over the devices, as JAX sums those of replicated arguments."""
    x, w, a, b, g = layer_operands(SHAPE, jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    form = jax.shard_map(
        lambda x, w, a, b: layer(x, w, a, b, 2.0, lowering=lowering, interpret=True),
        mesh=mesh,
        in_specs=(P("data"), P(), P(), P()),
        out_specs=P("data"),
        check_vma=lowering == "device",  # which the interpreter of kernels does not stand
    )
    got = jax.jit(functools.partial(y_and_gradients, lambda x, w, a, b, _: form(x, w, a, b)))(x, w, a, b, g)
    y, dx, da, db = formula(x, w, a, 2 * b, g)
    for value, expected in zip(got, (y, dx, da, 2 * db), strict=True):
        assert_close(value, expected, jnp.float32, 2 * max(SHAPE))


def test_a_layer_of_adapters_off_is_the_base():
    x, w, a, b, _ = layer_operands(SHAPE, jnp.bfloat16)
    y = layer(x, w, a, 0 * b, lowering="triton", interpret=True)
    base = jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(base, np.float32))
