"""One dense layer with an update ``s * A B``, as each library computes it.

Letters: T tokens, m in, n out, r rank. A `Method` turns the same ``w`` [m, n], ``a`` [m, r], ``b`` [r, n] and scale
into what that library trains, what it freezes, and its apply function. All compute the same numbers, which
`check_agreement` asserts. For libraries without a scale (nnx, quax) it is multiplied into ``a`` outside of the
measurement, so they do less work.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measure import Array, PyTree

os.environ.setdefault("KERAS_BACKEND", "jax")

Build = Callable[[Any, Any, Any, float], tuple[Any, Any]]
Apply = Callable[[Any, Any, Any], Any]


class Method(NamedTuple):
    """How one library computes the layer.

    Attributes:
        build: ``(w, a, b, scale) -> (trained, frozen)``; traceable, so shapes are enough.
        apply: ``(trained, frozen, x) -> y``.
    """

    build: Build
    apply: Apply


def lojax_method(m: int, n: int, rank: int, scale: float, *, execution: str) -> Method:
    """Lojax with one of its executions; strict, so that no use is materialized unless asked for."""
    import lojax

    strict, alpha = execution != "materialize", scale * rank
    model = lojax.wrap(
        lambda p, x: x @ p["kernel"], "kernel", rank=rank, alpha=alpha, strict=strict, execution=execution
    )

    def build(w: Array, a: Array, b: Array, scale: float) -> tuple[Any, Any]:
        adapter = lojax.Adapter(a=a, b=b, scale=scale, axes=("in", "out"))
        return {"kernel": adapter}, {"kernel": w}

    return Method(build, lambda trained, frozen, x: model.apply(frozen, trained, x))


def literal_method(m: int, n: int, rank: int, scale: float) -> Method:
    """``x @ (W0 + s * A @ B)``, literally, under plain autodiff."""

    def apply(trained: PyTree, frozen: PyTree, x: Array) -> Any:
        a, b = trained
        return x @ (frozen + scale * (a @ b).astype(frozen.dtype))

    return Method(lambda w, a, b, scale: ((a, b), w), apply)


def by_hand_method(m: int, n: int, rank: int, scale: float) -> Method:
    """``x @ W0 + s * ((x @ A) @ B)``, as LoRA is written by hand, under plain autodiff."""

    def apply(trained: PyTree, frozen: PyTree, x: Array) -> Any:
        a, b = trained
        return x @ frozen + scale * ((x @ a) @ b)

    return Method(lambda w, a, b, scale: ((a, b), w), apply)


def qwix_method(m: int, n: int, rank: int, scale: float) -> Method:
    """Qwix's LoRA provider over a Linen Dense, under jit for init and apply."""
    import qwix
    from flax import linen as nn

    module = qwix.apply_lora_to_model(
        nn.Dense(n, use_bias=False), qwix.LoraProvider(module_path=".*", rank=rank, alpha=scale * rank)
    )

    def build(w: Array, a: Array, b: Array, scale: float) -> tuple[Any, Any]:
        return {"kernel_lora_a": a, "kernel_lora_b": b}, {"kernel": w}

    def apply(trained: PyTree, frozen: PyTree, x: Array) -> Any:
        return module.apply({"params": {**trained, **frozen}}, x)

    return Method(build, apply)


def nnx_method(m: int, n: int, rank: int, scale: float) -> Method:
    """Flax's `nnx.LoRALinear`; it has no scale."""
    from flax import nnx

    def make() -> Any:
        return nnx.LoRALinear(m, n, lora_rank=rank, use_bias=False, rngs=nnx.Rngs(0))

    graph, _ = nnx.split(nnx.eval_shape(make))

    def build(w: Array, a: Array, b: Array, scale: float) -> tuple[Any, Any]:
        return {"lora": {"lora_a": a * scale, "lora_b": b}}, {"kernel": w}

    def apply(trained: PyTree, frozen: PyTree, x: Array) -> Any:
        return nnx.merge(graph, nnx.State({**trained, **frozen}))(x)

    return Method(build, apply)


