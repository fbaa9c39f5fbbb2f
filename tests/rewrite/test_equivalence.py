"""Every program computes what it computes with merged weights, factored wherever it can be."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
from tests.rewrite.programs import PROGRAMS, Program, X, normal

LETTER = {"in": "i", "out": "o", "stack": "s"}
rows = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
EXECUTIONS = ("factored", "fused")


@functools.cache
def adapted(program: Program, execution: str = "auto"):
    """The wrapped program, its frozen and fresh trees, and adapters far from zero."""
    strict = program.materialized == 0
    model = lojax.wrap(program.f, "**", rank=2, alpha=3, strict=strict, execution=execution)
    frozen, fresh = model.init(jax.random.key(0), program.params, *program.inputs)
    noise = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda x: jnp.asarray(x + np.float32(0.3) * noise.normal(size=x.shape).astype(np.float32)), fresh
    )
    return model, frozen, fresh, lora


def scalar(outputs) -> jax.Array:
    """A loss whose terms do not cancel."""
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32)) ** 2) for y in jax.tree.leaves(outputs))


def assert_close(actual, expected, tolerance: float) -> None:
    """Leaf by leaf: the norm of the difference is at most ``tolerance`` of the norm expected."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        difference = np.linalg.norm(a - e)
        assert difference <= tolerance * max(np.linalg.norm(e), 1e-3), (difference, np.linalg.norm(e))


@rows
def test_axes_and_uses_are_seen(program: Program) -> None:
    model, frozen, _, lora = adapted(program)
    assert "".join(LETTER[axis] for axis in lora["w"].axes) == program.axes
    uses = [use for weight in model.report(frozen, lora, *program.inputs).weights for use in weight.uses]
    assert len(uses) == program.uses
    assert sum(use.how == "materialized" for use in uses) == program.materialized
    assert all(use.reason for use in uses if use.how == "materialized")


