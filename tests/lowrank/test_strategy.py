"""What an adapted net costs, by XLA's own analysis and by the jaxpr: no clocks, so no noise.

T tokens, m in, n out, rank r. The floor is the frozen net with its input gradient, 4Tmn; the low-rank
products add 6Tr(m + n); forming the weight costs 6Tmn and three weight-sized arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lojax
from lojax.lowrank.strategy import EXECUTIONS, choose_strategy, dense_layer, exact
from tests.helpers import PRODUCTS, equations, message

MIB = 2**20


def shape(*lengths: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(lengths, dtype)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What XLA says of a compiled program; ``bytes`` accessed, ``temporaries`` in bytes."""

    flops: float
    bytes: float
    temporaries: int


def cost(f: Callable[..., Any], *args: Any) -> Cost:
    compiled = jax.jit(f).lower(*args).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert analysis is not None and analysis["flops"] > 0, "XLA gave no analysis"
    return Cost(analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes)


def adapted(
    f: Callable[..., Any], params: Any, *inputs: Any, rank: int, execution: str = "factored"
) -> tuple[Any, Any, Callable[..., Any]]:
    """``(frozen, lora, apply)`` by shapes alone, every use factored (or as ``execution`` says) or an error."""
    model = lojax.wrap(f, "**", rank=rank, alpha=2 * rank, strict=execution != "materialize", execution=execution)
    frozen, lora = jax.eval_shape(model.init, jax.random.key(0), params, *inputs)
    return frozen, lora, model.apply


def loss(y: Any) -> Any:
    return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(y))


# --- one dense layer, compiled ---


def dense(params: Any, x: Any) -> Any:
    return x @ params["kernel"]


def dense_cost(
    tokens: int, m: int, n: int, rank: int, *, apply: Callable[..., Any] | None = None, execution: str = "factored"
) -> Cost:
    """The gradient of a dense layer with respect to A, B and x; ``apply`` in place of lojax's."""
    params, x = {"kernel": shape(m, n)}, shape(tokens, m)
    frozen, lora, lojax_apply = adapted(dense, params, x, rank=rank, execution=execution)
    run = apply or lojax_apply
    return cost(jax.grad(lambda lora, x, frozen: loss(run(frozen, lora, x)), argnums=(0, 1)), lora, x, frozen)


def literal(frozen: Any, lora: Any, x: Any) -> Any:
    """``W0 + s * A B`` as the papers write it."""
    adapter = lora["kernel"]
    return x @ (lax.stop_gradient(frozen["kernel"]) + adapter.scale * adapter.a @ adapter.b)


LAYERS = [(4096, 2048, 2048, 16), (1024, 768, 3072, 8), (512, 1024, 256, 64), (4096, 512, 1536, 4)]


@pytest.mark.parametrize(("tokens", "m", "n", "rank"), LAYERS)
def test_a_dense_layer_costs_the_floor_and_the_low_rank_products(tokens: int, m: int, n: int, rank: int) -> None:
    bound = 4 * tokens * m * n + 6 * tokens * rank * (m + n)
    assert dense_cost(tokens, m, n, rank).flops <= 1.02 * bound


@pytest.mark.parametrize("execution", ["factored", "fused", "materialize"])
@pytest.mark.parametrize(("tokens", "m", "n", "rank"), LAYERS)
def test_the_cost_model_is_what_xla_counts(tokens: int, m: int, n: int, rank: int, execution: Any) -> None:
    """Within 2 %; the XLA:CPU of jaxlib 0.10 sees no barriers and forms the fused weight once for both directions."""
    work = dense_layer(tokens, m, n, rank)
    counted = dense_cost(tokens, m, n, rank, execution=execution).flops
    once = work.flops(execution) - (work.materializing if execution == "fused" else 0)
    assert min(abs(counted / said - 1) for said in {once, work.flops(execution)}) <= 0.02


@pytest.mark.parametrize(("tokens", "m", "n", "rank"), [*LAYERS, (2048, 2048, 256, 16), (16, 1024, 1024, 16)])
def test_auto_has_at_most_the_operations_of_the_best_way(tokens: int, m: int, n: int, rank: int) -> None:
    best = min(dense_cost(tokens, m, n, rank, execution=name).flops for name in ("factored", "fused", "materialize"))
    auto = dense_cost(tokens, m, n, rank, execution="auto").flops
    assert auto <= 1.01 * best
    assert auto <= 1.02 * (4 * tokens * m * n + 6 * tokens * rank * (m + n))


