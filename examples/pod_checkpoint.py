"""Orbax checkpoints of the training state: every process writes its own shards, and any mesh reads them back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """Numbered checkpoints of ``(lora, opt_state)`` in a folder, the last two of them."""

    def __init__(self, folder: Path, *, every: int):
        """Opens or creates the folder; ``every`` is the number of steps between checkpoints."""
        options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2)
        handler = ocp.StandardCheckpointHandler()
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

    def latest(self, fresh: Any, shardings: Any) -> tuple[int, Any]:
        """The newest step and its state on this mesh; 0 and ``fresh`` where there is none.

        Args:
            fresh: A state of the same structure and shapes.
            shardings: The shardings to restore it with.

        Raises:
            ValueError: The checkpoint is of another model or rank, or some of its files are missing.
        """
        step = self.manager.latest_step()
        if step is None:
            return 0, fresh
        expected = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), fresh, shardings)
        self._check_shapes(step, self._read(step, self._saved_shapes), flatten(expected))
        arrays = self._read(step, self.manager.restore, args=ocp.args.StandardRestore(flatten(expected)))
        return step, jax.tree.unflatten(jax.tree.structure(fresh), arrays.values())

    def _read(self, step: int, read: Callable[..., Any], **settings: Any) -> Any:
        """``read(step)``, with an error that names the files whatever goes wrong."""
        try:
            return read(step, **settings)
        except Exception as error:
            raise ValueError(
                f"The checkpoint of step {step} in {self.manager.directory} cannot be read: files are missing "
                f"or damaged ({error}). Every process must see the same folder. "
                f"Delete {step}/ to resume from an earlier one."
            ) from error

    def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes in the metadata of the checkpoint."""
        metadata = self.manager.item_metadata(step)
        if metadata is None:  # orbax returns None where the file is missing
            raise FileNotFoundError("its _METADATA is missing")
        return {name: tuple(x.shape) for name, x in metadata.items()}

    def _check_shapes(self, step: int, saved: dict[str, tuple[int, ...]], expected: dict[str, Any]) -> None:
        for name in {**expected, **saved}:
            shape, expected_shape = saved.get(name), expected[name].shape if name in expected else None
            if shape != expected_shape:
                raise ValueError(
                    f"The checkpoint of step {step} holds {name} as {shape}; this run has {expected_shape}. "
                    "Start it with the same --model, --rank and targets, or another --out."
                )

    def save(self, step: int, state: Any, *, force: bool = False) -> None:
        """Saves in the background, if ``every`` steps have passed or with ``force``."""
        if force or self.manager.should_save(step):
            self.manager.save(step, args=ocp.args.StandardSave(flatten(state)), force=force)

    def is_preempted(self, step: int, signalled: bool) -> bool:
        """Whether the machines are about to be taken away; the same answer in all processes."""
        return self.manager.reached_preemption(step) if jax.process_count() > 1 else signalled

    def close(self) -> None:
        """Waits until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by names that sort in tree order, so that no library's node types are stored."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"{i:05d}{jax.tree_util.keystr(keys, simple=True, separator='.')}": x for i, (keys, x) in enumerate(leaves)}