def quax_method(m: int, n: int, rank: int, scale: float) -> Method:
    """The LoRA example shipped in quax; it has no scale."""
    import equinox as eqx
    import quax
    from quax.examples.lora import LoraArray

    multiply = quax.quaxify(jnp.matmul)

    def build(w: Array, a: Array, b: Array, scale: float) -> tuple[Any, Any]:
        return (a * scale, b), w

    def apply(trained: PyTree, frozen: PyTree, x: Array) -> Any:
        lora = LoraArray(frozen, rank=rank, key=jax.random.key(0))
        return multiply(x, eqx.tree_at(lambda array: (array.a, array.b), lora, trained))

    return Method(build, apply)


def keras_method(m: int, n: int, rank: int, scale: float) -> Method:
    """Keras's `Dense.enable_lora` on its JAX backend."""
    import keras

    layer = keras.layers.Dense(n, use_bias=False, kernel_initializer="zeros")
    layer.build((None, m))
    layer.enable_lora(rank, lora_alpha=scale * rank)
    names = [variable.name for variable in layer.trainable_variables]
    order = ["lora_kernel_a", "lora_kernel_b"]
    assert sorted(names) == order, names

    def build(w: Array, a: Array, b: Array, scale: float) -> tuple[Any, Any]:
        return (a, b), w

    def apply(trained: PyTree, frozen: PyTree, x: Array) -> Any:
        variables = [trained[order.index(name)] for name in names]
        return layer.stateless_call(variables, [frozen], x)[0]

    return Method(build, apply)


def frozen_method(m: int, n: int, rank: int, scale: float) -> Method:
    """No update: the floor, forward and dx."""
    return Method(lambda w, a, b, scale: ((), w), lambda trained, frozen, x: x @ frozen)


def full_method(m: int, n: int, rank: int, scale: float) -> Method:
    """Trains the weight itself."""
    return Method(lambda w, a, b, scale: (w, ()), lambda trained, frozen, x: x @ trained)


EXECUTIONS = ("auto", "factored", "fused", "materialize")
OURS = tuple(f"lojax {execution}" for execution in EXECUTIONS)
METHODS: dict[str, Callable[..., Method]] = {
    "frozen (floor)": frozen_method,
    **{name: functools.partial(lojax_method, execution=e) for name, e in zip(OURS, EXECUTIONS, strict=True)},
    "LoRA by hand": by_hand_method,
    "nnx.LoRALinear": nnx_method,
    "quax": quax_method,
    "qwix": qwix_method,
    "keras": keras_method,
    "literal W0+BA": literal_method,
    "full fine-tuning": full_method,
}
ON_DEVICES = {"lojax kernel": functools.partial(lojax_method, execution="kernel")}
"""For tables of GPUs and TPUs; on a CPU it is the factored product."""
PEERS = ("nnx.LoRALinear", "quax", "qwix", "keras")
PLAIN = ("frozen (floor)", "full fine-tuning")
"""Methods without an update."""


def available() -> tuple[dict[str, Callable[..., Method]], list[str]]:
    """The methods whose library is installed, and a line for each that is not. Checks that they agree."""
    methods, missing = {}, []
    for name, make in METHODS.items():
        try:
            check_agreement(name, make)
            methods[name] = make
        except ImportError as error:
            if name not in PEERS:
                raise
            missing.append(f"{name} is not installed here (no module {error.name})")
    return methods, missing


def check_agreement(name: str, make: Callable[..., Method]) -> None:
    """Raises unless this method gives the same numbers as the formula, on a small layer under jit."""
    m, n, rank, scale = 12, 10, 3, 2.0
    rng = np.random.default_rng(0)
    w, a, b, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((m, n), (m, rank), (rank, n), (5, m)))
    method = make(m, n, rank, scale)
    y = jax.jit(method.apply)(*method.build(w, a, b, scale), x)
    expected = x @ w if name in PLAIN else x @ (w + scale * a @ b)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4, err_msg=name)
