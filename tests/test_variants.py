"""One contract for the whole LoRA family: every variant and start, on every kind of weight, in every dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, PartitionSpec

import lojax
from lojax import Rule
from lojax.sharding.shardings import shardings


def eva(model, frozen, lora, x):
    return frozen, lojax.eva(model.apply, frozen, lora, [x])


def lora_ga(model, frozen, lora, x):
    return lojax.lora_ga(lambda f, t, x: jnp.sum(jnp.sin(model.apply(f, t, x))), frozen, lora, [x])


# Adding a variant or a start is adding a row.
FAMILY = {
    "lora": {},
    "rslora": {"scaling": "rslora"},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "fast pissa": {"init": "pissa_niter_4"},
    "olora": {"init": "olora"},
    "milora": {"init": "milora"},
    "loftq": {"init": "loftq", "base": "nf4"},
    "dora": {"variant": "dora"},
    "dora from pissa": {"variant": "dora", "init": "pissa"},
    "lora-fa": {"variant": "lora-fa"},
    "eva": {"start": eva},
    "lora-fa from eva": {"start": eva, "variant": "lora-fa"},
    "lora-ga": {"start": lora_ga},
    "dora from lora-ga": {"start": lora_ga, "variant": "dora"},
}
CHANGES_WEIGHT = {"pissa", "fast pissa", "olora", "milora", "loftq", "dora from pissa", "lora-ga", "dora from lora-ga"}


def layers(params, x):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(layer, x, params["w"])[0]


def conv(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=numbers)


# The program, the shape of its weight, and the shape of its input (None: tokens).
WEIGHTS = {
    "dense": (lambda p, x: x @ p["w"], (6, 8), (3, 6)),
    "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), (6, 2, 4), (3, 6)),
    "embedding": (lambda p, x: p["w"][x], (11, 6), None),
    "tied": (lambda p, x: p["w"][x] @ p["w"].T, (11, 6), None),
    "conv": (conv, (3, 3, 4, 6), (2, 5, 5, 4)),
    "stack": (layers, (3, 6, 6), (2, 6)),
}
TOLERANCE = {"float32": 3e-5, "bfloat16": 0.06}


def given(weight, dtype):
    f, shape, inputs = WEIGHTS[weight]
    key = jax.random.key(7)
    w = jax.random.normal(key, shape, dtype) / 2
    x = jnp.array([[1, 0, 4], [9, 4, 3]]) if inputs is None else jax.random.normal(key, inputs, dtype)
    return f, {"w": w}, x


def moved(lora, size=0.1):
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [size * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


def assert_near(got, expected, dtype):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.max(np.abs(x - y)) <= TOLERANCE[dtype] * max(1.0, np.max(np.abs(y)))


def started(member, weight="stack", dtype="float32"):
    """The model, frozen and trained trees of a member, and the input."""
    f, params, x = given(weight, dtype)
    settings = {name: value for name, value in FAMILY[member].items() if name != "start"}
    model = lojax.wrap(f, "w", rank=2, alpha=3, strict=True, **settings)
    frozen, lora = model.init(jax.random.key(0), params, x)
    start = FAMILY[member].get("start", lambda _model, frozen, lora, _x: (frozen, lora))
    return model, *start(model, frozen, lora, x), x


def start_params(member, model, frozen, lora, params):
    """What a member starts at: the pretrained weights, or, quantized, what is nearer to them than rounding alone."""
    if FAMILY[member].get("base") is None:
        return params
    merged, rounded = model.merge(frozen, lora), lojax.quantize(params, FAMILY[member]["base"], "w")["w"].dense()
    error = [float(jnp.linalg.norm((w - params["w"]).astype(jnp.float32))) for w in (merged["w"], rounded)]
    assert error[0] < error[1]
    return merged


def rows(chosen):
    """Every member on every weight; those for which ``chosen(member, weight)`` is false run in .ci/thorough alone."""
    return [
        pytest.param(member, weight, marks=() if chosen(member, weight) else pytest.mark.slow)
        for member in FAMILY
        for weight in WEIGHTS
        # The inputs of these two are tokens, of which no start from activations can be made.
        if not (FAMILY[member].get("start") is eva and weight in ("embedding", "tied"))
    ]


@pytest.mark.parametrize("weight", ["embedding", "tied"])
def test_a_look_up_has_no_activations_to_start_from(weight):
    with pytest.raises(ValueError, match="a look-up has none"):
        started("eva", weight)
    with pytest.raises(ValueError, match="a look-up has none"):
        started("lora-fa from eva", weight)


def members(chosen):
    """Every member; those for which ``chosen(member)`` is false run in .ci/thorough alone."""
    return [pytest.param(member, marks=() if chosen(member) else pytest.mark.slow) for member in FAMILY]


def follow(f, x):
    """What a member is compared by: its output, and the gradient of a loss of it."""

    def loss(lora, *frozen):
        y = f(lora, *frozen, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def computes(member):
    """Whether the products of a member are others than plain LoRA's, so that a low precision may treat it otherwise."""
    return "variant" in FAMILY[member] and "start" not in FAMILY[member] and "init" not in FAMILY[member]