def test_the_fused_way_reads_and_writes_less() -> None:
    """The reason to have it: by 23 % where XLA forms the weight once (jaxlib 0.10), by 11 % where it does so twice."""
    layer = (4096, 2048, 2048, 16)
    factored, fused, formed = (dense_cost(*layer, execution=name) for name in ("factored", "fused", "materialize"))
    once = fused.flops < dense_layer(*layer).flops("fused") - dense_layer(*layer).materializing / 2
    assert fused.bytes <= (0.77 if once else 0.89) * factored.bytes
    assert fused.temporaries <= 49 * MIB < 64 * MIB <= formed.temporaries


def test_literal_weights_cost_nearly_half_as_much_again() -> None:
    """The contrast: XLA does not find the factored form by itself, so the bound above can fail."""
    factored, formed = (dense_cost(4096, 2048, 2048, 16, apply=apply) for apply in (None, literal))
    assert formed.flops >= 1.4 * factored.flops
    assert formed.temporaries >= 1.4 * factored.temporaries


def test_a_dense_layer_keeps_one_temporary_of_the_size_of_its_output() -> None:
    output = 4096 * 2048 * 4
    assert dense_cost(4096, 2048, 2048, 16).temporaries <= 33 * MIB == output + MIB


def test_differentiating_the_combined_tree_has_no_weight_sized_product() -> None:
    """A trainer that differentiates ``(frozen, lora)`` gets zeros for ``frozen``, at no cost in products."""
    tokens, m, n, rank = 1024, 512, 768, 8
    params, x = {"kernel": shape(m, n)}, shape(tokens, m)
    frozen, lora, apply = adapted(dense, params, x, rank=rank)

    def combined(tree: Any, x: Any) -> Any:
        return loss(apply(tree["frozen"], tree["lora"], x))

    gradient = jax.grad(combined, argnums=(0, 1))
    tree = {"frozen": frozen, "lora": lora}
    assert (m, n) not in products(gradient, tree, x)
    assert cost(gradient, tree, x).flops <= 1.02 * (4 * tokens * m * n + 6 * tokens * rank * (m + n))
    assert (m, n) in products(jax.grad(lambda p, x: loss(dense(p, x))), params, x), "the net itself forms dW"


