"""What a batch of mixed adapters costs, by XLA: the base, the low-rank products, and no copy of a weight.

B rows, T tokens a row, m in, n out, r rank, N adapters, L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from tests.helpers import trained

B, T, M, N, RANK, LAYERS = 8, 64, 512, 8, 8, 3


def unrolled(params: Any, x: Any) -> Any:
    for w in params.values():
        x = x @ w
    return x


def scanned(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


def shape(*lengths: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(lengths, dtype)


STACKS: dict[str, tuple[Callable[..., Any], Any, tuple[str, ...]]] = {
    "unrolled": (unrolled, {f"w{i}": shape(M, M) for i in range(LAYERS)}, ("in", "out")),
    "scanned": (scanned, {"w": shape(LAYERS, M, M)}, ("stack", "in", "out")),
}


def banked(name: str, count: int = N) -> tuple[Any, Any, Any]:
    """``(model, frozen, bank)`` by shapes alone; no two adapters have the same scale."""
    f, params, axes = STACKS[name]

    def build() -> Any:
        models = [lojax.wrap(f, "*", rank=RANK, alpha=i + 1, axes=axes, strict=True) for i in range(count)]
        pairs = [model.init(jax.random.key(0), params) for model in models]
        return pairs[0][0], lojax.stack([lora for _, lora in pairs])

    frozen, bank = jax.eval_shape(build)
    return lojax.wrap(f, "*", rank=RANK, axes=axes, strict=True), frozen, bank


def compiled(f: Callable[..., Any], *args: Any) -> Any:
    return jax.jit(f).lower(*args).compile()


def flops(name: str, program: Any, layer: int) -> float:
    """The operations of a whole net. XLA counts the body of a scan once, so those of the other layers are added."""
    return program.cost_analysis()["flops"] + (layer * (LAYERS - 1) if name == "scanned" else 0)


def weight_sized(text: str, rows: int) -> list[str]:
    """The arrays of a compiled program that are as large as a base weight for each row or adapter."""
    found = set(re.findall(r"\[([\d,]+)\]", text))
    assert found, "no array in the text of the program"
    shapes = [[int(d) for d in dims.split(",")] for dims in found]
    return [str(dims) for dims in shapes if dims.count(M) >= 2 and math.prod(dims) >= rows * M * M]


def forward(model: Any) -> Callable[..., Any]:
    return lambda frozen, bank, x, ids: model.apply(frozen, bank, x, adapter=ids)


def gradient(model: Any) -> Callable[..., Any]:
    def loss(bank: Any, x: Any, frozen: Any, ids: Any) -> Any:
        return jnp.sum(model.apply(frozen, bank, x, adapter=ids) ** 2) / 2

    return lambda frozen, bank, x, ids: jax.grad(loss, argnums=(0, 1))(bank, x, frozen, ids)


@pytest.mark.parametrize("name", STACKS)
def test_a_mixed_batch_costs_the_base_and_the_low_rank_products(name: str) -> None:
    model, frozen, bank = banked(name)
    program = compiled(forward(model), frozen, bank, shape(B, T, M), shape(B, dtype=jnp.int32))
    layer = 2 * B * T * M * M + 2 * B * T * RANK * 2 * M
    assert layer * LAYERS < flops(name, program, layer) <= 1.01 * layer * LAYERS
    assert not weight_sized(program.as_text(), B)


@pytest.mark.parametrize("count", [4, 64])
@pytest.mark.parametrize("name", STACKS)
def test_decoding_costs_the_same_whatever_the_size_of_the_bank(name: str, count: int) -> None:
    """With one token a row, each pass over the factors of a row counts: there are two over b, over none other."""
    model, frozen, bank = banked(name, count)
    program = compiled(forward(model), frozen, bank, shape(B, 1, M), shape(B, dtype=jnp.int32))
    layer = 2 * B * M * M + 2 * B * RANK * 2 * M
    passes = 2 * B * RANK * M
    assert flops(name, program, layer) <= 1.002 * (layer + passes) * LAYERS


@pytest.mark.parametrize("name", STACKS)
def test_gradients_of_eight_adapters_cost_as_much_as_those_of_one(name: str) -> None:
    model, frozen, bank = banked(name)
    program = compiled(gradient(model), frozen, bank, shape(B, T, M), shape(B, dtype=jnp.int32))
    layer = 4 * B * T * M * M + 6 * B * T * RANK * 2 * M
    assert layer * LAYERS < flops(name, program, layer) <= 1.01 * layer * LAYERS
    assert not weight_sized(program.as_text(), B)


def test_merged_copies_would_be_found() -> None:
    """The search for copies, on a program that has them."""
    copies = {"w0": shape(N, M, M)}
    program = compiled(lambda p, x: jax.vmap(unrolled)(p, x), copies, shape(N, T, M))
    assert weight_sized(program.as_text(), B)


# --- swaps ---


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The compilations since the list was last cleared."""
    seen: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def small_adapters() -> tuple[Any, list[Any], list[Any]]:
    """A base, twenty adapters of ranks 2-16 and five alphas, and what the net gives with each on its own."""
    params = {name: jnp.asarray(np.random.default_rng(i).normal(size=(24, 24)) / 5) for i, name in enumerate("pq")}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    loras = []
    for i in range(20):
        model = lojax.wrap(unrolled, "*", rank=2 + i * 14 // 19, alpha=(1, 3, 8, 16, 20)[i % 5])
        loras.append(trained(model.init(jax.random.key(i), params)[1], seed=i))
    x = jnp.ones((3, 2, 24))
    return params, loras, [np.asarray(unrolled(lojax.merge(params, lora), x)) for lora in loras]


@pytest.mark.slow  # tests/adapters/test_conform.py swaps twenty into a smaller net
def test_twenty_adapters_swapped_into_one_function_compile_once(compilations: list[str]) -> None:
    frozen, loras, expected = small_adapters()
    model = lojax.wrap(unrolled, "*", rank=16, alpha=24)
    x, like = jnp.ones((3, 2, 24)), model.init(jax.random.key(0), frozen)[1]
    swapped = [lojax.conform(lora, like) for lora in loras]
    run = jax.jit(model.apply)
    compilations.clear()
    outputs = [np.asarray(run(frozen, lora, x)) for lora in swapped]
    assert len(compilations) == 1
    for y, right in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
    run(frozen, loras[0], x)  # not conformed
    assert len(compilations) == 2


@pytest.mark.slow
def test_twenty_adapters_swapped_into_a_bank_compile_once(compilations: list[str]) -> None:
    frozen, loras, expected = small_adapters()
    model = lojax.wrap(unrolled, "*", rank=16)
    bank = lojax.stack(loras[:2], rank=16)
    x, ids = jnp.ones((3, 2, 24)), jnp.array([1, -1, 0])
    banks = [bank.replace(1, lora) for lora in loras]
    run = jax.jit(lambda bank: model.apply(frozen, bank, x, adapter=ids))
    compilations.clear()
    outputs = [np.asarray(run(bank)) for bank in banks]
    assert len(compilations) == 1
    for y, right in zip(outputs, expected, strict=True):
        atol = 1e-5 * np.abs(right).max()
        np.testing.assert_allclose(y[0], right[0], rtol=1e-5, atol=atol)
        np.testing.assert_allclose(y[1], unrolled(frozen, x)[1], rtol=1e-5, atol=atol)
        np.testing.assert_allclose(y[2], expected[0][2], rtol=1e-5, atol=1e-5 * np.abs(expected[0]).max())


# --- a single adapter ---


@pytest.mark.parametrize("name", STACKS)
def test_one_adapter_costs_what_it_costs_by_hand(name: str) -> None:
    """Banks made nothing dearer: the counts of one adapter are those of ``x W + (x A) (s B)``."""
    f, params, axes = STACKS[name]
    model = lojax.wrap(f, "*", rank=RANK, alpha=3, axes=axes, strict=True, execution="factored")
    frozen, lora = jax.eval_shape(model.init, jax.random.key(0), params)

    def by_hand(frozen: Any, lora: Any, x: Any) -> Any:
        product = lambda x, w: (x @ w[0] + (x @ w[1]) @ w[2], None)
        adapters = [(frozen[key], lora[key].a, lora[key].b * lora[key].scale) for key in frozen]
        if name == "scanned":
            return jax.lax.scan(product, x, adapters[0])[0]
        for adapter in adapters:
            x, _ = product(x, adapter)
        return x

    def step(apply: Callable[..., Any]) -> Callable[..., Any]:
        loss = lambda lora, x, frozen: jnp.sum(apply(frozen, lora, x) ** 2) / 2
        return jax.grad(loss, argnums=(0, 1))

    x = shape(B * T, M)
    ours, theirs = (compiled(step(apply), lora, x, frozen) for apply in (model.apply, by_hand))
    found, expected = (program.cost_analysis()["flops"] for program in (ours, theirs))
    assert found <= 1.001 * expected
    found, expected = (program.memory_analysis().temp_size_in_bytes for program in (ours, theirs))
    assert found <= 1.01 * expected
