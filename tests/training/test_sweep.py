"""Many runs at once: each trains as it would alone, in one compiled step, on one base."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lojax
from lojax.adapters.adapter import is_adapter
from tests.helpers import assert_same_bits, message

T, M, N, K = 24, 20, 28, 6
"""Tokens, width in, width hidden, width out."""
RUNS = [
    {"learning_rate": rate, "rank": rank, "alpha": alpha, "seed": seed}
    for (rate, rank), (alpha, seed) in itertools.product([(1e-2, 2), (3e-2, 5)], [(4, 0), (8, 1), (2, 2), (16, 3)])
]


pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")


def net(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["head"]["bias"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


PARAMS = {
    "up": {"kernel": normal(0, M, N), "bias": normal(1, N)},
    "down": {"kernel": normal(2, N, K)},
    "head": {"bias": normal(3, K)},
}
MODEL = lojax.wrap(net, "**/kernel")


def batches(count, runs=None):
    """``count`` batches ``(x, y)``, shared or with one entry for each run."""
    shape = (T,) if runs is None else (runs, T)
    return [(3 * normal((7, i), *shape, M), normal((8, i), *shape, K)) for i in range(count)]


def start(run, **settings):
    settings = {"rank": run.get("rank", 3), "alpha": run.get("alpha"), "train": "head/bias"} | settings
    return lojax.init(jax.random.key(run.get("seed", 0)), PARAMS, "**/kernel", **settings)


def loss(frozen, lora, x, y):
    return jnp.mean((MODEL.apply(frozen, lora, x) - y) ** 2)


def clipped_adamw(run):
    """Clipping at a norm that the gradients of each run exceed, so that a norm over all runs would show."""
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(run["learning_rate"], weight_decay=0.1))
    return lojax.optimizer(tx, b_ratio=run.get("b_ratio", 4.0))


def train_alone(run, data, *, start=start, loss=loss, optimizer=clipped_adamw):
    """The oracle: one run by itself, written by hand. Its losses and its adapter."""
    frozen, lora = start(run)
    tx = optimizer(run)

    @jax.jit
    def step(frozen, lora, state, *args):
        value, grads = jax.value_and_grad(loss, argnums=1)(frozen, lora, *args)
        updates, state = optax.with_extra_args_support(tx).update(grads, state, lora, value=value)
        return optax.apply_updates(lora, updates), state, value

    state, losses = tx.init(lora), []
    for args in data:
        lora, state, value = step(frozen, lora, state, *args)
        losses.append(value)
    return np.array(losses), lora


def train_at_once(runs, data, *, start=start, loss=loss, optimizer=clipped_adamw, **settings):
    sweep = lojax.sweep(runs, loss, optimizer, **settings)
    frozen, state = sweep.init(start)
    losses = []
    for args in data:
        state, values = sweep.step(frozen, state, *args)
        losses.append(values)
    return np.array(losses), state


def assert_close(left, right, atol=1e-5):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-4), left, right)


# --- each run trains as it would alone ---


@pytest.mark.parametrize(
    ("variant", "shared"),
    [
        ("lora", True),
        ("dora", False),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("lora", False), ("dora", True))),
        *(pytest.param("lora-fa", shared, marks=pytest.mark.slow) for shared in (True, False)),
    ],
)
def test_eight_runs_train_as_eight_separate_runs(variant, shared):
    own_start = functools.partial(start, variant=variant)
    data = batches(12, None if shared else 8)
    losses, state = train_at_once(RUNS, data, start=own_start, in_axes=None if shared else 0)
    assert losses.shape == (12, 8)
    for i, run in enumerate(RUNS):
        own = data if shared else [(x[i], y[i]) for x, y in data]
        expected, lora = train_alone(run, own, start=own_start)
        np.testing.assert_allclose(losses[:, i], expected, atol=1e-5)
        assert_close(state.bank[i], lora)
        assert expected[-1] < 0.95 * expected[0] or not shared  # it did train
    assert len({round(float(x), 5) for x in losses[-1]}) == 8


def test_any_number_may_differ():
    runs = [
        {"learning_rate": 0.02, "decay": decay, "b_ratio": ratio, "b2": b2, "name": "adam"}
        for decay, ratio, b2 in [(0, 1, 0.9), (0.5, 16.0, 0.99), (1, 3, 0.999)]
    ]

    def optimizer(run):
        tx = optax.inject_hyperparams(optax.adamw)(run["learning_rate"], b2=run["b2"], weight_decay=run["decay"])
        assert run["learning_rate"] == 0.02 and run["name"] == "adam"  # the same in all runs: as they are
        return lojax.optimizer(tx, b_ratio=run["b_ratio"])

    data = batches(6)
    losses, state = train_at_once(runs, data, optimizer=optimizer)
    assert sorted(state.values) == ["b2", "b_ratio", "decay"]
    for i, run in enumerate(runs):
        np.testing.assert_allclose(losses[:, i], train_alone(run, data, optimizer=optimizer)[0], atol=1e-5)


def plateau(run):
    return optax.chain(optax.adam(run["learning_rate"]), optax.contrib.reduce_on_plateau(patience=1, rtol=0.2))


def accumulated(run):
    return optax.MultiSteps(optax.adam(run["learning_rate"]), 3)


@pytest.mark.parametrize("optimizer", [plateau, accumulated])
def test_plateaus_and_accumulation_are_those_of_each_run(optimizer):
    """Transformations of optax that read the loss, or that do something else in some steps."""
    runs = [{"learning_rate": rate, "seed": seed} for rate, seed in [(0.3, 0), (0.003, 1)]]
    data = batches(1) * 12
    losses, state = train_at_once(runs, data, optimizer=optimizer)
    for i, run in enumerate(runs):
        np.testing.assert_allclose(losses[:, i], train_alone(run, data, optimizer=optimizer)[0], atol=1e-5)
    if optimizer is plateau:
        scales = state.optimizer[1].scale
        assert scales[0] != scales[1]


def test_adapters_in_bfloat16_train_as_alone():
    own_start = functools.partial(start, dtype=jnp.bfloat16, train=())
    losses, state = train_at_once(RUNS[:2], batches(3), start=own_start, optimizer=_sgd)
    for i, run in enumerate(RUNS[:2]):
        expected, lora = train_alone(run, batches(3), start=own_start, optimizer=_sgd)
        assert state.bank[i]["up"]["kernel"].a.dtype == jnp.bfloat16
        np.testing.assert_allclose(losses[:, i], expected, atol=1e-5)
        assert_close(state.bank[i], lora, atol=1e-2)


def test_a_rate_takes_the_dtype_of_what_it_meets():
    """As a Python number does: a float32 one would be an error here, and compute in float32 elsewhere."""
    own_start = functools.partial(start, dtype=jnp.bfloat16, train=())
    with jax.numpy_dtype_promotion("strict"):
        losses, _ = train_at_once(RUNS[3:5], batches(2), start=own_start, optimizer=_sgd)
    assert np.isfinite(losses).all()


def _sgd(run):
    return optax.sgd(run["learning_rate"])


def test_keys_metrics_and_dropout_of_each_run():
    model = lojax.wrap(net, "**/kernel", dropout=0.5)

    def loss(frozen, lora, x, y, key):
        outputs = model.apply(frozen, lora, x, dropout_key=key)
        return jnp.mean((outputs - y) ** 2), {"largest": jnp.max(outputs)}

    own_start = functools.partial(start, dropout=0.5)
    runs = [{"seed": seed} for seed in range(3)]
    sweep = lojax.sweep(runs, loss, optax.adam(0.03), in_axes=(None, None, 0), has_aux=True)
    frozen, state = sweep.init(own_start)
    keys = jax.random.split(jax.random.key(5), 6).reshape(2, 3)
    (x, y), found = batches(1)[0], []
    for own in keys:
        state, (losses, aux) = sweep.step(frozen, state, x, y, own)
        found.append((losses, aux["largest"]))
    for i, run in enumerate(runs):
        data = [(x, y, own[i]) for own in keys]
        alone = train_alone(
            run, data, start=own_start, loss=lambda *args: loss(*args)[0], optimizer=lambda run: optax.adam(0.03)
        )
        np.testing.assert_allclose([losses[i] for losses, _ in found], alone[0], atol=1e-5)
    outputs = model.apply(*own_start(runs[1]), x, dropout_key=keys[0, 1])
    np.testing.assert_allclose(found[0][1][1], jnp.max(outputs), rtol=1e-5)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantized_base_is_shared(base):
    own_start = functools.partial(start, base=base)  # quantizes anew for each run, to the same numbers
    losses, _ = train_at_once(RUNS[:2], batches(3), start=own_start)
    for i, run in enumerate(RUNS[:2]):
        np.testing.assert_allclose(losses[:, i], train_alone(run, batches(3), start=own_start)[0], atol=1e-5)


def test_targets_may_differ():
    """A weight that one run leaves alone stays as it is, whatever the optimizer does with zeros."""

    def own_start(run):
        return lojax.init(jax.random.key(0), PARAMS, run["targets"], rank=run["rank"], train="head/bias")

    runs = [{"rank": 2, "targets": "**/kernel"}, {"rank": 4, "targets": "up/kernel"}]
    noisy = lambda run: optax.chain(optax.adam(0.02), optax.add_noise(0.1, 0.5, jax.random.key(3)))
    _, state = train_at_once(runs, batches(3), start=own_start, optimizer=noisy)
    assert state.bank[1]["down"]["kernel"] is None
    up, down = state.bank.lora["up"]["kernel"], state.bank.lora["down"]["kernel"]
    for x in (down.a[1], down.b[1], up.a[0][:, 2:], up.b[0][2:]):
        assert not x.any()
    for x in (down.a[0][:, :2], down.b[0][:2], up.a[1], up.b[1]):
        assert x.all()


def test_a_start_that_moves_the_base_in_the_same_way():
    own_start = functools.partial(start, init="pissa", rank=2)
    runs = [{"learning_rate": rate} for rate in (0.01, 0.03)]
    losses, _ = train_at_once(runs, batches(3), start=own_start)
    for i, run in enumerate(runs):
        np.testing.assert_allclose(losses[:, i], train_alone(run, batches(3), start=own_start)[0], atol=1e-5)


# --- one program ---


def test_one_compilation_for_eight_runs():
    events, traces = [], []
    listen = lambda event, _, **__: events.append(event)
    injected = lambda run: optax.inject_hyperparams(optax.adamw)(run["learning_rate"])
    sweep = lojax.sweep(RUNS, lambda *args: traces.append(1) or loss(*args), injected)
    frozen, state = sweep.init(start)
    data = batches(4)
    active = jnp.arange(8) != 2
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for args in data:
            state, _ = sweep.step(frozen, state, *args)
        sweep.step(frozen, state._replace(active=active), *data[0])  # a run that stops is data
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum("backend_compile" in event for event in events) == len(traces) == 1


def test_rates_are_data():
    """Population-based training: a run takes another rate."""
    runs = [{**RUNS[0], "learning_rate": 0.0}, {**RUNS[1], "learning_rate": 0.25}]
    sweep = lojax.sweep(runs, loss, lambda run: optax.sgd(run["learning_rate"]))
    frozen, state = sweep.init(start)
    swapped = state._replace(values={**state.values, "learning_rate": jnp.array([0.25, 0.0])})
    (x, y) = batches(1)[0]
    first, _ = sweep.step(frozen, state, x, y)
    second, _ = sweep.step(frozen, swapped, x, y)
    for moved, i in ((first, 1), (second, 0)):
        assert_same_bits(moved.bank[1 - i], state.bank[1 - i])
        assert not np.array_equal(moved.bank[i]["down"]["kernel"].b, state.bank[i]["down"]["kernel"].b)


def wide_net(width, **settings):
    """A net of two layers of one width, and its loss."""
    model = lojax.wrap(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], "*", rank=4, **settings)
    return model, lambda frozen, lora, x: jnp.mean(model.apply(frozen, lora, x) ** 2)


def compiled_step(width, tokens, *, shared=False, **settings):
    """The compiled step of eight runs, and its arguments."""
    model, loss = wide_net(width, **settings)
    runs = [{"learning_rate": 1e-3 * (i + 1), "seed": i} for i in range(8)]
    sweep = lojax.sweep(runs, loss, lambda run: optax.sgd(run["learning_rate"]), in_axes=None if shared else 0)
    params = {name: normal(i, width, width) for i, name in enumerate(("up", "down"))}
    frozen, state = sweep.init(lambda run: model.init(jax.random.key(run["seed"]), params))
    args = frozen, state, jnp.zeros((tokens, width) if shared else (8, tokens, width))
    return sweep.step.lower(*args).compile(), args


@pytest.mark.optimized
@pytest.mark.parametrize("shared", [True, False], ids=["shared data", "own data"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_operations_and_bytes_of_eight_runs(variant, shared):
    """The frozen products once for the rows of all runs, the products with factors, and no weight for a run."""
    m, tokens, r = 512, 384, 4
    rows = 8 * tokens
    # 4Tmn + 6Tr(m + n) for each layer. The first needs no gradient of x: neither dy W0^T nor (dy b^T) a^T.
    floor = 2 * (4 * rows * m * m + 6 * rows * r * (m + m)) - 2 * rows * m * m - 2 * rows * r * m
    if shared:
        floor -= 7 * 2 * tokens * m * m  # x W0 of the first layer, once for all runs
    if variant == "dora":
        # W0^T a for the norm of each run; a gain for each result and for each cotangent, and the gradient of the gains
        floor += 2 * 8 * 2 * m * m * r + 2 * 4 * rows * m
    compiled, args = compiled_step(m, tokens, shared=shared, variant=variant)
    assert 0.98 * floor <= compiled.cost_analysis()["flops"] <= 1.01 * floor
    leaves = jax.tree.leaves(args)
    stored = compiled.memory_analysis().argument_size_in_bytes
    assert stored <= sum(leaf.nbytes for leaf in leaves) + 64 * len(leaves)  # W0 once, and the rounding of each array
    assert f"f32[8,{m},{m}]" not in compiled.as_text()


@pytest.mark.optimized
def test_auto_leaves_out_fused_products():
    """Alone, ``execution="auto"`` fuses products of so many tokens; here that would form a weight for each run."""
    width, tokens = 32, 1024
    model, _ = wide_net(width)
    shapes = {name: jax.ShapeDtypeStruct((width, width), jnp.float32) for name in ("up", "down")}
    frozen, lora = jax.eval_shape(model.init, jax.random.key(0), shapes)
    assert "fused" in str(model.report(frozen, lora, jax.ShapeDtypeStruct((tokens, width), jnp.float32)))
    assert f"[8,{width},{width}]" not in compiled_step(width, tokens)[0].as_text()
    assert f"[8,{width},{width}]" in compiled_step(width, tokens, execution="fused")[0].as_text()


def test_runs_sharded_over_devices():
    mesh = jax.make_mesh((8,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    data = batches(3)
    expected, _ = train_at_once(RUNS, data)
    sweep = lojax.sweep(RUNS, loss, clipped_adamw)
    frozen, state = sweep.init(start)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("runs"))
    state = jax.device_put(state, sharding)
    frozen, data = jax.device_put((frozen, data), jax.sharding.NamedSharding(mesh, jax.P()))
    for i, args in enumerate(data):
        state, losses = sweep.step(frozen, state, *args)
        np.testing.assert_allclose(losses, expected[i], atol=1e-5)
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(state.bank))


# --- stopping ---


def test_a_stopped_run_keeps_every_bit_and_the_others_go_on():
    sweep = lojax.sweep(RUNS, loss, clipped_adamw)
    frozen, state = sweep.init(start)
    data = batches(6)
    for args in data[:2]:
        state, _ = sweep.step(frozen, state, *args)
    before = state = state._replace(active=state.active.at[jnp.array([1, 6])].set(False))
    for args in data[2:]:
        state, losses = sweep.step(frozen, state, *args)
    for i, run in enumerate(RUNS):
        entry = lambda state, i=i: jax.tree.map(lambda x: x[i], (state.bank.lora, state.optimizer))
        if i in (1, 6):
            assert_same_bits(entry(state), entry(before))
            np.testing.assert_allclose(losses[i], loss(frozen, state.bank[i], *data[-1]), atol=1e-5)
        else:
            np.testing.assert_allclose(losses[i], train_alone(run, data)[0][-1], atol=1e-5)


def test_a_run_that_diverges_leaves_the_others_alone():
    runs = [{"learning_rate": rate} for rate in (0.01, 1e30, 0.02)]
    optimizer = lambda run: optax.sgd(run["learning_rate"])
    losses, state = train_at_once(runs, batches(4), optimizer=optimizer)
    assert not np.isfinite(losses[-1, 1]) and not np.isfinite(state.bank[1]["up"]["kernel"].a).all()
    for i in (0, 2):
        expected, lora = train_alone(runs[i], batches(4), optimizer=optimizer)
        np.testing.assert_allclose(losses[:, i], expected, atol=1e-5)
        assert_close(state.bank[i], lora)
    sweep = lojax.sweep(runs, loss, optimizer)
    assert sweep.best(losses[-1], maximize=False) in (0, 2)


# --- evaluation and what a person reads ---


def test_map_evaluates_every_run():
    _, state = train_at_once(RUNS, batches(2))
    sweep = lojax.sweep(RUNS, loss, clipped_adamw)
    frozen, _ = sweep.init(start)
    x, _ = batches(3)[2]
    outputs = sweep.map(MODEL.apply)(frozen, state, x)
    assert outputs.shape == (8, T, K)
    many = jnp.stack([x * (i + 1) for i in range(8)])
    own = sweep.map(MODEL.apply, in_axes=0)(frozen, state, many)
    for i in range(8):
        np.testing.assert_allclose(outputs[i], MODEL.apply(frozen, state.bank[i], x), atol=1e-5)
        np.testing.assert_allclose(own[i], MODEL.apply(frozen, state.bank[i], many[i]), atol=1e-5)


def test_an_adapter_of_a_sweep_is_saved_and_merged_like_any_other(tmp_path):
    _, state = train_at_once(RUNS, batches(2))
    frozen, _ = start(RUNS[0])
    x, _ = batches(1)[0]
    lojax.save(tmp_path / "best", state.bank[5], frozen=frozen)
    restored = lojax.restore(tmp_path / "best", frozen=frozen)
    assert_same_bits(restored, state.bank[5])
    merged = net(MODEL.merge(frozen, restored), x)
    np.testing.assert_allclose(merged, MODEL.apply(frozen, state.bank[5], x), atol=1e-5)


def sweep_of(runs):
    return lojax.sweep(runs, loss, lambda run: optax.sgd(0.1))


SEEDED = [{"learning_rate": rate, "rank": 4, "seed": seed} for rate in (1e-3, 1e-2) for seed in (0, 1, 2)]


def test_table_shows_means_and_deviations_over_seeds():
    scores = [0.5, 0.6, 0.7, 0.9, 0.9, 0.9]
    assert sweep_of(SEEDED).table(accuracy=scores, loss=[1, 1, 1, 1, 1, float("nan")]).splitlines() == [
        "learning_rate  rank  runs  accuracy   loss",
        "-----------------------------------------------",
        "        0.001     4     3  0.6 ± 0.1  1 ± 0",
        "         0.01     4     3  0.9 ± 0    nan ± nan",
    ]
    lines = sweep_of(SEEDED).table(over=None, accuracy=scores).splitlines()
    assert lines[0] == "learning_rate  rank  seed  accuracy" and len(lines) == 8
    assert len(sweep_of(SEEDED).table(over="learning_rate", accuracy=scores).splitlines()) == 2 + 3


def test_best_is_the_best_run_of_the_best_setting():
    sweep, scores = sweep_of(SEEDED), [0.1, 0.2, 0.99, 0.6, 0.7, 0.5]
    assert sweep.best(scores, maximize=True) == 4
    assert sweep.best(scores, maximize=True, over=None) == 2
    assert sweep.best(scores, maximize=False) == 0
    assert sweep.best([float("nan"), 1, 1, 0, 0, 0], maximize=True) in (3, 4, 5)


def test_plot_has_a_line_for_each_rank():
    runs = [
        {"learning_rate": rate, "rank": rank, "alpha": 8, "seed": seed}
        for rate in (1e-3, 1e-2) for rank in (2, 4) for seed in (0, 1)
    ]  # fmt: skip
    axes = sweep_of(runs).plot(np.arange(8.0), label="accuracy").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rank 2", "rank 4"]
    lines = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert lines == [[[1e-3, 0.5], [1e-2, 4.5]], [[1e-3, 2.5], [1e-2, 6.5]]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.001", "0.01"]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "learning rate", "accuracy")


# --- bad input ---


def test_bad_runs():
    tx = optax.sgd(0.1)
    assert "expected a list of settings" in message(TypeError, lojax.sweep, {"learning_rate": 1}, loss, tx)
    assert "runs is empty" in message(ValueError, lojax.sweep, [], loss, tx)
    assert "runs[1]=0.1; expected settings by name" in message(TypeError, lojax.sweep, [{"a": 1}, 0.1], loss, tx)
    text = message(ValueError, lojax.sweep, [{"rank": 1}, {"rank": 2, "seed": 0}], loss, tx)
    assert "runs[1] and runs[0] differ in having ['seed']" in text
    assert "expected a function loss" in message(TypeError, lojax.sweep, RUNS, "loss", tx)
    assert "optimizer is a float" in message(TypeError, lojax.sweep, [{"seed": 0}], loss, 0.1)
    text = message(ValueError, lojax.sweep, RUNS, loss, tx)
    assert "different learning rates, and optimizer is one" in text and 'run["learning_rate"]' in text
    assert "has_aux=1; expected True or False" in message(TypeError, lojax.sweep, RUNS, loss, clipped_adamw, has_aux=1)


def test_bad_starts():
    def error(kind, start):
        return message(kind, lojax.sweep(RUNS[:2], loss, clipped_adamw).init, start)

    assert "start returned a dict for runs[0]; expected the pair" in error(TypeError, lambda run: start(run)[1])
    text = error(ValueError, functools.partial(start, init="pissa"))  # their alphas differ
    assert "start gave runs[1] other frozen values than runs[0]" in text and "PiSSA" in text
    assert "'dora'" in error(ValueError, lambda run: start(run, variant="dora" if run["seed"] else "lora"))
    text = error(ValueError, lambda run: start(run, dropout=run["seed"] / 10))
    assert "different rates of dropout, [0.0, 0.1]" in text and "a sweep for each" in text
    other = {**PARAMS, "up": {**PARAMS["up"], "bias": PARAMS["up"]["bias"] + 1}}
    params = iter([PARAMS, other])
    text = error(ValueError, lambda run: lojax.init(jax.random.key(0), next(params), "**/kernel"))
    assert text.startswith("up/bias: start gave runs[1] other frozen values than runs[0]")
    params = iter([PARAMS, {**PARAMS, "more": jnp.ones(2)}])
    text = error(ValueError, lambda run: lojax.init(jax.random.key(0), next(params), "**/kernel"))
    assert "another tree of frozen weights" in text


def test_bad_optimizers():
    runs = [{"schedule": "cosine", "rate": 1}, {"schedule": "linear", "rate": 2}]

    def error(kind, optimizer):
        return message(kind, lojax.sweep(runs, loss, optimizer).init, start)

    text = error(ValueError, lambda run: optax.sgd(0.1) if run["schedule"] == "cosine" else None)
    assert "reads the setting 'schedule', which differs between the runs and is no number" in text
    assert "'schedule'" in error(ValueError, lambda run: optax.sgd(0.1) if run.get("schedule") else None)
    text = error(KeyError, lambda run: optax.sgd(run["rat"]))
    assert "optimizer reads 'rat'" in text and "Did you mean 'rate'?" in text
    assert "optimizer(run) is a float" in error(TypeError, lambda run: 0.1)


def test_bad_steps():
    sweep = lojax.sweep(RUNS[:2], loss, clipped_adamw, in_axes=(None, 0))
    frozen, state = sweep.init(start)
    (x, y) = batches(1)[0]
    assert "is for 2 arguments after lora, and there are 1" in message(ValueError, sweep.step, frozen, state, x)

    def step(bad, **settings):
        return lojax.sweep(RUNS[:2], bad, clipped_adamw, **settings).step

    text = message(ValueError, step(lambda *args: jnp.ones(3) * loss(*args)), frozen, state, x, y)
    assert "loss returns float32[3] for one run; expected a scalar" in text
    text = message(TypeError, step(lambda *args: (loss(*args), 1.0)), frozen, state, x, y)
    assert "pass has_aux=True" in text
    text = message(TypeError, step(loss, has_aux=True), frozen, state, x, y)
    assert "does not return a pair" in text


def test_bad_scores():
    sweep = sweep_of(SEEDED)
    assert "accuracy has shape (2,); expected one number for each of the 6" in message(
        ValueError, sweep.table, accuracy=[1, 2]
    )
    text = message(ValueError, sweep.best, [1.0] * 6, maximize=True, over="sed")
    assert "no setting 'sed'" in text and "Did you mean 'seed'?" in text
    assert "every run diverged" in message(ValueError, sweep.best, [float("nan")] * 6, maximize=True)
    assert "maximize='yes'" in message(TypeError, sweep.best, [1.0] * 6, maximize="yes")
    assert "no setting 'alpha'" in message(ValueError, sweep.plot, [1.0] * 6, x="alpha")


def test_every_adapter_of_the_bank_is_an_adapter():
    _, state = train_at_once(RUNS[:2], batches(1))
    assert len(state.bank) == 2
    assert all(is_adapter(tree["up"]["kernel"]) for tree in state.bank)
    assert [tree["up"]["kernel"].scale for tree in state.bank] == [2.0, 4.0]
