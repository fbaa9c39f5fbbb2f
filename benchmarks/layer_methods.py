"""One dense layer with an update ``s * A B``, the way each library computes it.

Letters: T tokens, m in, n out, r rank. A `Way` turns the same ``w`` [m, n], ``a`` [m, r], ``b`` [r, n] and
scale into what that library trains, what it freezes, and its apply function, so that all compute the same
numbers (`agree` checks it). Libraries without a scale (nnx, quax) get it multiplied into ``a``, outside of
what is measured: they are measured without their share of that work.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")

Build = Callable[[Any, Any, Any, float], tuple[Any, Any]]
Apply = Callable[[Any, Any, Any], Any]


class Way(NamedTuple):
    """How one library computes the layer.

    Attributes:
        build: ``(w, a, b, scale) -> (trained, frozen)``; traceable, so shapes are enough.
        apply: ``(trained, frozen, x) -> y``.
    """

    build: Build
    apply: Apply


def lojax_way(m: int, n: int, rank: int, scale: float, *, execution: str) -> Way:
    """lojax, by one of its executions; a use that is neither factored nor fused is an error unless asked for."""
    import lojax

    strict, alpha = execution != "materialize", scale * rank
    model = lojax.wrap(
        lambda p, x: x @ p["kernel"], "kernel", rank=rank, alpha=alpha, strict=strict, execution=execution
    )

    def build(w: Any, a: Any, b: Any, scale: float) -> tuple[Any, Any]:
        adapter = lojax.Adapter(a=a, b=b, scale=scale, axes=("in", "out"))
        return {"kernel": adapter}, {"kernel": w}

    return Way(build, lambda trained, frozen, x: model.apply(frozen, trained, x))


def literal_way(m: int, n: int, rank: int, scale: float) -> Way:
    """``x @ (W0 + s * A @ B)``, as the formula is written, under plain autodiff."""

    def apply(trained: Any, frozen: Any, x: Any) -> Any:
        a, b = trained
        return x @ (frozen + scale * (a @ b).astype(frozen.dtype))

    return Way(lambda w, a, b, scale: ((a, b), w), apply)


def qwix_way(m: int, n: int, rank: int, scale: float) -> Way:
    """Qwix's LoRA provider over a Linen Dense, under jit for init and apply."""
    import qwix
    from flax import linen as nn

    module = qwix.apply_lora_to_model(
        nn.Dense(n, use_bias=False), qwix.LoraProvider(module_path=".*", rank=rank, alpha=scale * rank)
    )

    def build(w: Any, a: Any, b: Any, scale: float) -> tuple[Any, Any]:
        return {"kernel_lora_a": a, "kernel_lora_b": b}, {"kernel": w}

    def apply(trained: Any, frozen: Any, x: Any) -> Any:
        return module.apply({"params": {**trained, **frozen}}, x)

    return Way(build, apply)


def nnx_way(m: int, n: int, rank: int, scale: float) -> Way:
    """Flax's `nnx.LoRALinear`; it has no scale."""
    from flax import nnx

    def make() -> Any:
        return nnx.LoRALinear(m, n, lora_rank=rank, use_bias=False, rngs=nnx.Rngs(0))

    graph, _ = nnx.split(nnx.eval_shape(make))

    def build(w: Any, a: Any, b: Any, scale: float) -> tuple[Any, Any]:
        return {"lora": {"lora_a": a * scale, "lora_b": b}}, {"kernel": w}

    def apply(trained: Any, frozen: Any, x: Any) -> Any:
        return nnx.merge(graph, nnx.State({**trained, **frozen}))(x)

    return Way(build, apply)


def quax_way(m: int, n: int, rank: int, scale: float) -> Way:
    """The LoRA example shipped in quax; it has no scale."""
    import equinox as eqx
    import quax
    from quax.examples.lora import LoraArray

    multiply = quax.quaxify(jnp.matmul)

    def build(w: Any, a: Any, b: Any, scale: float) -> tuple[Any, Any]:
        return (a * scale, b), w

    def apply(trained: Any, frozen: Any, x: Any) -> Any:
        lora = LoraArray(frozen, rank=rank, key=jax.random.key(0))
        return multiply(x, eqx.tree_at(lambda array: (array.a, array.b), lora, trained))

    return Way(build, apply)


def keras_way(m: int, n: int, rank: int, scale: float) -> Way:
    """Keras's `Dense.enable_lora` on its JAX backend."""
    import keras

    layer = keras.layers.Dense(n, use_bias=False, kernel_initializer="zeros")
    layer.build((None, m))
    layer.enable_lora(rank, lora_alpha=scale * rank)
    names = [variable.name for variable in layer.trainable_variables]
    order = ["lora_kernel_a", "lora_kernel_b"]
    assert sorted(names) == order, names

    def build(w: Any, a: Any, b: Any, scale: float) -> tuple[Any, Any]:
        return (a, b), w

    def apply(trained: Any, frozen: Any, x: Any) -> Any:
        variables = [trained[order.index(name)] for name in names]
        return layer.stateless_call(variables, [frozen], x)[0]

    return Way(build, apply)


def frozen_way(m: int, n: int, rank: int, scale: float) -> Way:
    """No update at all: the floor, forward and dx."""
    return Way(lambda w, a, b, scale: ((), w), lambda trained, frozen, x: x @ frozen)


def full_way(m: int, n: int, rank: int, scale: float) -> Way:
    """The weight itself trained."""
    return Way(lambda w, a, b, scale: (w, ()), lambda trained, frozen, x: x @ trained)


EXECUTIONS = ("auto", "factored", "fused", "materialize")
OURS = tuple(f"lojax {execution}" for execution in EXECUTIONS)
WAYS: dict[str, Callable[..., Way]] = {
    "frozen (floor)": frozen_way,
    **{name: functools.partial(lojax_way, execution=e) for name, e in zip(OURS, EXECUTIONS, strict=True)},
    "nnx.LoRALinear": nnx_way,
    "quax": quax_way,
    "qwix": qwix_way,
    "keras": keras_way,
    "literal W0+BA": literal_way,
    "full fine-tuning": full_way,
}
PEERS = ("nnx.LoRALinear", "quax", "qwix", "keras")
PLAIN = ("frozen (floor)", "full fine-tuning")
"""Those without an update."""


def available() -> tuple[dict[str, Callable[..., Way]], list[str]]:
    """The ways whose library is installed and computes the right numbers, and a line on each that is not."""
    found, missing = {}, []
    for name, make in WAYS.items():
        try:
            agree(name, make)
            found[name] = make
        except ImportError as error:
            if name not in PEERS:
                raise
            missing.append(f"{name} is not installed here (no module {error.name})")
    return found, missing


def agree(name: str, make: Callable[..., Way]) -> None:
    """Raises unless this way gives the same numbers as the formula, on a small layer under jit."""
    m, n, rank, scale = 12, 10, 3, 2.0
    rng = np.random.default_rng(0)
    w, a, b, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((m, n), (m, rank), (rank, n), (5, m)))
    way = make(m, n, rank, scale)
    y = jax.jit(way.apply)(*way.build(w, a, b, scale), x)
    expected = x @ w if name in PLAIN else x @ (w + scale * a @ b)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4, err_msg=name)
