"""Checkpoints of what trains, by orbax: every process writes its own shards, any mesh reads them back."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """Numbered checkpoints of ``(lora, opt_state)`` in a folder; the last two are kept."""

    def __init__(self, folder: Path, *, every: int):
        """Opens or makes the folder; ``every`` is the number of steps between checkpoints."""
        options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2)
        handler = ocp.StandardCheckpointHandler()
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

    def latest(self, fresh: Any, placed: Any) -> tuple[int, Any]:
        """The newest step and its state on this mesh; 0 and ``fresh`` where there is none.

        Args:
            fresh: A state of the same structure and shapes.
            placed: How it is to lie.

        Raises:
            ValueError: The checkpoint is of another model or rank, or files of it are missing.
        """
        step = self.manager.latest_step()
        if step is None:
            return 0, fresh
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), fresh, placed)
        self._check(step, flat(wanted))
        try:
            found = self.manager.restore(step, args=ocp.args.StandardRestore(flat(wanted)))
        except Exception as error:
            raise ValueError(
                f"The checkpoint of step {step} in {self.manager.directory} cannot be read: files are missing "
                f"or damaged ({error}). Every process must see the same folder. "
                f"Delete {step}/ to go on from an earlier one."
            ) from error
        return step, jax.tree.unflatten(jax.tree.structure(fresh), found.values())

    def _check(self, step: int, wanted: dict[str, Any]) -> None:
        try:
            kept = dict(self.manager.item_metadata(step).items())
        except (AttributeError, OSError, ValueError):
            return  # the metadata is damaged: reading the rest will say so
        for name, x in wanted.items():
            shape = tuple(kept[name].shape) if name in kept else None
            if shape != x.shape:
                raise ValueError(
                    f"The checkpoint of step {step} holds {name} as {shape}; this run has {x.shape}. "
                    "Start it with the same --model, --rank and targets, or another --out."
                )

    def save(self, step: int, state: Any, *, force: bool = False) -> None:
        """Saves where it is time, or where ``force`` says so; writes in the background."""
        if force or self.manager.should_save(step):
            self.manager.save(step, args=ocp.args.StandardSave(flat(state)), force=force)

    def told_to_go(self, step: int, signalled: bool) -> bool:
        """Whether the machines are about to be taken away: all processes answer alike."""
        return self.manager.reached_preemption(step) if jax.process_count() > 1 else signalled

    def close(self) -> None:
        """Waits until all is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def flat(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by a name that sorts as they come, so that no library's node types are stored."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"{i:05d}{jax.tree_util.keystr(keys, simple=True, separator='.')}": x for i, (keys, x) in enumerate(leaves)}
