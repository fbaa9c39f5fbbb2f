"""Nets that reduce over a named axis: one example shows how they use their weights, whoever binds the name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lojax
from lojax.nets.named_axes import bind_named_axes
from tests.helpers import message, trained

XS = jnp.linspace(-1, 1, 12).reshape(3, 4)


def mean_net(params: Any, x: Any) -> Any:
    x = lax.pmean(x @ params["w"], "batch")
    return x * lax.psum(1, ("batch", "model"))


@pytest.mark.parametrize("shape_only", [False, True])
def test_a_function_that_reduces_over_names(shape_only: bool) -> None:
    params = {"w": jnp.ones((4, 3))}
    x = jax.ShapeDtypeStruct((4,), jnp.float32) if shape_only else XS[0]
    model = lojax.wrap(mean_net, "w", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    assert lora["w"].axes == ("in", "out")
    assert model.report(frozen, lora, x).factored == 1
    _, by_function = lojax.init(jax.random.key(0), params, "w", rank=2, apply_fn=mean_net, example_args=[x])
    assert by_function["w"].axes == ("in", "out")


def test_equinox_batch_norm() -> None:
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        linear: Any
        norm: Any

        def __init__(self) -> None:
            self.linear = eqx.nn.Linear(4, 4, key=jax.random.key(0))
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")

        def __call__(self, x: Any, state: Any) -> Any:
            return self.norm(self.linear(x), state)

    net, state = eqx.nn.make_with_state(Net)()
    model = lojax.wrap(net, "linear/weight", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), model.params, XS[0], state)
    assert lora.linear.weight.axes == ("out", "in")
    assert model.report(frozen, lora, XS[0], state).factored == 1
    lora = trained(lora)
    run = lambda f: jax.vmap(f, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(XS, state)
    outputs, state_after = run(lambda x, s: model.apply(frozen, lora, x, s))
    expected, expected_state = run(model.bind(model.merge(frozen, lora)))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state_after, expected_state)


def test_nnx_batch_norm() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, axis_name="devices", rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.norm(self.linear(x))

    model = lojax.wrap(Net(nnx.Rngs(0)), "linear/kernel", rank=2, strict=True)
    frozen, lora = model.init(jax.random.key(0), model.params, XS)
    assert model.report(frozen, lora, XS).factored == 1


def test_other_names_that_are_missing_stay_errors() -> None:
    with pytest.raises(NameError, match="missing_name"):
        bind_named_axes(lambda: missing_name)()  # noqa: F821  # type: ignore[name-defined]
    assert "unbound axis name: batch" in message(NameError, mean_net, {"w": jnp.ones((4, 3))}, XS[0])
