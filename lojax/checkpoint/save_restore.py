"""`save` and `restore`: one adapter, whole, named and checked, in a directory of its own.

That is what outlives a run. While a run goes on, a training loop wants more: the optimizer's state,
the step, the random key, several generations. `lora` is an ordinary pytree, so orbax's own
`CheckpointManager` takes it as it is, with keep-last, keep-best, asynchronous saves and preemption::

    state = {"lora": lora, "opt_state": opt_state, "loop": {"step": step, "rng": jax.random.key_data(key)}}
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
        parts = {name: ocp.args.StandardSave(part) for name, part in state.items()}
        manager.save(step, args=ocp.args.Composite(**parts))

and gives the adapter back alone, on any mesh, without reading the rest::

    shapes = jax.eval_shape(model.init, key, params, *example)[1]
    found = manager.restore(step, args=ocp.args.Composite(lora=ocp.args.StandardRestore(shapes)))
    lojax.save("adapter", found["lora"], frozen=frozen)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.adapters.trees import check_pair
from lojax.checkpoint import adapter_directory as layout
from lojax.checkpoint import arrays as store
from lojax.checkpoint.codec import arrays_of, build, check_like, entries_of, leaves
from lojax.checkpoint.digest import digests
from lojax.checkpoint.fingerprint import check_base as _check_base
from lojax.checkpoint.fingerprint import check_fits, fingerprint
from lojax.checkpoint.manifest import Record

_log = logging.getLogger(__name__)
_background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lojax-save")
_last: concurrent.futures.Future[None] | None = None


def save(
    path: str | os.PathLike[str],
    lora: Any,
    *,
    frozen: Any = None,
    overwrite: bool = True,
    metadata: Mapping[str, Any] | None = None,
    wait: bool = True,
) -> concurrent.futures.Future[None]:
    """Saves an adapter: its arrays through orbax, and all that the maths needs in ``adapter.json``.

    An interruption at any point, SIGKILL and power cut included, leaves the previous checkpoint whole
    (see `lojax.checkpoint.adapter_directory` for how, and for how to read the arrays without lojax). With several
    processes, each calls this with the same arguments and a path that all of them share.

    Args:
        path: A directory, made if need be. One adapter each: ``base/adapters/french``.
        lora: The trained tree. Boxes and every sharding are kept or made no difference.
        frozen: The frozen tree. With it the checkpoint holds a fingerprint of the base, by which
            `restore` refuses to put the adapter on another one. Content is read once per array.
        overwrite: Replace an adapter that is already at ``path``.
        metadata: Anything that JSON can hold: the step, the data, a score.
        wait: False returns once ``lora`` is copied, and writes in the background. The next save waits
            for it. So must the program before it ends: call ``result()``, or this save is lost.

    Returns:
        A future that is done when the checkpoint is complete; its ``result()`` raises what went wrong.

    Raises:
        FileExistsError: ``overwrite=False`` and there is an adapter at ``path``.
        OSError: The disk is full, or ``path`` cannot be written. The previous checkpoint is whole.
        TypeError: A leaf is no array; ``metadata`` is no JSON.
        ValueError: ``frozen`` and ``lora`` do not fit together; ``lora`` is empty.

    >>> import tempfile, lojax
    >>> frozen, lora = lojax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = lojax.save(folder, lora, frozen=frozen, metadata={"step": 100})
    ...     lojax.restore(folder, frozen=frozen)["kernel"].scale
    1.0
    """
    place = layout.local(path)
    metadata = dict(metadata or {})
    _check_json(metadata)
    if frozen is not None:
        check_pair(frozen, lora)
    found, keys = leaves(lora)
    live = arrays_of(found)
    _settle()
    if (place / layout.POINTER).exists() and not overwrite:
        raise FileExistsError(f"{place}: holds an adapter. Pass overwrite=True to replace it, or choose another path.")
    adapted = [path for path, leaf in found.items() if is_adapter(leaf)]
    base = None if frozen is None else fingerprint(frozen, adapted)
    shared = {name: value for name, value in live.items() if not store.on_host(value)}
    known = digests(shared)  # every process takes part, so it is not left to the background
    copies = store.snapshot(live)

    def describe(folder: Path) -> Record:
        own = digests({name: value for name, value in copies.items() if name not in known})
        adapters, full, other = entries_of(found, known | own)
        return Record(folder.name, layout.inventory(folder), adapters, full, other, keys, base, metadata)

    return _run(place, copies, describe, wait)


def _run(
    place: Path, copies: Mapping[str, Any], describe: Callable[[Path], Record], wait: bool
) -> concurrent.futures.Future[None]:
    """Writes ``copies``, then makes them the checkpoint; where it can, all of it in the background."""
    global _last
    if wait or jax.process_count() > 1:  # barriers between devices belong to the main thread
        folder, finish_write = _start(place, copies)
        task = partial(_finish, place, folder, finish_write, describe)
    else:
        task = lambda: _finish(place, *_start(place, copies), describe)
    if wait:
        task()
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return done
    _last = _background.submit(_aloud, task)
    return _last


def _aloud(task: Callable[[], None]) -> None:
    """Runs ``task``; also says what went wrong, in case nobody asks for the result."""
    try:
        task()
    except BaseException:
        _log.exception("Saving in the background failed.")
        raise


def _settle() -> None:
    """Waits for a save that is still going on in the background."""
    if _last is not None:
        concurrent.futures.wait([_last])


def _start(place: Path, copies: Mapping[str, Any]) -> tuple[Path, Callable[[], None]]:
    with _failing_clearly(place):
        number, fault = -1, None
        if multihost.is_primary_host(0):
            try:
                number = _claim(place)
            except OSError as error:
                fault = error
        if jax.process_count() > 1:  # the others must learn of a failure too, not wait for the first process
            number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
        if number < 0:
            raise fault or OSError("the first process could not make the directory")
        folder = place / layout.folder_name(number)
        return folder, store.start_write(folder, copies)


def _claim(place: Path) -> int:
    """Makes the directory, and room in it; returns a number for new arrays."""
    place.mkdir(parents=True, exist_ok=True)
    number = layout.next_number(place)
    _tidy(place)
    return number


def _finish(place: Path, folder: Path, finish_write: Callable[[], None], describe: Callable[[Path], Record]) -> None:
    with _failing_clearly(place):
        try:
            finish_write()
            if multihost.is_primary_host(0):
                layout.write_pointer(place, describe(folder).to_json())
                _tidy(place)
        finally:
            if jax.process_count() > 1:  # nobody goes on before the checkpoint is there, or has failed
                multihost.get_barrier_sync_fn()(key=f"lojax-save-{folder}", timeout_ms=600_000)


def _tidy(place: Path) -> None:
    """Sweeps, unless ``adapter.json`` is there but unreadable: then nobody knows what it names."""
    keep = layout.current_folder(place)
    if keep is not None or not (place / layout.POINTER).exists():
        layout.sweep(place, keep)


@contextlib.contextmanager
def _failing_clearly(place: Path) -> Iterator[None]:
    """Turns what the disk, or tensorstore, says into an `OSError` that names the path and what is left there."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            if multihost.is_primary_host(0):
                _tidy(place)
        whole = "The previous checkpoint there is whole." if (place / layout.POINTER).exists() else "Nothing was saved."
        text = f"{place}: the adapter could not be saved: {error}. {whole}"
        number = getattr(error, "errno", None)
        raise (OSError(number, text) if number else OSError(text)) from error