def products(f: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
    """The shapes of the results of every `dot_general`, each sorted."""
    found = equations(jax.make_jaxpr(f)(*args))
    return {tuple(sorted(eqn.outvars[0].aval.shape)) for eqn in found if eqn.primitive.name in PRODUCTS}


@pytest.mark.parametrize("rows", [(256,), (4, 64)], ids=["flat", "rows"])
@pytest.mark.parametrize("execution", ["factored", "fused"])
@pytest.mark.parametrize("net", ["dense", "tied", "siblings"])
def test_no_gradient_turns_an_activation_over_on_a_cpu(net: str, execution: str, rows: tuple[int, ...]) -> None:
    """``g^T x`` ``[r, m]``, turned when it is done: ``x^T g`` ``[m, r]`` took a third of the time of ``x W``."""
    m, n, rank = 48, 40, 8
    params = {"kernel": shape(m, n), "other": shape(m, n)}
    nets = {
        "dense": lambda p, x: x @ p["kernel"] + jnp.tanh(x) @ p["other"],
        "tied": lambda p, x: (x @ p["kernel"]) @ p["other"].T,
        "siblings": lambda p, x: (x @ p["kernel"]) * jnp.tanh(x @ p["other"]),
    }
    x = shape(*rows, m)
    frozen, lora, apply = adapted(nets[net], params, x, rank=rank, execution=execution)
    gradient = jax.jit(jax.grad(lambda lora, x, frozen: loss(apply(frozen, lora, x))))
    text = gradient.lower(lora, x, frozen).compile().as_text()
    results = set(re.findall(r"f32\[([\d,]+)\]\S* dot\(", text))
    assert {f"{rank},{n}", f"{rank},{m}", f"{2 * rank},{m}"} & results, "no gradient of a factor is to be seen"
    assert not {f"{m},{rank}", f"{n},{rank}", f"{m},{2 * rank}"} & results
    moved = re.findall(r"f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    assert not [found for found in moved if math.prod(map(int, found.split(","))) >= 256 * n]
    for_tpu = gradient.trace(lora, x, frozen).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.dot_general" in for_tpu and "reduce_precision" not in for_tpu


def test_a_few_tokens_turn_no_gradient() -> None:
    params = {"kernel": shape(64, 64)}

    def turned(tokens: int) -> bool:
        x = shape(tokens, 64)
        frozen, lora, apply = adapted(dense, params, x, rank=8)
        gradient = jax.jit(jax.grad(lambda lora, x, frozen: loss(apply(frozen, lora, x))))
        return "reduce_precision" in gradient.lower(lora, x, frozen).as_text()

    assert not turned(16) and turned(64)


# --- layers under scan, compiled ---


def scanned(params: Any, x: Any, *, remat: bool = False) -> Any:
    def body(c: Any, w: Any) -> Any:
        return jnp.tanh(c @ w["up"]) @ w["down"], None

    return lax.scan(jax.checkpoint(body) if remat else body, x, params)[0]


def slope(program: Callable[..., Any], tokens: int, d: int, h: int, rank: int, net: Callable[..., Any]) -> float:
    """Bytes of temporaries for each further layer; ``program(apply, frozen, lora, x)`` is differentiated."""

    def temporaries(layers: int) -> int:
        params, x = {"up": shape(layers, d, h), "down": shape(layers, h, d)}, shape(tokens, d)
        frozen, lora, apply = adapted(net, params, x, rank=rank)
        gradient = jax.grad(lambda lora, x, frozen: loss(program(apply, frozen, lora, x)), (0, 1))
        return cost(gradient, lora, x, frozen).temporaries

    return (temporaries(16) - temporaries(2)) / 14


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_under_scan_temporaries_do_not_grow_with_the_weights(remat: bool) -> None:
    """A layer keeps what the frozen one keeps, the inputs of its weights (for dA), T·r numbers, and ``s·B``."""
    tokens, d, h, rank = 64, 512, 1024, 4
    net = functools.partial(scanned, remat=remat)
    layer = functools.partial(slope, tokens=tokens, d=d, h=h, rank=rank, net=net)
    alone = layer(lambda apply, frozen, lora, x: net(frozen, x))
    added = layer(lambda apply, frozen, lora, x: apply(frozen, lora, x)) - alone
    kept = 0 if remat else 4 * tokens * (d + h + 2 * rank)
    adapter = 4 * rank * 2 * (d + h)
    assert added <= kept + adapter + 4096 < 0.25 * (d * h * 4)


def test_merging_outside_the_loop_keeps_every_weight() -> None:
    """The contrast to the bound above."""
    merged = slope(lambda apply, frozen, lora, x: scanned(lojax.merge(frozen, lora), x), 64, 512, 1024, 4, scanned)
    assert merged >= 2 * 512 * 1024 * 4


# --- every kind of use, by its jaxpr ---


@dataclasses.dataclass(frozen=True)
class Net:
    """A function of params whose weights are all larger than any activation."""

    f: Callable[..., Any]
    params: dict[str, jax.ShapeDtypeStruct]
    x: jax.ShapeDtypeStruct


def attention(p: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("shk,thk->hst", q, k))
    return jnp.einsum("hst,thk,hkd->sd", scores, v, p["o"])


def tied(p: Any, i: Any) -> Any:
    return jnp.tanh(p["table"][i]) @ p["table"].T


def conv(p: Any, x: Any) -> Any:
    return lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def fused_qkv(p: Any, x: Any) -> Any:
    return [x @ w for w in jnp.split(p["kernel"], 3, axis=-1)]


def experts(p: Any, x: Any) -> Any:
    return lax.ragged_dot(x, p["kernel"], jnp.array([3, 1, 2, 0], jnp.int32))


HEADS = {**dict.fromkeys("qkv", shape(48, 4, 12)), "o": shape(4, 12, 48)}
STACK = {"up": shape(3, 48, 64), "down": shape(3, 64, 48)}
NETS = {
    "dense": Net(dense, {"kernel": shape(48, 40)}, shape(6, 48)),
    "dense transposed": Net(lambda p, x: x @ p["kernel"].T, {"kernel": shape(40, 48)}, shape(6, 48)),
    "dense cast": Net(
        lambda p, x: x @ p["kernel"].astype(x.dtype), {"kernel": shape(48, 40)}, shape(6, 48, dtype=jnp.bfloat16)
    ),
    "heads": Net(attention, HEADS, shape(6, 48)),
    "embedding": Net(lambda p, i: p["table"][i], {"table": shape(96, 48)}, shape(6, dtype=jnp.int32)),
    "tied embedding": Net(tied, {"table": shape(96, 48)}, shape(6, dtype=jnp.int32)),
    "fused qkv": Net(fused_qkv, {"kernel": shape(48, 144)}, shape(6, 48)),
    "conv": Net(conv, {"kernel": shape(3, 3, 32, 40)}, shape(1, 6, 6, 32)),
    "experts": Net(experts, {"kernel": shape(4, 48, 40)}, shape(6, 48)),
    "scan": Net(scanned, STACK, shape(6, 48)),
    "remat": Net(lambda p, x: jax.checkpoint(dense)(p, x), {"kernel": shape(48, 40)}, shape(6, 48)),
    "scan of remat": Net(functools.partial(scanned, remat=True), STACK, shape(6, 48)),
    "jit": Net(lambda p, x: jax.jit(dense)(p, x), {"kernel": shape(48, 40)}, shape(6, 48)),
}
nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS)

CALLS = {"scan", "while", "cond", "jit", "pjit", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}
FREE = {"stop_gradient", "optimization_barrier"}  # marks, which make no array


def weight_sized(f: Callable[..., Any], least: int, *args: Any) -> Counter[str]:
    """How often each primitive gives a result of at least ``least`` numbers; calls count by what is inside."""
    return Counter(
        eqn.primitive.name
        for eqn in equations(jax.make_jaxpr(f)(*args))
        if eqn.primitive.name not in CALLS | FREE
        for var in eqn.outvars
        if math.prod(getattr(var.aval, "shape", ())) >= least
    )


def gradients(net: Net, rank: int = 2) -> tuple[int, Any, Any, Any]:
    """``(size, frozen, adapted, formed)``: the smallest single weight and value_and_grad of three programs."""
    frozen, lora, apply = adapted(net.f, net.params, net.x, rank=rank)
    floats = jnp.issubdtype(net.x.dtype, jnp.floating)
    layers = 3 if net.params is STACK else 4 if net.f is experts else 1
    least = min(math.prod(w.shape) for w in net.params.values()) // layers

    def alone(frozen: Any, lora: Any, x: Any) -> Any:
        f = jax.value_and_grad(lambda x: loss(net.f(frozen, x))) if floats else lambda x: loss(net.f(frozen, x))
        return f(x)

    def with_lora(frozen: Any, lora: Any, x: Any) -> Any:
        return jax.value_and_grad(lambda t, x: loss(apply(frozen, t, x)), (0, 1) if floats else 0)(lora, x)

    def formed(frozen: Any, lora: Any, x: Any) -> Any:
        return jax.value_and_grad(lambda t: loss(net.f(lojax.merge(frozen, t), x)))(lora)

    return least, *(functools.partial(weight_sized, f, least, frozen, lora, net.x) for f in (alone, with_lora, formed))


@nets
def test_no_weight_sized_array_that_the_frozen_net_lacks(net: Net) -> None:
    _, frozen, with_lora, formed = gradients(net)
    # A cast of the weight is computed anew for the backward pass, instead of saved (see `rewrite.frozen_chains`).
    assert with_lora() - frozen() == Counter({"convert_element_type": 1} if net is NETS["dense cast"] else {})
    assert formed() - frozen() != Counter(), "forming the weight must show, or this test sees nothing"


# --- the choice ---

F32, BF16, F64 = jnp.float32, jnp.bfloat16, jnp.float64
HIGHEST = lax.Precision.HIGHEST


@pytest.mark.parametrize(
    ("dtypes", "precision", "platform", "expected"),
    [
        ((F32, F32, F32), None, "cpu", True),
        ((F32, F32, F32), None, "gpu", False),
        ((F32, F32, F32), None, "tpu", False),
        ((F32, F32, F32), HIGHEST, "tpu", True),
        ((F32, F32, F32), (HIGHEST, HIGHEST), "gpu", True),
        ((F32, F32, F32), (HIGHEST, lax.Precision.DEFAULT), "gpu", False),
        ((F64, F64, F64), None, "gpu", True),
        ((BF16, BF16, F32), None, "cpu", False),
        ((BF16, F32, F32), HIGHEST, "cpu", False),
        ((F32, BF16, F32), HIGHEST, "cpu", False),
        ((F32, jnp.int8, F32), HIGHEST, "cpu", False),
    ],
)
def test_the_fused_way_is_exact_only_in_float32(dtypes: Any, precision: Any, platform: str, expected: bool) -> None:
    assert exact(dtypes, precision, platform) is expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ((4096, 2048, 2048, 16), "fused"),
        ((2560, 2048, 2048, 16), "fused"),  # 1.25 x 2mn / (m + n), to the token
        ((2559, 2048, 2048, 16), "factored"),
        ((2048, 1024, 4096, 128), "fused"),
        ((2048, 4096, 1024, 1), "fused"),
        ((2047, 1024, 4096, 128), "factored"),
        ((1, 4096, 4096, 16), "factored"),
    ],
)
def test_auto_is_fused_above_a_number_of_tokens(layer: Any, expected: str) -> None:
    kinds: Any = {"dtypes": (F32, F32, F32), "precision": HIGHEST}
    assert choose_strategy("auto", dense_layer(*layer), **kinds) == expected
    assert choose_strategy("factored", dense_layer(*layer), **kinds) == "factored"
    assert choose_strategy("fused", dense_layer(*layer), dtypes=(BF16, BF16, BF16), precision=None) == "fused"
    low: Any = {"dtypes": (BF16, BF16, BF16), "precision": None}
    assert choose_strategy("auto", dense_layer(*layer), **low) == "factored"