@pytest.mark.parametrize(
    ("member", "weight"),
    rows(lambda member, weight: weight in ("dense", "stack") or member == "lora" or computes(member)),
)
def test_the_contract_of_a_variant(member, weight):
    """In float32: the start, the output and gradient of the merged weight, and that the adapter changes something."""
    f, params, x = given(weight, "float32")
    model, frozen, lora, x = started(member, weight)
    ours = follow(lambda lora, frozen, x: model.apply(frozen, lora, x), x)
    theirs = follow(lambda lora, frozen, x: f(model.merge(frozen, lora), x), x)

    params = start_params(member, model, frozen, lora, params)
    base = jax.jit(f)(params, x)
    (_, start), _ = ours(lora, frozen)
    starts_at_the_base(member, base, start, lambda: model.apply(frozen, lora, x), lambda: f(params, x))
    assert bool(jnp.array_equal(frozen["w"], params["w"])) != (member in CHANGES_WEIGHT)

    lora = moved(lora)
    ((_, y), gradient), ((_, expected), expected_gradient) = ours(lora, frozen), theirs(lora, frozen)
    assert_near(y, expected, "float32")
    assert float(jnp.max(jnp.abs(y - base))) > 0.01
    assert_near(gradient, expected_gradient, "float32")


@pytest.mark.parametrize(
    ("member", "weight"),
    rows(lambda member, weight: member == "lora" or (weight in ("dense", "stack") and computes(member))),
)
def test_the_contract_of_a_variant_in_bfloat16(member, weight):
    """The start and the output of the merged weight. Starts see a weight as matrices, so one weight shows them all."""
    f, params, x = given(weight, "bfloat16")
    model, frozen, lora, x = started(member, weight, "bfloat16")
    params = start_params(member, model, frozen, lora, params)
    run, base = jax.jit(model.apply), jax.jit(f)(params, x)
    start = run(frozen, lora, x)
    starts_at_the_base(member, base, start, lambda: model.apply(frozen, lora, x), lambda: f(params, x))
    assert bool(jnp.array_equal(frozen["w"], params["w"])) != (member in CHANGES_WEIGHT)

    lora = moved(lora)
    y = run(frozen, lora, x)
    assert_near(y, jax.jit(f)(model.merge(frozen, lora), x), "bfloat16")
    assert float(jnp.max(jnp.abs(y - base))) > 0.01


def starts_at_the_base(member, base, start, adapted, plain):
    """To the bit, where the start is B = 0. Where the compiler fuses the two programs apart: operation by operation."""
    assert start.dtype == base.dtype
    assert_near(start, base, str(base.dtype))
    if member in CHANGES_WEIGHT | {"orthogonal"} or bool(jnp.array_equal(start, base)):
        return
    with jax.disable_jit():
        np.testing.assert_array_equal(np.asarray(adapted(), np.float32), np.asarray(plain(), np.float32))


