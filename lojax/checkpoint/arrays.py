"""Arrays to and from an orbax checkpoint: a flat dict by name, in one OCDBT store, Zstandard-compressed.

Only the stable interface of orbax. What orbax would add for each array (its sharding, its chunks) is left
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

from lojax.checkpoint.manifest import StoredArray
from lojax.text import spec
from lojax.types import ArrayLike


def _handler() -> ocp.PyTreeCheckpointHandler:
    # By default orbax writes a sharding file and array metadata for each array: more bytes than a small adapter.
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler()),
        (jax.Array, type_handlers.ArrayHandler(enable_write_sharding_file=False, array_metadata_store=None)),
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, type_handler_registry=registry)


def snapshot(arrays: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """Copies that later donation, or writing in place, cannot touch: on the host where it can see all of it."""
    on_host = {n: not isinstance(x, jax.Array) or x.is_fully_addressable for n, x in arrays.items()}
    for name, value in arrays.items():
        if isinstance(value, jax.Array) and on_host[name]:
            value.copy_to_host_async()  # starts all transfers before the first one is waited for
    return {name: np.array(value) if on_host[name] else jnp.copy(value) for name, value in arrays.items()}


def start_write(folder: Path, arrays: Mapping[str, ArrayLike]) -> Callable[[], None]:
    """Begins to write ``arrays`` to the new directory ``folder``, on every process.

    Returns:
        A function that waits until all processes have written all of it.
    """
    # A directory made in the background fails in the background: orbax then waits five minutes for it.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    checkpointer = ocp.AsyncCheckpointer(_handler(), async_options=options)
    not_empty = {name: value for name, value in arrays.items() if np.size(value)}  # orbax refuses empty arrays
    try:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(not_empty))
    except BaseException:
        checkpointer.close()
        raise

    def finish() -> None:
        try:
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()

    return finish


def read(
    folder: Path, arrays: Mapping[str, StoredArray], shardings: Mapping[str, jax.sharding.Sharding | None]
) -> dict[str, ArrayLike]:
    """The arrays by name, each in its sharding, or on the host where it has none.

    Raises:
        ValueError: The orbax checkpoint holds other names, shapes or dtypes than ``arrays`` says.
    """
    not_empty = {name: array for name, array in arrays.items() if array.bytes}
    with ocp.Checkpointer(_handler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        _check(folder, not_empty, dict(getattr(metadata, "tree", metadata)))
        restore_args = {name: _restore_args(array, shardings.get(name)) for name, array in not_empty.items()}
        values = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    # orbax refuses empty arrays: none was written, and their shape says all there is to know.
    empty = {name: np.zeros(array.shape, jnp.dtype(array.dtype)) for name, array in arrays.items() if not array.bytes}
    return values | empty


def _check(folder: Path, arrays: Mapping[str, StoredArray], stored: Mapping[str, Any]) -> None:
    for name in sorted(arrays.keys() | stored.keys()):
        expected = spec(arrays[name]) if name in arrays else "nothing"
        got = "nothing"
        if name in stored:
            got, chunk = spec(stored[name]), stored[name].storage and stored[name].storage.chunk_shape
            # A forged chunk that is larger than its array would be allocated whole.
            if chunk and any(size > length for size, length in zip(chunk, stored[name].shape, strict=True)):
                got += f" in chunks of {chunk}"
        if got != expected:
            raise ValueError(
                f"{folder}: holds {got} at {name!r}, but adapter.json says {expected}. Nothing was loaded."
            )


def _restore_args(array: StoredArray, sharding: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=array.shape)


def named_sharding(value: Any) -> jax.sharding.NamedSharding | None:
    """The sharding of an array or shape, if it is on a mesh."""
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def to_device(value: ArrayLike, sharding: jax.sharding.Sharding | None = None) -> ArrayLike:
    """``value`` as a JAX array; a 64-bit array on the host stays there where JAX has no 64-bit types."""
    if isinstance(value, np.ndarray) and jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        return value
    if sharding is None:
        return jnp.asarray(value)
    # Each process has read all of it and gives its own shards; `device_put` would compare the copies first.
    return jax.make_array_from_callback(np.shape(value), sharding, lambda index: np.asarray(value)[index])
