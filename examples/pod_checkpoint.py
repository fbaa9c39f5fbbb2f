"""Checkpoints of what trains, by orbax: every process writes its own shards, any mesh reads them back."""

from collections.abc import Callable
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
        self._check(step, self._read(step, self._shapes), flat(wanted))
        found = self._read(step, self.manager.restore, args=ocp.args.StandardRestore(flat(wanted)))
        return step, jax.tree.unflatten(jax.tree.structure(fresh), found.values())

    def _read(self, step: int, read: Callable[..., Any], **settings: Any) -> Any:
        """``read(step)``; whatever goes wrong in it is the fault of the files."""
        try:
            return read(step, **settings)
        except Exception as error:
            raise ValueError(
                f"The checkpoint of step {step} in {self.manager.directory} cannot be read: files are missing "
                f"or damaged ({error}). Every process must see the same folder. "
                f"Delete {step}/ to go on from an earlier one."
            ) from error

    def _shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes that the checkpoint says it holds."""
        kept = self.manager.item_metadata(step)
        if kept is None:  # so orbax says that there is no such file
            raise FileNotFoundError("its _METADATA is missing")
        return {name: tuple(x.shape) for name, x in kept.items()}

    def _check(self, step: int, kept: dict[str, tuple[int, ...]], wanted: dict[str, Any]) -> None:
        for name in {**wanted, **kept}:
            held, here = kept.get(name), wanted[name].shape if name in wanted else None
            if held != here:
                raise ValueError(
                    f"The checkpoint of step {step} holds {name} as {held}; this run has {here}. "
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
