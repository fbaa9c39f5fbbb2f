"""Training: what moves, what does not move by a single bit, and what each form of the tree costs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import lojax
from lojax.training.optimizer import groups
from tests.helpers import assert_same_bits, products_of_shape

T, M, N, K, RANK = 24, 96, 160, 32, 4
"""Tokens, width in, width hidden, width out: all different, so that a shape says what it is."""


pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")


def net(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"]


@functools.cache
def setup():
    """The model, its two trees, inputs and outputs. Some frozen weights are -0.0."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    kernel = normal(M, N)
    kernel[0, :5] = -0.0
    params = {"up": {"kernel": kernel, "bias": normal(N)}, "down": {"kernel": normal(N, K)}}
    model = lojax.wrap(net, "**/kernel", rank=RANK, alpha=8, train="**/bias", strict=True)
    x = normal(T, M) * np.sqrt(T).astype(np.float32)
    return model, *model.init(jax.random.key(0), params, x), x, normal(T, K)


def loss(frozen, lora, x, y):
    model = setup()[0]
    return jnp.mean((model.apply(frozen, lora, x) - y) ** 2)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a trainer may hold the two trees: as one tree to differentiate, and the way back."""

    join: Callable[[Any, Any], Any]
    split: Callable[[Any, Any], tuple[Any, Any]]

    def step(self, tx):
        """A training step ``(tree, state, frozen, x, y) -> (tree, state, loss)``."""

        def step(tree, state, frozen, x, y):
            value, grads = jax.value_and_grad(lambda tree: loss(*self.split(frozen, tree), x, y))(tree)
            updates, state = tx.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state, value

        return step

    def run(self, tx, batches):
        """The tree, the state and the losses after a step on each of ``batches``."""
        _, frozen, lora, _, _ = setup()
        tree, step, values = self.join(frozen, lora), jax.jit(self.step(tx)), []
        state = tx.init(tree)
        for x, y in batches:
            tree, state, value = step(tree, state, frozen, x, y)
            values.append(float(value))
        return tree, state, values


FORMS = {
    "lora": Form(lambda frozen, lora: lora, lambda frozen, tree: (frozen, tree)),
    "dict": Form(
        lambda frozen, lora: {"frozen": frozen, "lora": lora}, lambda frozen, tree: (tree["frozen"], tree["lora"])
    ),
    "pair": Form(lambda frozen, lora: (frozen, lora), lambda frozen, tree: tree),
}
COMBINED = ["dict", "pair"]


# --- what is labelled how ---


def labels(tree):
    """``"train"`` or ``"frozen"`` for every leaf."""
    return jax.tree.map(lambda group: group if group == "frozen" else "train", groups(tree))


def test_labels_of_every_form():
    _, frozen, lora, _, _ = setup()
    train = jax.tree.map(lambda _: "train", lora)
    hold = jax.tree.map(lambda _: "frozen", frozen)
    assert labels(lora) == train
    assert labels({"frozen": frozen, "lora": lora}) == {"frozen": hold, "lora": train}
    assert labels((frozen, lora)) == (hold, train)


def test_a_pair_without_adapters_is_still_a_pair():
    frozen, lora = lojax.init(jax.random.key(0), {"w": jnp.ones((2, 2)), "head": jnp.ones(2)}, None, train="head")
    assert labels((frozen, lora)) == ({"w": "frozen", "head": None}, {"w": None, "head": "train"})


def test_a_lora_tree_that_is_a_tuple_of_two_is_no_pair():
    layers = ({"kernel": np.ones((4, 4)), "bias": np.ones(4)},) * 2
    for targets, train in (("**/kernel", ()), ("1/kernel", "0/bias"), ("0/kernel", ()), (None, "0/kernel")):
        lora = lojax.init(jax.random.key(0), layers, targets, train=train, rank=1)[1]
        assert set(jax.tree.leaves(labels(lora))) == {"train"}, (targets, train)


# --- steps ---


@functools.cache
def plain_steps():
    """Three steps of plain optax over ``lora``: what every form must do."""
    return FORMS["lora"].run(optax.adamw(1e-2), [setup()[3:]] * 3)


@pytest.mark.parametrize("form", FORMS)
def test_lora_moves_as_with_plain_optax_and_frozen_stays_bit_for_bit(form):
    _, frozen, lora, x, y = setup()
    tree, state, values = FORMS[form].run(lojax.optimizer(optax.adamw(1e-2)), [(x, y)] * 3)
    frozen_after, lora_after = FORMS[form].split(frozen, tree)
    assert_same_bits(frozen_after, frozen)
    assert np.signbit(frozen_after["up"]["kernel"][0, :5]).all()
    expected, _, expected_values = plain_steps()
    assert values[2] < values[1] < values[0]
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    for before, after, want in zip(*map(jax.tree.leaves, (lora, lora_after, expected)), strict=True):
        assert np.abs(np.asarray(before) - np.asarray(after)).max() > 1e-3
        np.testing.assert_allclose(after, want, rtol=1e-3, atol=1e-6)
    # Two moments for each array that trains, and a count: nothing for what is frozen.
    assert sorted(x.size for x in jax.tree.leaves(state)) == sorted([1, *2 * [x.size for x in jax.tree.leaves(lora)]])


@pytest.mark.parametrize("form", COMBINED)
def test_frozen_stays_bit_for_bit_without_jit_too(form):
    _, frozen, lora, _, _ = setup()
    tree, tx = FORMS[form].join(frozen, lora), lojax.optimizer(optax.sgd(0.1))
    updates, _ = tx.update(jax.tree.map(np.ones_like, tree), tx.init(tree), tree)
    frozen_after, lora_after = FORMS[form].split(None, optax.apply_updates(tree, updates))
    assert_same_bits(frozen_after, frozen)
    np.testing.assert_allclose(lora_after["up"]["bias"], lora["up"]["bias"] - np.float32(0.1), rtol=1e-6)


def test_weight_decay_and_clipping_do_not_see_what_is_frozen():
    _, frozen, lora, _, _ = setup()
    tree = {"frozen": frozen, "lora": lora}
    tx = lojax.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(1.0)))
    huge = jax.tree.map(lambda w: np.full_like(w, 1e6), frozen)
    grads = {"frozen": huge, "lora": jax.tree.map(lambda w: np.full_like(w, 1e-6), lora)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
    np.testing.assert_allclose(updates["lora"]["up"]["bias"], -0.1 * lora["up"]["bias"] - 1e-6, rtol=1e-5, atol=1e-9)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates["frozen"]))


def test_a_flax_train_state_that_holds_both():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(K, name="head")(nn.tanh(nn.Dense(N, name="up")(x)))

    _, _, _, x, y = setup()
    variables = Net().init(jax.random.key(0), x)
    model = lojax.wrap(Net(), "**/up/kernel", rank=RANK, train="**/head/*", strict=True)
    frozen, lora = model.init(jax.random.key(1), variables, x)
    state = TrainState.create(
        apply_fn=model.apply, params={"frozen": frozen, "lora": lora}, tx=lojax.optimizer(optax.adam(1e-2))
    )

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn(params["frozen"], params["lora"], x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    values = []
    for _ in range(5):
        state, value = step(state)
        values.append(float(value))
    assert int(state.step) == 5
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]
    assert_same_bits(state.params["frozen"], frozen)
    merged, adapted = model.merge(**state.params), model.apply(*state.params.values(), x)
    np.testing.assert_allclose(Net().apply(merged, x), adapted, rtol=1e-4, atol=1e-5)


def test_integers_may_ride_along_frozen():
    tree = {
        "frozen": {"w": None, "count": np.arange(3, dtype=np.int32)},
        "lora": {"w": np.ones(2, np.float32), "count": None},
    }
    grads = jax.grad(lambda tree: jnp.sum(tree["lora"]["w"] ** 2), allow_int=True)(tree)
    tx = lojax.optimizer(optax.sgd(0.25))
    updates, _ = tx.update(grads, tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    assert_same_bits(after["frozen"], tree["frozen"])
    assert after["lora"]["w"].tolist() == [0.5, 0.5]


# --- accumulation, schedules, hyperparameters ---


@pytest.mark.parametrize("form", ["lora", "dict"])
def test_accumulated_halves_make_the_step_of_the_whole_batch(form):
    _, frozen, lora, x, y = setup()
    half = T // 2
    tx = lojax.optimizer(optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation())
    tree, state, _ = FORMS[form].run(tx, [(x[:half], y[:half]), (x[half:], y[half:])])
    whole, _, _ = FORMS[form].run(lojax.optimizer(optax.adam(1e-2)), [(x, y)])
    for got, want in zip(*(jax.tree.leaves(FORMS[form].split(frozen, t)[1]) for t in (tree, whole)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    assert_same_bits(FORMS[form].split(frozen, tree)[0], frozen)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == max(leaf.size for leaf in jax.tree.leaves(lora))


def ones_of(tree):
    return jax.tree.map(np.ones_like, tree)


def test_a_schedule_sets_the_size_of_each_step():
    _, frozen, lora, _, _ = setup()
    tree = {"frozen": frozen, "lora": lora}
    tx = lojax.optimizer(optax.sgd(optax.linear_schedule(0.0, 1.0, 4)))
    state, update, seen = tx.init(tree), jax.jit(tx.update), []
    for _ in range(4):
        updates, state = update(ones_of(tree), state, tree)
        seen.append(float(updates["lora"]["up"]["bias"][0]))
    assert seen == [0.0, -0.25, -0.5, -0.75]


def test_injected_hyperparameters_can_be_read_and_changed():
    _, frozen, lora, _, _ = setup()
    tree = {"frozen": frozen, "lora": lora}
    tx = lojax.optimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    state = tx.init(tree)
    inner = state.inner_states["train"].inner_state
    assert float(inner.hyperparams["learning_rate"]) == 0.5
    inner.hyperparams["learning_rate"] = jnp.asarray(0.125)
    updates, _ = jax.jit(tx.update)(ones_of(tree), state, tree)
    assert (updates["lora"]["up"]["bias"] == -0.125).all()
    assert (updates["frozen"]["up"]["kernel"] == 0).all()


# --- what it costs ---


def gradient(form):
    """The gradient of the loss with respect to the tree of this form, and its arguments."""
    _, frozen, lora, x, y = setup()

    def grad(tree, frozen, x, y):
        return jax.grad(lambda tree: loss(*FORMS[form].split(frozen, tree), x, y))(tree)

    return grad, (FORMS[form].join(frozen, lora), frozen, x, y)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_has_a_product_of_the_size_of_a_weight(form):
    grad, args = gradient(form)
    for shape in ((M, N), (N, K)):
        assert not products_of_shape(grad, shape, *args), shape
    assert products_of_shape(grad, (M, RANK), *args)


def test_the_search_for_such_products_finds_those_of_a_merged_net():
    model, frozen, lora, x, y = setup()
    grad = jax.grad(lambda lora: jnp.mean((net(model.merge(frozen, lora), x) - y) ** 2))
    # One in the forward pass, W0 + s*A*B, and one in the backward pass, dW.
    assert len(products_of_shape(grad, (M, N), lora)) == 2


def test_the_gradient_of_a_combined_tree_is_zeros_for_what_is_frozen_and_no_work():
    compiled = {}
    for form in FORMS:
        grad, args = gradient(form)
        compiled[form] = jax.jit(grad).lower(*args).compile()
    alone = compiled["lora"]
    weights = 4 * (M * N + N * K)
    for form in COMBINED:
        assert compiled[form].cost_analysis()["flops"] == pytest.approx(alone.cost_analysis()["flops"], rel=0.01)
        # Handed out of the jitted function, the zeros are buffers of the size of `frozen`.
        sizes = [program.memory_analysis().output_size_in_bytes for program in (compiled[form], alone)]
        assert weights <= sizes[0] - sizes[1] <= 1.01 * weights


def test_within_one_jitted_step_the_zeros_cost_nothing():
    _, frozen, lora, x, y = setup()
    memory, flops = {}, {}
    for name, form in FORMS.items():
        tx, tree = lojax.optimizer(optax.sgd(1e-2)), form.join(frozen, lora)
        step = jax.jit(form.step(tx), donate_argnums=(0, 1))
        compiled = step.lower(tree, tx.init(tree), frozen, x, y).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        flops[name] = compiled.cost_analysis()["flops"]
    for name in COMBINED:
        assert flops[name] == pytest.approx(flops["lora"], rel=0.01)
        assert memory[name] <= 1.01 * memory["lora"] + 1024


@pytest.mark.parametrize("argument", ["tx", "magnitude", "full"])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-3, "is a float (0.001), not an optax transformation. Did you mean optax.adamw(0.001)?"),
        (optax.adamw, "is a function (<function adamw), not an optax transformation. Did you forget to call it?"),
        ("adamw", "is a str ('adamw'), not an optax transformation."),
    ],
)
def test_what_is_not_a_transformation_is_refused(argument, value, text):
    with pytest.raises(TypeError) as caught:
        lojax.optimizer(**{"tx": optax.sgd(0.1), argument: value})
    start, end = text.split(" (<function adamw")[0], text.rpartition(")")[2] if callable(value) else text
    assert str(caught.value).startswith(f"{argument} {start}") and str(caught.value).endswith(end)