@pytest.mark.parametrize(
    ("member", "weight"), rows(lambda m, weight: weight == "stack" and (computes(m) or m in ("lora", "pissa", "eva")))
)
def test_a_variant_through_a_checkpoint(member, weight, tmp_path):
    """A checkpoint sees the fields of an adapter, which are the member's, and its axes, which are the weight's."""
    _, frozen, lora, _ = started(member, weight)
    lora = moved(lora)
    lojax.save(tmp_path / "adapter", lora, frozen=frozen)
    found = lojax.restore(tmp_path / "adapter", frozen=frozen)
    assert jax.tree.structure(found) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, found, lora)
    assert lojax.summary(frozen, found).trainable == lora["w"].parameters


@pytest.mark.parametrize("member", members(lambda member: member in ("lora", "pissa", "eva") or computes(member)))
def test_the_family_under_vmap_over_adapters(member):
    model, frozen, lora, x = started(member)
    several = [moved(lora, size) for size in (0.1, 0.2, 0.3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    together = jax.vmap(model.apply, (None, 0, None))(frozen, stacked, x)
    for y, one in zip(together, several, strict=True):
        assert_near(y, model.apply(frozen, one, x), "float32")


@pytest.mark.parametrize("member", members(lambda member: member in ("lora", "pissa", "eva") or computes(member)))
def test_the_family_on_a_mesh(member):
    """Adapters laid out by `shardings` give the gradient that they give on one device."""
    model, frozen, lora, x = started(member)
    lora = moved(lora)

    def gradient(frozen, lora, x):
        return jax.grad(lambda lora: jnp.sum(jnp.sin(model.apply(frozen, lora, x))))(lora)

    expected = jax.jit(gradient)(frozen, lora, x)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    placed = shardings(frozen, lora, mesh=mesh, specs={"w": PartitionSpec(None, "fsdp", "tensor")})
    laid = jax.device_put(frozen, placed.frozen)
    found = shardings(laid, lora) if member != "loftq" else placed  # what it stores here has no axes to read them from
    assert found.lora["w"].b.spec == PartitionSpec(None, None, "tensor")
    assert_near(jax.jit(gradient)(laid, jax.device_put(lora, found.lora), x), expected, "float32")


def test_dora_is_the_formula_of_the_paper():
    f, params, x = given("dense", "float32")
    model = lojax.wrap(f, "w", rank=2, alpha=3, variant="dora")
    frozen, lora = model.init(jax.random.key(0), params, x)
    np.testing.assert_allclose(lora["w"].magnitude, np.linalg.norm(params["w"], axis=0), rtol=1e-6)
    lora = moved(lora)
    w0, a, b, m = (np.asarray(v, np.float64) for v in (params["w"], lora["w"].a, lora["w"].b, lora["w"].magnitude))
    direction = w0 + 1.5 * a @ b
    expected = np.asarray(x, np.float64) @ (m * direction / np.linalg.norm(direction, axis=0))
    np.testing.assert_allclose(model.apply(frozen, lora, x), expected, rtol=2e-5, atol=1e-6)


def test_dora_in_bfloat16_starts_at_the_base_all_the_same():
    w, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(64, 32), (8, 64)]))
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=4, variant="dora", dtype=jnp.bfloat16)
    frozen, lora = model.init(jax.random.key(0), {"w": w}, x)
    assert lora["w"].a.dtype == jnp.bfloat16 and lora["w"].magnitude.dtype == jnp.float32
    np.testing.assert_allclose(model.apply(frozen, lora, x), x @ w, rtol=1e-5, atol=1e-5)