def test_the_sizes_are_those_of_the_product_whatever_its_axes() -> None:
    """``[B, T, D]`` with a ``[D, H, K]`` kernel is BT tokens, D in, HK out; the record says what each use took."""
    sizes = {"rows": 4, "tokens": 32, "d": 64, "h": 4, "k": 16}
    net = lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["kernel"])
    params = {"kernel": shape(sizes["d"], sizes["h"], sizes["k"])}
    for tokens, expected in ((32, "fused"), (8, "factored")):
        x = shape(sizes["rows"], tokens, sizes["d"])
        model = lojax.wrap(net, "kernel", rank=4)
        frozen, lora = jax.eval_shape(model.init, jax.random.key(0), params, x)
        (weight,) = model.report(frozen, lora, x).weights
        (use,) = weight.uses
        work = dense_layer(4 * tokens, 64, 64, 4)
        assert (weight.how, use.flops) == (expected, work.base)
        assert use.extra_flops == (work.materializing if expected == "fused" else work.low_rank)


def test_an_unknown_way_is_an_error_that_names_the_nearest() -> None:
    text = message(ValueError, lojax.wrap, dense, "kernel", execution="factorised")
    assert text == f"execution='factorised' is unknown; expected one of {list(EXECUTIONS)}. Did you mean 'factored'?"
    assert message(ValueError, lojax.transform, dense, execution="factorised") == text


def test_strict_and_materialize_contradict() -> None:
    text = message(ValueError, lojax.transform, dense, strict=True, execution="materialize")
    assert "strict=True forbids" in text


@pytest.mark.parametrize("net", [NETS["heads"], NETS["conv"]], ids=["heads", "conv"])
def test_weights_with_several_axes_are_not_transposed(net: Net) -> None:
    """A and B of a ``[D, H, K]`` kernel meet the activation as they lie: no array of their size is moved."""
    frozen, lora, apply = adapted(net.f, net.params, net.x, rank=2)

    def transposes(f: Callable[..., Any], *args: Any) -> int:
        return sum(
            eqn.primitive.name == "transpose" and len(eqn.invars[0].aval.shape) > 1
            for eqn in equations(jax.make_jaxpr(f)(*args))
        )

    alone = transposes(lambda frozen, x: loss(net.f(frozen, x)), frozen, net.x)
    assert transposes(lambda frozen, lora, x: loss(apply(frozen, lora, x)), frozen, lora, net.x) == alone
