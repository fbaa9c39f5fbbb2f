"""The evaluator: strict mode, the visible fallback, names, settings of structure, tracing once."""

import re
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lojax
from lojax.lowrank import factored
from lojax.rewrite.recorder import MaterializedError
from tests.helpers import PRODUCTS, equations
from tests.rewrite.programs import X, normal


def wrapped(f, shapes, *inputs, **settings):
    model = lojax.wrap(f, "**", rank=2, **settings)
    params = {name: normal(*shape) for name, shape in shapes.items()}
    return (model, *model.init(jax.random.key(0), params, *inputs))


def jaxpr_of(model, frozen, lora, *inputs):
    return jax.make_jaxpr(model.apply)(frozen, lora, *inputs)


def test_strict_mode_names_weight_primitive_line_and_fix() -> None:
    model, frozen, lora = wrapped(lambda p, x: x @ jnp.tanh(p["w"]), {"w": (8, 6)}, X, strict=True)
    with pytest.raises(MaterializedError) as error:
        model.apply(frozen, lora, X)
    text = str(error.value)
    for part in ("w (shape (8, 6))", "'tanh'", "test_interpreter.py", "strict=False", "not linear"):
        assert part in text


def test_fallback_is_reported_with_reason_and_line() -> None:
    model, frozen, lora = wrapped(lambda p, x: x @ jnp.tanh(p["w"]), {"w": (8, 6)}, X)
    report = model.report(frozen, lora, X)
    (use,) = report.weights[0].uses
    assert (use.how, use.primitive) == ("materialized", "tanh")
    assert "test_interpreter.py" in use.where and "not linear" in use.reason
    assert "materialized for 'tanh'" in str(report)


def test_a_product_forms_no_weight_and_transposes_nothing() -> None:
    model, frozen, lora = wrapped(lambda p, x: x @ p["w"], {"w": (8, 6)}, X)
    names = [eqn.primitive.name for eqn in equations(jaxpr_of(model, frozen, lora, X))]
    assert sum(name in PRODUCTS for name in names) == 3 and "transpose" not in names


