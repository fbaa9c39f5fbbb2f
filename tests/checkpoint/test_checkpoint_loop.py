"""Orbax in real loops: `lora` is an ordinary pytree, so a CheckpointManager takes it as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_same_bits
from jax.sharding import NamedSharding, PartitionSpec

import lojax
from tests.checkpoint import checkpoint_cases as cases

TX = optax.adamw(1e-2)


def _loss(lora, frozen, x):
    return jnp.mean(_net(lojax.merge(frozen, lora), x) ** 2)


def _net(params, x):
    layer = params["params"]["layer_0"]
    head = params["params"]["head"]
    return (x @ layer["query"]["kernel"] + x @ layer["value"]["kernel"]) @ head["kernel"] + head["bias"]


@jax.jit
def _step(state, frozen):
    """One step on a batch that the state's own key and step draw: nothing outside the state matters."""
    loop = state["loop"]
    key = jax.random.wrap_key_data(loop["rng"])
    x = jax.random.normal(jax.random.fold_in(key, loop["step"]), (4, 16))
    loss, grads = jax.value_and_grad(_loss)(state["lora"], frozen, x)
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction mixes dtypes
        updates, opt_state = TX.update(grads, state["opt_state"], state["lora"])
    lora = optax.apply_updates(state["lora"], updates)
    return {"lora": lora, "opt_state": opt_state, "loop": {**loop, "step": loop["step"] + 1}}, loss


def _start():
    frozen, lora = cases.pair()
    loop = {"step": jnp.int32(0), "rng": jax.random.key_data(jax.random.key(5))}
    return frozen, {"lora": lora, "opt_state": TX.init(lora), "loop": loop}


def _manager(path, **options):
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options))


def _composite(state, kind):
    return ocp.args.Composite(**{name: kind(part) for name, part in state.items()})


def test_keep_last_async_and_resume_to_the_same_result(tmp_path):
    frozen, state = _start()
    with _manager(tmp_path, max_to_keep=2, enable_async_checkpointing=True) as manager:
        for step in range(5):
            state, _ = _step(state, frozen)
            manager.save(step, args=_composite(state, ocp.args.StandardSave))
            if step == 2:
                halfway = state
        manager.wait_until_finished()
        assert manager.all_steps() == [3, 4]
    frozen, fresh = _start()
    shapes = jax.eval_shape(lambda: fresh)
    with _manager(tmp_path) as manager:
        restored = dict(manager.restore(3, args=_composite(shapes, ocp.args.StandardRestore)).items())
    assert_same_bits(restored, _step(halfway, frozen)[0])
    assert_same_bits(_step(restored, frozen)[0], state)


def test_keep_best(tmp_path):
    frozen, state = _start()
    losses = {}
    with _manager(tmp_path, max_to_keep=1, best_fn=lambda metrics: metrics["loss"], best_mode="min") as manager:
        for step in range(4):
            state, loss = _step(state, frozen)
            losses[step] = float(loss)
            manager.save(step, args=_composite(state, ocp.args.StandardSave), metrics={"loss": losses[step]})
        manager.wait_until_finished()
        best = min(losses, key=losses.__getitem__)
        assert manager.best_step() == best and manager.all_steps() == [best]


def test_only_the_adapter_from_a_training_checkpoint(tmp_path):
    frozen, state = _start()
    with _manager(tmp_path / "parts") as manager:
        manager.save(0, args=_composite(state, ocp.args.StandardSave))
        manager.wait_until_finished()
        shapes = jax.eval_shape(lambda: state["lora"])
        restored = manager.restore(0, args=ocp.args.Composite(lora=ocp.args.StandardRestore(shapes)))
    assert_same_bits(restored["lora"], state["lora"])
    lojax.save(tmp_path / "adapter", restored["lora"], frozen=frozen)  # and publish it on its own
    assert_same_bits(lojax.restore(tmp_path / "adapter", frozen=frozen), state["lora"])


def test_only_the_adapter_from_one_saved_tree(tmp_path):
    _, state = _start()
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        shapes = {"lora": jax.eval_shape(lambda: state["lora"])}
        args = ocp.checkpoint_utils.construct_restore_args(shapes)
        wanted = ocp.args.PyTreeRestore(shapes, restore_args=args, partial_restore=True)
        restored = checkpointer.restore(tmp_path / "state", args=wanted)
    assert_same_bits(restored["lora"], state["lora"])


@pytest.mark.parametrize("first, second", [((8,), (2, 4)), ((4, 2), (8,)), ((8,), (1,))])
def test_to_another_mesh(tmp_path, first, second):
    def spread(tree, shape):
        names = ("x", "y")[: len(shape)]
        mesh = jax.make_mesh(shape, names)

        def place(x):
            axes = [names[-1] if np.ndim(x) == 2 and x.shape[0] % 8 == 0 else None]
            return NamedSharding(mesh, PartitionSpec(*axes if np.ndim(x) else ()))

        return jax.tree.map(place, tree)

    _, state = _start()
    state = jax.device_put(state, spread(state, first))
    with _manager(tmp_path) as manager:
        manager.save(0, args=_composite(state, ocp.args.StandardSave))
        manager.wait_until_finished()
        places = spread(state, second)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
        restored = dict(manager.restore(0, args=_composite(wanted, ocp.args.StandardRestore)).items())
    assert_same_bits(restored, state)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding}"), restored, places)
