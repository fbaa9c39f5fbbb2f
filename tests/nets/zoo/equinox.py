"""Equinox modules. Every one imports Equinox itself, so that the table stands where Equinox is not installed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.nets.zoo.case import Case, Example, fill, normal


def example(make: Any, call: Any, *args: Any) -> Example:
    """The module that holds the layers ``make()`` makes, and is called as ``call(layers, *args)``."""
    import equinox as eqx

    class Net(eqx.Module):
        layers: Any
        call: Any

        def __call__(self, *args: Any) -> Any:
            return self.call(self.layers, *args)

    net = Net(fill(eqx.filter_eval_shape(make)), call)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return Example(net, params, lambda p: eqx.combine(p, static)(*args), args)


def keys(n: int) -> Any:
    return jax.random.split(jax.random.key(0), n)


def mlp() -> Example:
    import equinox as eqx

    def make() -> Any:
        return eqx.nn.MLP(64, 64, 64, 2, key=jax.random.key(0))

    return example(make, lambda mlp, x: jax.vmap(mlp)(x), normal(0, 32, 64))


def conv() -> Example:
    import equinox as eqx

    def make() -> Any:
        k = keys(3)
        return [
            eqx.nn.Conv2d(4, 8, 3, stride=2, padding=1, key=k[0]),
            eqx.nn.Conv2d(8, 8, 3, groups=2, dilation=2, padding=2, key=k[1]),
            eqx.nn.ConvTranspose2d(8, 8, 2, stride=2, key=k[2]),
        ]

    def call(layers: Any, x: Any) -> Any:
        for layer in layers:
            x = jax.nn.relu(layer(x))
        return x

    return example(make, call, normal(0, 4, 8, 8))


def attention() -> Example:
    import equinox as eqx

    def make() -> Any:
        k = keys(2)
        return {
            "attention": eqx.nn.MultiheadAttention(2, 16, key=k[0]),
            "norm": eqx.nn.LayerNorm(16),
            "mlp": eqx.nn.MLP(16, 16, 32, 1, key=k[1]),
        }

    def call(layers: Any, x: Any) -> Any:
        y = jax.vmap(layers["norm"])(x)
        x = x + layers["attention"](y, y, y)
        return x + jax.vmap(layers["mlp"])(x)

    return example(make, call, normal(0, 5, 16))


def recurrent() -> Example:
    import equinox as eqx

    def make() -> Any:
        k = keys(2)
        return {"lstm": eqx.nn.LSTMCell(8, 16, key=k[0]), "gru": eqx.nn.GRUCell(16, 16, key=k[1])}

    def call(layers: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            state, hidden = carry
            state = layers["lstm"](x, state)
            hidden = layers["gru"](state[0], hidden)
            return (state, hidden), hidden

        zero = jnp.zeros(16)
        return jax.lax.scan(step, ((zero, zero), zero), xs)[1]

    return example(make, call, normal(0, 4, 8))


def stack() -> Example:
    """Layers made by ``filter_vmap``, run by a scan over their arrays."""
    import equinox as eqx

    def make() -> Any:
        return eqx.filter_vmap(lambda key: eqx.nn.MLP(16, 16, 32, 1, key=key))(keys(3))

    def call(layers: Any, x: Any) -> Any:
        arrays, static = eqx.partition(layers, eqx.is_array)

        def step(x: Any, layer: Any) -> Any:
            return x + jax.vmap(eqx.combine(layer, static))(x), None

        return jax.lax.scan(step, x, arrays)[0]

    return example(make, call, normal(0, 6, 16))


def row(name: str, build: Any, targets: Any, count: int, **settings: Any) -> Case:
    return Case(name, "equinox", build, targets, count, requires="equinox", **settings)


CASES = (
    row("mlp_vmap", mlp, "**/weight", 3, flops=0.75),
    row("conv", conv, "**/weight", 3, rows=False),
    row("attention", attention, ["**/*_proj/weight", "**/mlp/**/weight"], 6, rows=False),
    row("lstm_gru_scan", recurrent, "**/weight_*", 4),
    row("filter_vmap_stack", stack, "**/weight", 2),
)
