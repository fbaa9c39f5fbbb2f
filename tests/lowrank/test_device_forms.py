"""The forms of an adapted product for CPUs, GPUs, TPUs and kernels: the same numbers, each for its device."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lojax
from lojax.lowrank import joined_rank, kernel_forms, product_form, unmerged
from lojax.lowrank import product_primitives as primitives
from lojax.lowrank.factor_product import _multiply, _multiply_on_gpu
from lojax.lowrank.named_array import RANK
from tests.helpers import equations
from tests.rewrite.programs import normal

T, M, N, R = 160, 12, 20, 3


def nets() -> dict[str, tuple[Any, Any]]:
    """Programs of one activation, and the shapes of their weights."""
    return {
        "dense": (lambda p, x: x @ p["a"], {"a": (M, N)}),
        "turned": (lambda p, x: x @ p["a"].T, {"a": (N, M)}),
        "q, k, v": (lambda p, x: jnp.concatenate([x @ w for w in p.values()], 1), dict.fromkeys("abc", (M, N))),
        "weight on the left": (lambda p, x: (p["a"] @ x.T).T, {"a": (N, M)}),
        "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["a"]).reshape(T, N), {"a": (M, 4, 5)}),
        "heads together": (lambda p, x: jnp.einsum("thk,hkn->tn", x.reshape(T, 3, 4), p["a"]), {"a": (3, 4, N)}),
        "rows": (lambda p, x: (x.reshape(4, T // 4, M) @ p["a"]).reshape(T, N), {"a": (M, N)}),
    }


def adapted(name: str, **settings: Any) -> tuple[Any, Any, Any, jax.Array]:
    f, shapes = nets()[name]
    params = {n: normal(*s, seed=i) / 3 for i, (n, s) in enumerate(shapes.items())}
    model = lojax.wrap(f, "*", rank=R, alpha=2 * R, **{"execution": "factored", **settings})
    x = normal(T, M, seed=9)
    frozen, lora = model.init(jax.random.key(0), params, x)
    return model, frozen, jax.tree.map(lambda v: v + 0.3 * normal(*v.shape), lora), x


def outputs(model: Any, frozen: Any, lora: Any, x: jax.Array) -> Any:
    loss = lambda lora, x: jnp.sum(jnp.sin(model.apply(frozen, lora, x)))
    return model.apply(frozen, lora, x), jax.grad(loss, (0, 1))(lora, x)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b))))


def by_kernel(kernel: Any, plain: Any, forms: Any, x: Any, w: Any) -> Any:
    """``kernel`` where there is one, as the engine chooses; elsewhere ``plain``."""
    return kernel if not any(map(kernel_forms.unsupported, forms, [x] * len(forms), w)) else plain


def kernel_product(x: Any, h: Any, w: Any, b: Any, *, form: Any) -> Any:
    kernel = functools.partial(kernel_forms.product, lowering="plain")
    return by_kernel(kernel, product_form.product, [form], x, [w])(x, h, w, b, form=form)


def kernel_cotangent(cotangents: Any, fixed: Any, moving: Any, forms: Any) -> Any:
    kernel = functools.partial(kernel_forms.cotangent, lowering="plain")
    compute = by_kernel(kernel, product_form.cotangent, forms, fixed["z"], fixed["w"])
    return compute(cotangents, fixed, moving, forms)


FORMS = {
    "joined rank": (joined_rank.product, joined_rank.cotangent),
    "unmerged": (unmerged.product, unmerged.cotangent),
    "kernel": (kernel_product, kernel_cotangent),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", nets())
def test_the_forms_of_devices_give_the_same_numbers(name: str, form: str) -> None:
    """On the operands of each primitive in the program of a gradient."""
    model, frozen, lora, x = adapted(name)
    loss = lambda lora, x: jnp.sum(jnp.sin(model.apply(frozen, lora, x)))
    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(lora, x)
    product, cotangent = FORMS[form]
    compared = 0
    for eqn in equations(program):
        operands = [normal(*v.aval.shape, seed=i) for i, v in enumerate(eqn.invars) if hasattr(v.aval, "shape")]
        if eqn.primitive is primitives.product_p:
            found, expected = (f(*operands, **eqn.params) for f in (product, product_form.product))
        elif eqn.primitive is primitives.cotangent_p:
            both = (functools.partial(primitives._cotangent, compute=f) for f in (cotangent, product_form.cotangent))
            found, expected = (f(*operands, **eqn.params) for f in both)
        else:
            continue
        assert_close(found, expected)
        compared += 1
    assert compared == (4 if name == "q, k, v" else 2)


@pytest.mark.parametrize("name", nets())
def test_values_and_gradients_are_those_of_merged_weights(name: str) -> None:
    model, frozen, lora, x = adapted(name)
    f, _ = nets()[name]
    merged = lambda lora, x: f(lojax.merge(frozen, lora), x)
    right = merged(lora, x), jax.grad(lambda lora, x: jnp.sum(jnp.sin(merged(lora, x))), (0, 1))(lora, x)
    assert_close(outputs(model, frozen, lora, x), right)


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 33, 64, 65])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_sum_over_the_rank_is_the_product(rank: int, dtype: Any) -> None:
    x, y = normal(96, rank).astype(dtype), normal(rank, 300).astype(dtype)
    settings: dict[str, Any] = {
        "x_dims": ("t", RANK), "y_dims": (RANK, "n"), "out": ("t", "n"),
        "gradient": False, "precision": lax.Precision.HIGHEST, "dtype": jnp.dtype(jnp.float32),
    }  # fmt: skip
    on_gpu = functools.partial(_multiply_on_gpu, **settings)
    np.testing.assert_allclose(on_gpu(x, y), _multiply(x, y, **settings), rtol=1e-5, atol=1e-4)
    products = str(jax.make_jaxpr(on_gpu)(x, y)).count("dot_general")
    assert products == (rank > 64 or 4 * 300 * rank > 96 * 300)


def lowered(f: Any, *args: Any, platform: str) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", ["dense", "q, k, v"])
def test_each_device_gets_its_own_form(name: str) -> None:
    model, frozen, lora, x = adapted(name)
    run = lambda lora, x: outputs(model, frozen, lora, x)[1]
    programs = {platform: lowered(run, lora, x, platform=platform) for platform in ("cpu", "cuda", "tpu")}
    joined = {platform: text.count(f"tensor<{T}x{M + R}xf32>") for platform, text in programs.items()}
    assert joined["tpu"] > 0 and joined["cpu"] == joined["cuda"] == 0
    kept_apart = {platform: text.count("stablehlo.optimization_barrier") for platform, text in programs.items()}
    assert kept_apart["cuda"] == 2 * len(nets()[name][1]) and kept_apart["cpu"] == kept_apart["tpu"] == 0
    summed = {platform: len(re.findall(r"stablehlo.reduce\(.*add", text)) for platform, text in programs.items()}
    assert summed["cuda"] > summed["tpu"] == summed["cpu"]


def test_a_program_for_several_tpus_joins_nothing() -> None:
    model, frozen, lora, x = adapted("dense")
    mesh = jax.make_mesh((2,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), (lora, x))
    text = lowered(lambda lora, x: model.apply(frozen, lora, x), *args, platform="tpu")
    assert f"tensor<{T}x{M + R}xf32>" not in text


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.12
@pytest.mark.parametrize("name", nets())
def test_kernels_are_factored_on_a_cpu_and_kernels_elsewhere(name: str) -> None:
    model, frozen, lora, x = adapted(name, execution="kernel")
    factored = adapted(name)[0]
    assert_close(outputs(model, frozen, lora, x), outputs(factored, frozen, lora, x), 1e-6)
    report = model.report(frozen, lora, x)
    run = lambda lora, x: model.apply(frozen, lora, x)
    if name == "weight on the left":
        assert report.weights[0].how == "factored" and "whose axes are in this order" in str(report)
        strict = lojax.wrap(nets()[name][0], "*", rank=R, alpha=2 * R, execution="kernel", strict=True)
        with pytest.raises(ValueError, match=r"a: execution='kernel' asks .*'dot_general'.*axes are in this"):
            strict.apply(frozen, lora, x)
    else:
        assert {weight.how for weight in report.weights} == {"kernel"}
        assert "by kernels" in str(report)
        for platform in ("cuda", "tpu"):
            assert "custom_call" in lowered(run, lora, x, platform=platform)


@pytest.mark.parametrize("name", ["dense", "q, k, v", "heads"])
def test_derivatives_of_any_order_and_under_vmap(name: str) -> None:
    f, _ = nets()[name]
    with jax.enable_x64(True):
        model, frozen, lora, x = jax.tree.map(lambda v: v, adapted(name))
        frozen, lora, x = jax.tree.map(lambda v: v.astype(jnp.float64), (frozen, lora, x))
        ours = lambda lora, x: jnp.sum(jnp.sin(model.apply(frozen, lora, x)))
        right = lambda lora, x: jnp.sum(jnp.sin(f(lojax.merge(frozen, lora), x)))

        def several(f: Any) -> Any:
            gradient = jax.grad(f, (0, 1))
            square = lambda lora, x: sum(jnp.vdot(v, v) for v in jax.tree.leaves(gradient(lora, x)))
            along = jax.jvp(f, (lora, x), jax.tree.map(jnp.cos, (lora, x)))[1]
            both = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), (lora, x))
            return (
                jax.grad(square, (0, 1))(lora, x),
                along,
                jax.vmap(gradient)(*both),
                jax.vmap(gradient, (None, 0))(lora, both[1]),
                jax.jacfwd(f, 1)(lora, x),
            )

        assert_close(jax.jit(lambda: several(ours))(), jax.jit(lambda: several(right))(), 1e-9)


def test_an_output_that_nothing_reads_moves_nothing() -> None:
    model, frozen, lora, x = adapted("q, k, v")
    first = lambda lora, x: jnp.sum(jnp.sin(model.apply(frozen, lora, x)[:, :N]))
    f, _ = nets()["q, k, v"]
    right = lambda lora, x: jnp.sum(jnp.sin(f(lojax.merge(frozen, lora), x)[:, :N]))
    assert_close(jax.grad(first, (0, 1))(lora, x), jax.grad(right, (0, 1))(lora, x))