def _check_json(metadata: Mapping[str, Any]) -> None:
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be JSON (numbers, strings, lists, dicts with string keys): {error}.") from error


def restore(
    path: str | os.PathLike[str],
    *,
    frozen: Any = None,
    like: Any = None,
    sharding: Any = None,
    check_base: bool = True,
) -> Any:
    """Restores the `lora` tree that `save` wrote. All of it, bit for bit, or an error.

    Args:
        path: The directory.
        frozen: The base to put it on. It is checked against the fingerprint of the base that the adapter
            was trained on: structure, shapes, dtypes, and the content of the adapted weights. Shapes
            (`jax.ShapeDtypeStruct`) will do; then the content is not compared.
        like: A `lora` tree, or its shapes (`jax.eval_shape` of init), whose structure, boxes and
            `NamedSharding` the result takes. Without it the structure is that of ``frozen``, and
            without that nested dicts, with a number for the place in a list or tuple.
        sharding: A `jax.sharding.Sharding` for every array, or a tree of them like ``lora``. Without
            one, arrays are uncommitted: they follow the arrays that they meet.
        check_base: False accepts a base that differs from the fingerprint; the shapes must still fit.

    Returns:
        The `lora` tree. A 64-bit array stays a NumPy array where JAX has 64-bit types off.

    Raises:
        FileNotFoundError: There is no checkpoint, or a file of it is missing.
        ValueError: A file is damaged (which one is said); the base is another one (which path differs is
            said); ``like`` has other leaves.
    """
    place = layout.local(path)
    _settle()
    while True:
        record = read_record(place)
        try:
            return _restore(place, record, frozen, like, sharding, check_base)
        except (OSError, ValueError):
            if layout.current_folder(place) in (None, record.arrays):
                raise  # else a save has just replaced the checkpoint: read the new one


def read_record(path: str | os.PathLike[str]) -> Record:
    """All that ``adapter.json`` says, without reading an array."""
    place = layout.local(path)
    return Record.from_json(layout.read_pointer(place), place / layout.POINTER)


def _restore(place: Path, record: Record, frozen: Any, like: Any, sharding: Any, check_base: bool) -> Any:
    folder, expected = place / record.arrays, {name: array for name, (_, _, array) in record.stored.items()}
    layout.check_inventory(folder, record.files)
    _check_size(place, record)
    if like is not None:
        check_like(record, like, place)
    if frozen is not None:
        if check_base:
            _check_base(record, frozen, place)
        check_fits(record, frozen, place)
    arrays = store.read(folder, expected, _shardings(record, like, sharding))
    for name, value in digests(arrays).items():
        if value != expected[name].digest:
            raise ValueError(f"{folder}: {name} differs from what was saved ({value}, not {expected[name].digest}).")
    arrays = {name: _to_device(value) for name, value in arrays.items()}
    return build(record, arrays, like=like, frozen=frozen)


def _check_size(place: Path, record: Record) -> None:
    declared = sum(array.bytes for _, _, array in record.stored.values())
    stored = sum(file["bytes"] for file in record.files.values())
    if declared > 64 * stored + (1 << 30):  # zeros compress to nothing, so less would refuse a fresh adapter
        file = place / layout.POINTER
        raise ValueError(f"{file}: declares arrays of {declared:,} bytes, but their files hold {stored:,}. Refused.")


def _shardings(record: Record, like: Any, sharding: Any) -> dict[str, Any]:
    if isinstance(sharding, jax.sharding.Sharding):
        return dict.fromkeys(record.stored, sharding)
    tree, pick = (like, _own_sharding) if sharding is None else (sharding, lambda value: value)
    found = {} if tree is None else flatten(tree)
    chosen = {}
    for name, (path, field, _) in record.stored.items():
        value = found.get(path)
        chosen[name] = pick(unbox(getattr(value, field) if field and is_adapter(value) else value))
    return chosen


def _own_sharding(value: Any) -> Any:
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _to_device(value: Any) -> Any:
    wide = isinstance(value, np.ndarray) and jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype
    return value if wide else jnp.asarray(value)