def test_scale_touches_b_alone_and_stays_out_of_loops() -> None:
    def f(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    model, frozen, lora = wrapped(f, {"w": (3, 8, 8)}, X, alpha=3)
    (scaling,) = [e for e in equations(jaxpr_of(model, frozen, lora, X)) if e.primitive.name == "mul"]
    assert scaling.outvars[0].aval.shape == (3, 2, 8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_float32_adapters_never_promote_activations(dtype) -> None:
    x, w = X.astype(dtype), normal(8, 6).astype(dtype)
    model = lojax.wrap(lambda p, x: jnp.tanh(x @ p["w"]), "w", rank=2)
    frozen, lora = model.init(jax.random.key(0), {"w": w}, x)
    assert lora["w"].a.dtype == jnp.float32
    closed = jaxpr_of(model, frozen, lora, x)
    assert closed.out_avals[0].dtype == dtype
    wide = [v.aval for e in equations(closed) for v in e.outvars if v.aval.dtype == jnp.float32]
    assert not [aval for aval in wide if aval.shape in ((5, 6), (5, 8), (8, 6))]


def test_preferred_element_type_and_precision_reach_every_product() -> None:
    def f(p, x):
        return lax.dot(
            x.astype(jnp.bfloat16), p["w"], precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    model = lojax.wrap(f, "w", rank=2)
    frozen, lora = model.init(jax.random.key(0), {"w": normal(8, 6).astype(jnp.bfloat16)}, X)
    products = [e for e in equations(jaxpr_of(model, frozen, lora, X)) if e.primitive.name in PRODUCTS]
    assert len(products) == 3
    assert {v.aval.dtype for e in products for v in e.outvars} == {jnp.dtype(jnp.float32)}
    assert {e.params["precision"] for e in products} == {(lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("execution", ["factored", "fused"])
def test_names_of_scopes_survive(execution: str) -> None:
    def f(p, x):
        with jax.named_scope("layer"), jax.named_scope("query"):
            return x @ p["w"]

    model = lojax.wrap(f, "w", rank=2, execution=execution)
    frozen, lora = model.init(jax.random.key(0), {"w": normal(8, 6)}, X)
    gradient = jax.grad(lambda lora, frozen, x: model.apply(frozen, lora, x).sum())
    for program, args in ((model.apply, (frozen, lora, X)), (gradient, (lora, frozen, X))):
        compiled = jax.jit(program).lower(*args).compile().as_text() or ""
        names = re.findall(r' dot\(.*op_name="([^"]*)"', compiled)
        assert len(names) >= 2
        assert all(re.search(r"\blayer\b.*/query/", name) for name in names), names


def test_matmul_precision_of_the_users_context_survives() -> None:
    def f(p, x):
        with jax.default_matmul_precision("float32"):
            return x @ p["w"]

    model, frozen, lora = wrapped(f, {"w": (8, 6)}, X)
    products = [e for e in equations(jaxpr_of(model, frozen, lora, X)) if e.primitive.name in PRODUCTS]
    assert {e.params["precision"] for e in products} == {(lax.Precision.HIGHEST,) * 2}


def test_settings_of_structure_survive() -> None:
    policy = jax.checkpoint_policies.dots_saveable

    def f(p, x):
        step = jax.checkpoint(lambda c, w: jnp.tanh(c @ w), policy=policy, prevent_cse=False)
        x, _ = lax.scan(lambda c, w: (step(c, w), None), x, p["w"], reverse=True, unroll=2)
        return jax.jit(lambda x, w: x @ w, inline=False)(x, p["v"])

    model, frozen, lora = wrapped(f, {"w": (4, 8, 8), "v": (8, 6)}, X)
    found = {e.primitive.name: e.params for e in equations(jaxpr_of(model, frozen, lora, X))}
    assert found["scan"]["reverse"] is True and found["scan"]["unroll"] == 2 and found["scan"]["length"] == 4
    assert found["remat2"]["policy"] is policy and found["remat2"]["prevent_cse"] is False
    assert found["jit"]["name"] == "<lambda>"


def test_each_body_is_traced_once() -> None:
    traced = []

    @jax.jit
    def layer(w, x):
        traced.append("layer")
        return jnp.tanh(x @ w)

    def f(p, x):
        traced.append("net")
        for name in sorted(p):
            x = layer(p[name], x)
        return x

    model, frozen, lora = wrapped(f, {f"w{i}": (8, 8) for i in range(4)}, X)
    traced.clear()
    jax.clear_caches()
    step = jax.jit(model.apply)
    step(frozen, lora, X)
    step(frozen, jax.tree.map(lambda v: v + 1, lora), X)
    assert traced == ["net", "layer"]


def test_calls_of_one_jitted_function_share_one_rewritten_body() -> None:
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def f(p, x):
        return layer(p["w"], layer(p["w"], x))

    model, frozen, lora = wrapped(f, {"w": (8, 8)}, X)
    calls = [e for e in equations(jaxpr_of(model, frozen, lora, X)) if e.primitive.name == "jit" and len(e.invars) == 4]
    assert len(calls) == 2
    assert calls[0].params["jaxpr"] is calls[1].params["jaxpr"]


def test_uses_inside_a_scan_are_counted_for_every_trip() -> None:
    def f(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    model, frozen, lora = wrapped(f, {"w": (7, 8, 8)}, X)
    (use,) = model.report(frozen, lora, X).weights[0].uses
    assert use.flops == 7 * 2 * 5 * 8 * 8
    assert use.extra_flops == 7 * 2 * 5 * 2 * (8 + 8)


def test_the_users_own_error_keeps_its_line() -> None:
    def f(p, x):
        y = x @ p["w"]
        if y.sum() > 0:  # a traced value as a Python condition
            return y
        return x

    model = lojax.wrap(f, "w", rank=2)
    frozen, lora = model.init(jax.random.key(0), {"w": normal(8, 6)})
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        model.apply(frozen, lora, X)
    assert any("if y.sum() > 0" in str(entry.statement) for entry in error.traceback)


def test_frozen_weights_get_no_gradient() -> None:
    model, frozen, lora = wrapped(lambda p, x: (x @ p["w"]).sum(), {"w": (8, 6)}, X)
    grads = jax.grad(model.apply)(frozen, lora, X)
    assert float(jnp.abs(grads["w"]).max()) == 0.0


def test_a_product_goes_through_seven_modules(monkeypatch):
    """From the equation to the product with a factor: what a reader has to open."""
    package = Path(lojax.__file__).parent
    stacks = []

    def multiply(*args, **kwargs):
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        stacks.append([str(f.relative_to(package)) for f in files if f.is_relative_to(package)])
        return multiply_itself(*args, **kwargs)

    multiply_itself = factored.multiply
    monkeypatch.setattr(factored, "multiply", multiply)
    monkeypatch.setattr(factored, "factor_product", multiply)
    model = lojax.wrap(lambda params, x: x @ params["w"], "w", rank=2, execution="factored")
    pair = model.init(jax.random.key(0), {"w": normal(4, 3)})
    model.apply(*pair, normal(2, 4))
    assert len(stacks) == 2  # x @ a, and the result @ b
    assert "lowrank/product_primitives.py" in stacks.pop()
    for stack in stacks:
        below_the_evaluation = stack[stack.index("rewrite/evaluate.py") + 1 :]
        modules = set(below_the_evaluation) - {"rewrite/evaluate.py"}
        assert modules == {
            "rewrite/interpreter.py",
            "rewrite/rules/products.py",
            "rewrite/shared_pass.py",
            "lowrank/adapted_products.py",
            "lowrank/product_form.py",
            "lowrank/factored.py",
        }