def test_doras_norm_is_detached():
    f, params, x = given("dense", "float32")
    model = lojax.wrap(f, "w", rank=2, variant="dora")
    frozen, lora = model.init(jax.random.key(0), params, x)
    lora = moved(lora)
    adapter = lora["w"]
    gain = adapter.magnitude / jnp.linalg.norm(params["w"] + adapter.a @ adapter.b, axis=0)

    def constant(a):
        return jnp.sum(x @ ((params["w"] + a @ adapter.b) * gain))

    got = jax.grad(lambda t: jnp.sum(model.apply(frozen, t, x)))(lora)["w"].a
    np.testing.assert_allclose(got, jax.grad(constant)(adapter.a), rtol=1e-5, atol=1e-6)


@pytest.mark.optimized
def test_dora_forms_no_weight():
    params = {"w": jax.ShapeDtypeStruct((512, 768), jnp.float32)}
    model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=4, variant="dora", execution="factored")
    x = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    frozen, lora = jax.eval_shape(model.init, jax.random.key(0), params, x)
    step = jax.jit(jax.grad(lambda t, f, x: jnp.sum(model.apply(f, t, x) ** 2)))
    temporary = step.lower(lora, frozen, x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 512 * 768 * 4 / 2


def test_pissa_is_the_truncated_svd():
    _, params, _ = given("dense", "float32")
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, alpha=3, init="pissa")
    u, s, vt = np.linalg.svd(np.asarray(params["w"]))
    product = lora["w"].scale * lora["w"].a @ lora["w"].b
    np.testing.assert_allclose(product, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    np.testing.assert_allclose(np.linalg.svd(np.asarray(frozen["w"]))[1][:4], s[2:6], atol=1e-5)
    _, fast = lojax.init(jax.random.key(0), params, "w", rank=2, alpha=3, init="pissa_niter_8")
    np.testing.assert_allclose(fast["w"].scale * fast["w"].a @ fast["w"].b, product, atol=1e-4)
    _, minor = lojax.init(jax.random.key(0), params, "w", rank=2, init="milora")
    np.testing.assert_allclose(minor["w"].a @ minor["w"].b, (u[:, 4:6] * s[4:6]) @ vt[4:6], atol=1e-5)


def test_a_changed_base_can_be_left_behind():
    f, params, x = given("dense", "float32")
    model = lojax.wrap(f, "w", rank=2, init="pissa")
    frozen, start = model.init(jax.random.key(0), params, x)
    trained = moved(start)
    plain = lojax.subtract(trained, start)
    assert plain["w"].rank == 4
    np.testing.assert_allclose(model.apply(params, plain, x), model.apply(frozen, trained, x), rtol=1e-5, atol=1e-5)


def test_lora_fa_keeps_a_and_does_not_keep_the_input():
    def residuals(variant):
        model = lojax.wrap(lambda p, x: x @ p["w"], "w", rank=2, variant=variant)
        frozen, lora = model.init(jax.random.key(0), {"w": jnp.ones((64, 32))}, jnp.ones((100, 64)))
        _, back = jax.vjp(lambda t: model.apply(frozen, t, jnp.ones((100, 64))), lora)
        return {x.shape for x in jax.tree.leaves(back)}, back, lora

    kept, back, lora = residuals("lora-fa")
    assert (100, 64) not in kept and (100, 2) in kept
    assert (100, 64) in residuals("lora")[0]
    gradient = back(jnp.ones((100, 32)))[0]
    assert not gradient["w"].a.any()
    tx = lojax.optimizer(optax.adamw(0.1, weight_decay=0.1))
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, state = tx.update(gradient, tx.init(lora), lora)
    after = optax.apply_updates(lora, updates)
    np.testing.assert_array_equal(after["w"].a, lora["w"].a)
    assert (64, 2) not in {x.shape for x in jax.tree.leaves(state)}


def test_a_rank_for_each_layer_of_a_stack():
    f, params, x = given("stack", "float32")
    model = lojax.wrap(f, Rule("w", rank=[2, 0, 3], alpha=6), strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    adapter = lora["w"]
    assert adapter.ranks == (2, 0, 3) and adapter.scale == (3.0, 1.0, 2.0)
    assert adapter.parameters == 12 * 5
    tx = lojax.optimizer(optax.sgd(0.05))
    state = tx.init(lora)
    for _ in range(3):
        grads = jax.grad(lambda t: jnp.sum(jnp.square(model.apply(frozen, t, x) - 1.0)))(lora)
        updates, state = tx.update(grads, state, lora)
        lora = optax.apply_updates(lora, updates)
    merged = np.asarray(model.merge(frozen, lora)["w"] - params["w"])
    assert [np.linalg.matrix_rank(layer, tol=1e-5) for layer in merged] == [2, 0, 3]
    for i, scale in ((0, 3.0), (2, 2.0)):
        rank = adapter.ranks[i]
        expected = scale * np.asarray(lora["w"].a)[i, :, :rank] @ np.asarray(lora["w"].b)[i, :rank]
        np.testing.assert_allclose(merged[i], expected, atol=1e-5)


def test_layers_are_chosen_by_number():
    params = {f"layer_{i}": {"w": jnp.ones((4, 4))} for i in range(4)}
    _, lora = lojax.init(jax.random.key(0), params, Rule("**/w", layers=[1, 3], rank=2))
    assert [name for name in params if lora[name]["w"] is not None] == ["layer_1", "layer_3"]
    f, stacked, x = given("stack", "float32")
    _, lora = lojax.wrap(f, Rule("w", layers=[2], rank=2)).init(jax.random.key(0), stacked, x)
    assert lora["w"].ranks == (0, 0, 2)
    with pytest.raises(ValueError, match="none of its weights is in layers"):
        lojax.init(jax.random.key(0), params, Rule("**/w", layers=[7], rank=2))
    with pytest.raises(ValueError, match="has no layer number and its stack has no entries"):
        lojax.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, Rule("w", layers=[1], rank=2))


@pytest.mark.parametrize("weight", ["embedding", "tied"])
def test_chosen_token_rows_train_and_no_others(weight):
    f, params, x = given(weight, "float32")
    model = lojax.wrap(f, (), train=Rule("w", train="tokens", tokens=[4, 9]), strict=True)
    frozen, lora = model.init(jax.random.key(0), params, x)
    np.testing.assert_array_equal(model.apply(frozen, lora, x), f(params, x))
    whole = jax.grad(lambda w: jnp.sum(jnp.sin(f({"w": w}, x))))(params["w"])
    rows = jax.grad(lambda t: jnp.sum(jnp.sin(model.apply(frozen, t, x))))(lora)["w"].rows
    np.testing.assert_allclose(rows, whole[jnp.array([4, 9])], rtol=1e-5, atol=1e-6)
    lora = moved(lora)
    merged = np.asarray(model.merge(frozen, lora)["w"])
    others = [i for i in range(11) if i not in (4, 9)]
    np.testing.assert_array_equal(merged[others], np.asarray(params["w"])[others])
    np.testing.assert_allclose(model.apply(frozen, lora, x), f({"w": merged}, x), rtol=1e-5, atol=1e-5)
    state = lojax.optimizer(optax.adam(0.1)).init(lora)
    assert max(x.size for x in jax.tree.leaves(state)) == 12
    both = lojax.wrap(f, Rule("w", rank=2, tokens=[4]), strict=True)
    frozen, lora = both.init(jax.random.key(0), params, x)
    lora = moved(lora)
    np.testing.assert_allclose(both.apply(frozen, lora, x), f(both.merge(frozen, lora), x), rtol=1e-4, atol=1e-4)


def test_lora_plus_is_a_ratio_of_rates():
    _, params, _ = given("dense", "float32")
    _, lora = lojax.init(jax.random.key(0), params, "w", rank=2)
    grads = jax.tree.map(jnp.ones_like, lora)
    tx = lojax.optimizer(optax.sgd(0.5), b_ratio=16)
    updates, _ = tx.update(grads, tx.init(lora), lora)
    assert set(np.unique(updates["w"].a)) == {-0.5} and set(np.unique(updates["w"].b)) == {-8.0}
    for ratio in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected a finite number above 0"):
            lojax.optimizer(optax.sgd(0.5), b_ratio=ratio)


def test_groups_have_their_own_transformations():
    params = {"w": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    _, lora = lojax.init(jax.random.key(0), params, "w", rank=2, variant="dora", train="bias")
    tx = lojax.optimizer(optax.sgd(1.0), magnitude=optax.sgd(2.0), full=optax.sgd(3.0), b_ratio=4)
    tx = optax.MultiSteps(tx, 1).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)
    found = {name: float(x.ravel()[0]) for name, x in updates["w"].arrays.items()}
    assert found == {"a": -1.0, "b": -4.0, "magnitude": -2.0} and float(updates["bias"][0]) == -3.0


GROUPED = {
    "schedule": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9)),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_go_with_what_optax_has_and_their_state_through_orbax(name, accumulate, tmp_path):
    params = {"w": jnp.ones((4, 6)), "bias": jnp.ones(6), "kept": jnp.ones(3)}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, variant="dora", train="bias")
    tx = lojax.optimizer(GROUPED[name](), b_ratio=4, magnitude=optax.sgd(1e-3), full=optax.adam(1e-4))
    tx = optax.MultiSteps(tx, accumulate).gradient_transformation()
    tree = {"frozen": frozen, "lora": lora}

    @jax.jit
    def step(tree, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.tree.map(jnp.cos, tree), state, tree)
            return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    for _ in range(2):
        tree, state = step(tree, state)
    jax.tree.map(np.testing.assert_array_equal, tree["frozen"], frozen)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.any(x != y)), tree["lora"], lora)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"tree": tree, "opt": state})
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: {"tree": tree, "opt": state}))
    ours, theirs = step(tree, state), step(found["tree"], found["opt"])
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