def assert_starts_at_the_base(actual, base, program: Program, execution: str) -> None:
    """To the bit. Where the compiler treats the two programs differently, they are compared operation by operation."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, base)
    if not all(map(np.array_equal, jax.tree.leaves(actual), jax.tree.leaves(base))):
        model, frozen, fresh, _ = adapted(program, execution)
        with jax.disable_jit():
            actual, base = model.apply(frozen, fresh, *program.inputs), program.f(program.params, *program.inputs)
        chex.assert_trees_all_equal(actual, base, strict=True)


def output_and_gradient(f):
    """The output as it is without derivatives, and the gradient of a loss of it: two ways through custom rules."""
    return lambda lora: (f(lora), jax.grad(lambda lora: scalar(f(lora)))(lora))


@rows
def test_starts_at_the_base_and_equals_the_merged_weights_with_its_gradient(program: Program) -> None:
    model, frozen, fresh, lora = adapted(program)
    merged = jax.jit(output_and_gradient(lambda v: program.f(lojax.merge(frozen, v), *program.inputs)))
    (base, _), (expected, expected_gradient) = merged(fresh), merged(lora)
    chex.assert_trees_all_equal(model.merge(frozen, fresh), program.params, strict=True)  # so this base is f(params)
    low = any(y.dtype == jnp.bfloat16 for y in jax.tree.leaves(expected))
    low_gradient = program is PROGRAMS["cast"]
    seen = set()
    for execution in EXECUTIONS:
        run = output_and_gradient(functools.partial(apply_to, *adapted(program, execution)[:2], program.inputs))
        traced = jax.jit(run).trace(lora)
        if str(traced.jaxpr) in seen:
            continue  # the very program that the other execution has
        seen.add(str(traced.jaxpr))
        compiled = traced.lower().compile()
        assert_starts_at_the_base(compiled(fresh)[0], base, program, execution)
        actual, gradient = compiled(lora)
        assert_close(actual, expected, 2e-2 if low else 5e-6)
        assert_close(gradient, expected_gradient, 5e-2 if low_gradient else 1e-5)


def apply_to(model, frozen, inputs, lora):
    return model.apply(frozen, lora, *inputs)


def test_against_numpy_by_hand() -> None:
    """The pin that keeps the oracle from being circular: h = x W0 + (alpha / r) x A B, in float64."""
    w, a, b, x = (np.asarray(normal(*s), np.float64) for s in ((8, 6), (8, 2), (2, 6), (5, 8)))
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2, alpha=3)
    frozen, lora = model.init(jax.random.key(0), {"w": jnp.float32(w)}, X)
    lora = {"w": lojax.Adapter(a=jnp.float32(a), b=jnp.float32(b), scale=lora["w"].scale, axes=lora["w"].axes)}
    expected = x @ w + 3 / 2 * (x @ a) @ b
    np.testing.assert_allclose(model.apply(frozen, lora, jnp.float32(x)), expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(model.merge(frozen, lora)["w"], w + 3 / 2 * a @ b, rtol=1e-5)
    # loss = sum(h * g): dA = s x' (g B'), dB = s (x A)' g
    g = np.asarray(normal(5, 6, seed=3), np.float64)
    grads = jax.grad(lambda lora: jnp.sum(model.apply(frozen, lora, jnp.float32(x)) * jnp.float32(g)))(lora)
    np.testing.assert_allclose(grads["w"].a, 1.5 * x.T @ (g @ b.T), rtol=2e-5)
    np.testing.assert_allclose(grads["w"].b, 1.5 * (x @ a).T @ g, rtol=2e-5)


UNDER_DORA = (
    "chosen_by_flag",
    "chosen_by_vmapped_cond",
    "scaled_columns",
    "scaled_rows",
    "scaled_layers",
    "padded_columns",
    "scaled_copies",
    "padded_layers",
    "padded_copies",
    "summed_rows",
    "one_entry_taken_often",
    "layer_of_each",
    "embedding_filled",
    "embedding_of_unit_axis_filled",
    "embedding_of_each_out_of_bounds",
    "embedding_by_vmapped_cond",
    "conv_by_vmapped_cond",
)


@pytest.mark.parametrize("name", UNDER_DORA)
def test_the_magnitude_of_dora_goes_along(name: str) -> None:
    program = PROGRAMS[name]
    model = lojax.wrap(program.f, "**", rank=2, alpha=3, variant="dora", strict=True)
    frozen, fresh = model.init(jax.random.key(0), program.params, *program.inputs)
    lora = jax.tree.map(lambda x: x + 0.2 * normal(*x.shape), fresh)
    expected = jax.jit(program.f)(lojax.merge(frozen, lora), *program.inputs)
    assert_close(jax.jit(model.apply)(frozen, lora, *program.inputs), expected, 5e-6)


def _vmapped(f):
    return lambda lora: jax.vmap(f)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), lora))


def _second_derivative(f):
    def squared_gradient(lora):
        return sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(lambda v: scalar(f(v)))(lora)))

    return jax.grad(squared_gradient)


def _exported(f):
    def call(lora):
        leaves, tree = jax.tree.flatten(lora)
        exported = jax.export.export(jax.jit(lambda *x: f(jax.tree.unflatten(tree, x))))(*leaves)
        return exported.call(*leaves)

    return call


TRANSFORMS = {
    "remat": jax.checkpoint,
    "vmap_over_adapters": _vmapped,
    "jvp": lambda f: lambda lora: jax.jvp(f, (lora,), (lora,))[1],
    "linearize": lambda f: lambda lora: jax.linearize(f, lora)[1](lora),
    "second_derivative": _second_derivative,
    "export": _exported,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    "name", ["dense", "attention", "scan_layers", "embedding_tied", "conv", "remat", "experts_ragged"]
)
def test_composes_with_transformations(name: str, transform) -> None:
    if name == "experts_ragged" and transform in (_vmapped, _second_derivative):
        name = "experts_apart"  # JAX itself neither batches this ragged_dot nor differentiates it twice
    program = PROGRAMS[name]
    _, frozen, _, lora = adapted(program)
    expected = jax.jit(transform(lambda v: program.f(lojax.merge(frozen, v), *program.inputs)))(lora)
    for execution in EXECUTIONS:
        f = functools.partial(apply_to, *adapted(program, execution)[:2], program.inputs)
        assert_close(jax.jit(transform(f))(lora), expected, 2e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_vmap_over_adapters_serves_each_its_own(execution: str) -> None:
    model, frozen, _, lora = adapted(PROGRAMS["attention"], execution)
    many = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x]), lora)
    together = jax.vmap(model.apply, (None, 0, None))(frozen, many, X)
    for i in range(3):
        alone = model.apply(frozen, jax.tree.map(lambda x, i=i: x[i], many), X)
        assert_close(together[i], alone, 1e-5)
