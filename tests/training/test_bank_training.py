"""A bank in training: every adapter moves as it would alone, whatever its rank and scale, and is saved as one state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_same_bits

import lojax
from lojax.training.optimizer import groups
from tests.helpers import trained

KEY = jax.random.key(0)
RATE = 2e-3  # Adam divides by the size of a gradient: its steps carry rounding in proportion to the rate
PARAMS = {"w": jax.random.normal(KEY, (6, 5)) / 2, "v": jax.random.normal(KEY, (5, 4)) / 2, "bias": jnp.zeros(4)}
X = jax.random.normal(jax.random.key(1), (3, 8, 6))
Y = jax.random.normal(jax.random.key(2), (3, 8, 4))
NET = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"] + params["bias"]


def pairs(**settings):
    """Three adapters whose ranks, scales and targets differ."""
    targets = (["w", "v"], ["w"], ["v"]) if settings.get("variant") != "dora" else (["w", "v"],) * 3
    made = [
        lojax.init(jax.random.key(i), PARAMS, targets[i], rank=1 + i, alpha=(1, 6, 2)[i], **settings) for i in range(3)
    ]
    return made[0][0], [trained(lora, i) for i, (_, lora) in enumerate(made)]


MODEL = lojax.wrap(NET, ["w", "v"])


def loss_of_one(lora, frozen, x, y):
    return jnp.mean((MODEL.apply(frozen, lora, x) - y) ** 2)


def loss_of_all(bank, frozen):
    """The sum of the losses of all adapters, each on its own rows of one mixed batch."""
    ids = np.repeat(np.arange(3), 8)
    out = MODEL.apply(frozen, bank, X.reshape(24, 6), adapter=ids)
    return jnp.mean((out.reshape(3, 8, 4) - Y) ** 2, (1, 2)).sum()


def train(loss, tx, tree, *args, steps=8):
    @jax.jit
    def step(tree, state):
        gradient = jax.grad(loss)(tree, *args)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, state = tx.update(gradient, state, tree)
            return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    for _ in range(steps):
        tree, state = step(tree, state)
    return tree


def mapped(tx):
    """An optimizer that each adapter has for itself."""
    return optax.GradientTransformation(jax.vmap(tx.init), lambda g, s, p: jax.vmap(tx.update)(g, s, p))


OPTIMIZERS = {
    "adam": (optax.adam(RATE), lambda tx: tx),
    "adamw": (lojax.optimizer(optax.adamw(RATE, weight_decay=0.1)), lambda tx: tx),
    "lora+": (lojax.optimizer(optax.adam(RATE), b_ratio=16.0), lambda tx: tx),
    "clipped, each for itself": (optax.chain(optax.clip_by_global_norm(0.05), optax.adam(RATE)), mapped),
}


SETTINGS = [{}, {"train": "bias"}, {"variant": "dora"}, {"variant": "lora-fa"}]


@pytest.mark.parametrize(
    ("name", "settings"), [("adam", x) for x in SETTINGS] + [(x, {}) for x in OPTIMIZERS if x != "adam"], ids=str
)
def test_a_bank_trains_as_separate_runs(name, settings):
    # In float64: Adam divides each entry by its own size, and would make rounding in float32 a difference of its rate.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        tx, of_bank = OPTIMIZERS[name]
        tx = lojax.optimizer(tx) if settings.get("variant") == "lora-fa" and name == "adam" else tx
        wide = lambda v: v.astype(np.float64) if v.dtype == np.float32 else v
        frozen, loras = jax.tree.map(wide, pairs(**settings))
        bank = lojax.stack(loras)
        got = train(loss_of_all, of_bank(tx), bank, frozen)
        for i, lora in enumerate(loras):
            expected = train(loss_of_one, tx, lora, frozen, X[i], Y[i])
            assert jax.tree.structure(got[i]) == jax.tree.structure(expected)
            moved = 0.0
            for x, y, at_start in zip(*map(jax.tree.leaves, (got[i], expected, lora)), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
                moved = max(moved, np.abs(x - at_start).max())
            assert moved > 1e-2
        assert_same_bits(lojax.stack(lojax.unstack(got)), got)  # what is beyond the own rank of each stays zero


def test_a_frozen_a_is_not_updated():
    frozen, loras = pairs(variant="lora-fa")
    bank = lojax.stack(loras)
    got = train(loss_of_all, lojax.optimizer(optax.adamw(RATE, weight_decay=0.5)), bank, frozen)
    np.testing.assert_array_equal(got.lora["w"].a, bank.lora["w"].a)
    assert np.abs(got.lora["w"].b - bank.lora["w"].b).max() > 1e-2


def test_the_groups_of_a_bank_beside_its_base():
    """A pair with a bank was taken for two layers of a trained tree, and the base trained."""
    frozen, loras = pairs(train="bias", variant="lora-fa")
    bank = lojax.stack(loras)
    labels = groups(bank)
    assert (labels.lora["w"].a, labels.lora["w"].b, labels.lora["bias"]) == ("frozen", "b", "full")
    whole = {**frozen, "bias": PARAMS["bias"]}  # the base of what is trained in full, for rows without an adapter
    for base in (frozen, whole):
        for form in ((base, bank), {"frozen": base, "lora": bank}):
            left, right = form if isinstance(form, tuple) else form.values()
            found = groups(form)
            left, right = found if isinstance(form, tuple) else (found["frozen"], found["lora"])
            assert set(jax.tree.leaves(left)) == {"frozen"} and right == labels
        tx = lojax.optimizer(optax.sgd(1.0))
        updates, _ = tx.update((base, bank), tx.init((base, bank)))
        assert not any(np.any(x) for x in jax.tree.leaves(updates[0]))


def test_orbax_keeps_a_bank_beside_its_optimizer(tmp_path):
    """As a `lora` tree, with the recipe of `lojax.checkpoint.save_restore`; then it is published on its own."""
    frozen, loras = pairs(train="bias")
    bank, tx = lojax.stack(loras, names=["one", "two", "three"]), optax.adam(RATE)
    state = {"lora": bank, "opt_state": tx.init(bank)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        parts = {name: ocp.args.StandardSave(part) for name, part in state.items()}
        manager.save(0, args=ocp.args.Composite(**parts))
        manager.wait_until_finished()
        shapes = jax.eval_shape(lambda: state)
        parts = {name: ocp.args.StandardRestore(part) for name, part in shapes.items()}
        restored = dict(manager.restore(0, args=ocp.args.Composite(**parts)).items())
        alone = manager.restore(0, args=ocp.args.Composite(lora=ocp.args.StandardRestore(shapes["lora"])))["lora"]
    assert_same_bits(restored, state)
    assert_same_bits(alone, bank)
    lojax.save(tmp_path / "bank", alone, frozen=frozen)
    assert_same_bits(lojax.restore(tmp_path / "bank", frozen=frozen), bank)
    assert dataclasses.replace(alone, names=None).names is None
