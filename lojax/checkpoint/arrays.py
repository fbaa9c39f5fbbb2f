"""Arrays to and from an orbax checkpoint: a flat dict by name, in one OCDBT store, Zstandard-compressed.

Orbax's stable interface only. What orbax would add for each array (its sharding, its chunks) is left
out: an adapter is small, and is restored to whatever sharding the reader asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from lojax.checkpoint.manifest import Array


def _handler() -> ocp.PyTreeCheckpointHandler:
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler()),
        (jax.Array, type_handlers.ArrayHandler(enable_write_sharding_file=False, array_metadata_store=None)),
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, type_handler_registry=registry)


def snapshot(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Copies that later donation, or writing in place, cannot touch: on the host where it can see all of it."""
    for value in arrays.values():
        if isinstance(value, jax.Array) and on_host(value):
            value.copy_to_host_async()
    return {name: np.array(value) if on_host(value) else jnp.copy(value) for name, value in arrays.items()}


def on_host(value: Any) -> bool:
    """Whether this process can see all of an array."""
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def start_write(folder: Path, arrays: Mapping[str, Any]) -> Callable[[], None]:
    """Begins to write ``arrays`` to the new directory ``folder``, on every process.

    Returns:
        A function that waits until all processes have written all of it.
    """
    # A directory made in the background fails in the background: orbax then waits five minutes for it.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    checkpointer = ocp.AsyncCheckpointer(_handler(), async_options=options)
    stored = {name: value for name, value in arrays.items() if value.size}  # orbax refuses empty arrays
    try:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(stored))
    except BaseException:
        checkpointer.close()
        raise

    def finish() -> None:
        try:
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()

    return finish


def read(folder: Path, arrays: Mapping[str, Array], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by name, each in its sharding, or on the host where it has none.

    Raises:
        ValueError: The orbax checkpoint holds other names, shapes or dtypes than ``arrays`` says.
    """
    stored = {name: array for name, array in arrays.items() if array.bytes}
    with ocp.Checkpointer(_handler()) as checkpointer:
        _check(folder, stored, checkpointer.metadata(folder).item_metadata)
        restore_args = {name: _restore_args(array, shardings.get(name)) for name, array in stored.items()}
        found = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    empty = {name: np.zeros(array.shape, jnp.dtype(array.dtype)) for name, array in arrays.items() if not array.bytes}
    return found | empty


def _check(folder: Path, arrays: Mapping[str, Array], metadata: Any) -> None:
    stored: dict[str, Any] = dict(getattr(metadata, "tree", metadata))
    for name in sorted(arrays.keys() | stored.keys()):
        expected = arrays[name].spec if name in arrays else "nothing"
        got = _spec(stored[name]) if name in stored else "nothing"
        if got != expected:
            raise ValueError(
                f"{folder}: holds {got} at {name!r}, but adapter.json says {expected}. Nothing was loaded."
            )


def _spec(found: Any) -> str:
    chunk = found.storage.chunk_shape if found.storage else None
    oversized = chunk and any(size > whole for size, whole in zip(chunk, found.shape, strict=True))
    return f"{found.dtype}[{','.join(map(str, found.shape))}]" + (f" in chunks of {chunk}" if oversized else "")


def _restore_args(array: Array, sharding: Any) -> ocp.RestoreArgs:
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=array.shape)