BAD = [
    ({"init": "pisa"}, "Did you mean 'pissa'?"),
    ({"variant": "dorra"}, "Did you mean 'dora'?"),
    ({"init": "pissa", "rank": 9}, "rank=9 is above min"),
    ({"init": "orthogonal", "rank": 3}, "needs an even rank, got 3"),
    ({"dropout": 1.0}, "expected a rate in [0, 1)"),
    ({"tokens": [99]}, "names row 99, but the embedding has 6"),
    ({"tokens": [1, 1]}, "tokens names 1 more than once"),
    ({"tokens": [1], "variant": "dora"}, "does not go with tokens="),
    ({"rank": [2, 2]}, "2 ranks for a stack of 1"),
    ({"rank": [0, 0]}, "at least 1 for some entry"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_say_what_to_do(settings, message):
    params = {"w": jnp.ones((6, 8))}
    with pytest.raises(ValueError) as caught:
        lojax.init(jax.random.key(0), params, dataclasses.replace(Rule("w"), **settings), rank=2)
    assert message in str(caught.value)


def test_dora_refuses_a_weight_with_a_zero_column():
    params = {"w": jnp.ones((4, 3)).at[:, 1].set(0)}
    with pytest.raises(ValueError, match="1 of the 3 columns of the weight are zero"):
        lojax.init(jax.random.key(0), params, "w", rank=2, variant="dora")


def test_a_merged_dora_cannot_be_taken_out_again():
    params = {"w": jnp.ones((4, 3))}
    frozen, lora = lojax.init(jax.random.key(0), params, "w", rank=2, variant="dora")
    with pytest.raises(ValueError, match="base's own lengths are gone"):
        lojax.unmerge(lojax.merge(frozen, lora), lora)
