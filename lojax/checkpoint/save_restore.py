"""`save` and `restore`: one adapter, or a bank of them, whole, named and checked, in a directory of its own.

That is what outlives a run. While a run goes on, a training loop wants more: the optimizer's state,
the step, the random key, several generations. `lora` is an ordinary pytree, so orbax's own
`CheckpointManager` takes it as it is, with keep-last, keep-best, asynchronous saves and preemption::

    state = {"lora": lora, "opt_state": opt_state, "loop": {"step": step, "rng": jax.random.key_data(key)}}
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
        parts = {name: ocp.args.StandardSave(part) for name, part in state.items()}
        manager.save(step, args=ocp.args.Composite(**parts))

and gives the adapter back alone, on any mesh, without reading the rest::

    shapes = jax.eval_shape(model.init, key, params, *example)[1]
    restored = manager.restore(step, args=ocp.args.Composite(lora=ocp.args.StandardRestore(shapes)))
    lojax.save("adapter", restored["lora"], frozen=frozen)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from lojax.adapters.adapter import is_adapter
from lojax.adapters.bank import Bank, is_bank
from lojax.adapters.bank_shapes import entry_shapes
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.checkpoint import adapter_directory as files
from lojax.checkpoint import fingerprint
from lojax.checkpoint.arrays import named_sharding, read, start_write, to_device
from lojax.checkpoint.bank_entries import join_entries, none_at, place_bank
from lojax.checkpoint.bank_manifest import (
    BankManifest,
    StoredEntry,
    add_hashes,
    entry_directory,
    read_bank_manifest,
)
from lojax.checkpoint.codec import build_tree, check_like
from lojax.checkpoint.draft import Part, draft, finish
from lojax.checkpoint.manifest import Manifest
from lojax.files.filesystem import lock_directory, parse_json
from lojax.text import check_flags
from lojax.types import ArrayLike, Params

_log = logging.getLogger(__name__)
_pending: weakref.WeakValueDictionary[Path, concurrent.futures.Future[None]] = weakref.WeakValueDictionary()
"""The last save in the background by directory: the next `save` or `restore` there waits for it."""


def save(
    path: str | os.PathLike[str],
    lora: Params | Bank,
    *,
    frozen: Params | None = None,
    start: Params | Bank | None = None,
    overwrite: bool = True,
    metadata: Mapping[str, Any] | None = None,
    wait: bool = True,
) -> concurrent.futures.Future[None]:
    """Saves an adapter: its arrays through orbax, and all that the maths needs in ``adapter.json``.

    A `lojax.Bank` becomes one such checkpoint for each of its adapters, in one directory: `restore` gives the bank
    back, or one adapter of it without reading the others.

    An interruption at any point, SIGKILL and power cut included, leaves the previous checkpoint whole
    (see `lojax.checkpoint.adapter_directory` for how, and for how to read the arrays without lojax). Programs and
    threads that save to one path take turns. With several processes of one JAX program, each calls this with the same
    arguments and a path that all of them share.

    Args:
        path: A directory, made if need be. One adapter or bank each: ``base/adapters/french``.
        lora: The trained tree, or a bank. Boxes are saved with it; arrays may have any sharding.
        frozen: The frozen tree. With it the checkpoint holds a fingerprint of the base, by which
            `restore` refuses to put the adapter on another one. Content is read once per array.
        start: The `lora` tree as init returned it, where the start of an adapter was taken out of its weight (PiSSA,
            OLoRA, MiLoRA, LoftQ, LoRA-GA). Such an adapter belongs to the moved weight; with ``start``, what is saved
            is the difference from it, an adapter of twice the rank for the pretrained weight. Its content, which
            ``frozen`` does not hold, is then left out of the fingerprint. For a bank: a bank, or one tree from which
            all of its adapters started.
        overwrite: Replace an adapter that is already at ``path``, or a bank by a bank.
        metadata: Anything that JSON can hold: the step, the data, a score. `read_metadata` gives it back.
        wait: False returns once ``lora`` is copied, and writes in the background. The next save to ``path`` waits
            for it. So must the program before it ends: call ``result()``, or this save is lost.

    Returns:
        A future that is done when the checkpoint is complete; its ``result()`` raises what went wrong.

    Raises:
        FileExistsError: ``overwrite=False`` and there is an adapter at ``path``; or there is a bank in the place of an
            adapter, or the reverse.
        OSError: The disk is full, or ``path`` cannot be written. The previous checkpoint is whole.
        TimeoutError: Another program has been saving to ``path`` for ten minutes; the message says which.
        TypeError: A leaf is not an array; ``metadata`` is not a dict that JSON can hold; ``lora`` is a pair of trees.
        ValueError: ``frozen`` and ``lora`` do not fit together; ``lora`` is empty, or holds no adapter and there is no
            ``frozen`` to show that it is not the base itself; the padding of a bank is not zero.

    >>> import tempfile, lojax
    >>> frozen, lora = lojax.init(jax.random.key(0), {"kernel": jax.numpy.ones((4, 3))}, "kernel", rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = lojax.save(folder, lora, frozen=frozen, metadata={"step": 100})
    ...     lojax.restore(folder, frozen=frozen)["kernel"].scale
    1.0
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = lojax.save(folder, lojax.stack([lora, lora], names=["french", "german"]), frozen=frozen)
    ...     len(lojax.restore(folder)), lojax.restore(folder, entry="german")["kernel"].rank
    (2, 2)
    """
    directory = files.as_local_path(path)
    check_flags(overwrite=overwrite, wait=wait)
    metadata = _check_json({} if metadata is None else metadata)
    # Whatever can be refused is refused before a byte is written.
    drafts = draft(lora, frozen, start)
    _wait_for_pending(directory)
    _check_overwrite(directory, overwrite, is_bank(lora))
    # Copies, taken before this returns: the caller may donate or update its arrays while the disk is written.
    parts = finish(drafts, lora, frozen, metadata)
    bank = None
    if isinstance(lora, Bank):
        names = lora.names or [None] * len(lora)
        entries = (StoredEntry(part.folder, "", name) for part, name in zip(parts, names, strict=True))
        bank = BankManifest(metadata=metadata, entries=tuple(entries), folder="")
    steps = _write(directory, parts, bank, overwrite)
    if wait or jax.process_count() > 1:  # JAX's barriers between devices belong to the main thread
        next(steps)
    if wait:
        _run(steps)
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return done
    executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lojax-save")
    _pending[directory] = future = executor.submit(_run_and_log, steps)
    executor.shutdown(wait=False)  # the thread ends with its only task
    return future


def _wait_for_pending(directory: Path) -> None:
    if (future := _pending.get(directory)) is not None:
        concurrent.futures.wait([future])


def _run(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


def _run_and_log(steps: Iterator[None]) -> None:
    """Runs a save in the background; also logs what went wrong, in case nobody asks for the result."""
    try:
        _run(steps)
    except BaseException:
        _log.exception("Saving in the background failed.")
        raise


def _write(directory: Path, parts: Sequence[Part], bank: BankManifest | None, overwrite: bool) -> Iterator[None]:
    """Writes the arrays, then makes them the checkpoint. What comes after the yield may run in another thread."""
    with _explain_errors(directory), contextlib.ExitStack() as stack:
        number = _claim_number(directory, overwrite, None if bank is None else bank.entries, stack)
        if bank is None:
            folders = [directory / f"arrays-{number}"]
        else:
            # Each with another number: orbax names its barriers between processes by the name of the folder.
            folder = directory / f"bank-{number}"
            folders = [folder / part.folder / f"arrays-{i}" for i, part in enumerate(parts, 1)]
        # All writers at once: most of the time goes into waiting for the disk. None is left behind where one fails.
        with contextlib.ExitStack() as writers:
            for folder, part in zip(folders, parts, strict=True):
                writers.callback(start_write(folder, part.arrays))
            yield
            writers = writers.pop_all()
        try:
            writers.close()  # waits for all
            # The manifest comes last and names these arrays. Until it is there, the old one names the old arrays.
            if multihost.is_primary_host(0):
                for folder, part in zip(folders, parts, strict=True):
                    inventory = files.take_inventory(folder)
                    manifest = dataclasses.replace(part.manifest, arrays=folder.name, files=inventory)
                    files.commit(folder.parent, manifest.to_json())
                if bank is not None:
                    bank = dataclasses.replace(bank, folder=f"bank-{number}")
                    files.commit(directory, add_hashes(bank, directory).to_json(), files.BANK)
        finally:
            if jax.process_count() > 1:  # nobody goes on before the checkpoint is there, or has failed
                multihost.get_barrier_sync_fn()(key=f"lojax-save-{folders[0]}", timeout_ms=600_000)


def _claim_number(
    directory: Path, overwrite: bool, entries: Sequence[StoredEntry] | None, stack: contextlib.ExitStack
) -> int:
    """Makes the directory, and those of the ``entries`` of a bank, and locks it until ``stack`` is closed.

    Returns:
        A number for new arrays, the same on every process.
    """
    number, failure = -1, None
    if multihost.is_primary_host(0):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_directory(directory))
            _check_overwrite(directory, overwrite, entries is not None)  # again: there may have been another save
            new = files.next_number(directory)
            files.remove_leftovers(directory)
            stack.callback(files.remove_leftovers, directory)
            for entry in entries or ():  # orbax makes the folder of the arrays, but not those above it
                (directory / f"bank-{new}" / entry.folder).mkdir(parents=True)
            number = new
        except OSError as error:  # the other processes wait for a number, so they are told before this one raises
            failure = error
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if number < 0:
        raise failure or OSError("the first process could not make the directory")
    return number


def _check_overwrite(directory: Path, overwrite: bool, is_bank: bool) -> None:
    here, other = (files.BANK, files.MANIFEST) if is_bank else (files.MANIFEST, files.BANK)
    # One rename cannot replace the one by the other: for a moment there would be both, or none.
    if (directory / other).exists():
        kinds = ("an adapter", "a bank") if is_bank else ("a bank", "an adapter")
        raise FileExistsError(
            f"{directory}: holds {kinds[0]}, which {kinds[1]} does not replace. Choose another path, or remove it."
        )
    if not overwrite and (directory / here).exists():
        raise FileExistsError(
            f"{directory}: holds {'a bank' if is_bank else 'an adapter'}. Pass overwrite=True to replace it, or choose "
            "another path."
        )


@contextlib.contextmanager
def _explain_errors(directory: Path) -> Iterator[None]:
    """Turns what the disk, or tensorstore, says into an `OSError` that names the path and what is left there."""
    try:
        yield
    except Exception as error:
        is_whole = any((directory / name).exists() for name in (files.MANIFEST, files.BANK))
        state = "The previous checkpoint there is whole." if is_whole else "Nothing was saved."
        text = f"{directory}: the adapter could not be saved: {error}. {state}"
        number = getattr(error, "errno", None)
        kind = type(error) if isinstance(error, (FileExistsError, TimeoutError)) else OSError
        raise (OSError(number, text) if number else kind(text)) from error


def _check_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        kind = type(metadata).__name__
        raise TypeError(f'metadata is a {kind}; expected a dict that JSON can hold, such as {{"step": 100}}.')
    metadata = dict(metadata)
    try:
        parse_json(json.dumps(metadata, allow_nan=False).encode())  # also what `restore` refuses, such as 1 beside "1"
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be JSON (numbers, strings, lists, dicts with string keys): {error}.") from error
    return metadata


def restore(
    path: str | os.PathLike[str],
    *,
    entry: int | str | None = None,
    frozen: Params | None = None,
    like: Params | Bank | None = None,
    sharding: Any = None,
    check_base: bool = True,
) -> Params | Bank:
    """Restores the `lora` tree, or the `lojax.Bank`, that `save` wrote. All of it, bit for bit, or an error.

    Args:
        path: The directory.
        entry: The number or name of one adapter of a bank. The others are not read. None for what `save` was given.
        frozen: The base to put it on. It is checked against the fingerprint of the base that the adapter
            was trained on: structure, shapes, dtypes, and the content of the adapted weights. Shapes
            (`jax.ShapeDtypeStruct`) will do; then the content is not compared.
        like: A `lora` tree or a bank, or its shapes (`jax.eval_shape` of init), whose structure, boxes and
            `NamedSharding` the result takes. Without it the structure is that of ``frozen``, and
            without that nested dicts, with a number for the place in a list or tuple.
        sharding: A `jax.sharding.Sharding` for every array, or a tree of them like ``lora``. Without
            one, arrays are uncommitted: they follow the arrays that they meet.
        check_base: False accepts a base that differs from the fingerprint; the shapes must still fit.

    Returns:
        The `lora` tree or the bank. A 64-bit array stays a NumPy array where JAX has 64-bit types off.

    Raises:
        FileNotFoundError: There is no checkpoint, or a file of it is missing.
        KeyError: The bank has no adapter of the name ``entry``.
        IndexError: The bank has no adapter of the number ``entry``.
        ValueError: A file is damaged (the message says which); the base is another one (it says which path
            differs); ``like`` has other leaves, or is a bank where one adapter is stored, or the reverse.
    """
    directory = files.as_local_path(path)
    check_flags(check_base=check_base)
    _wait_for_pending(directory)
    while True:  # once, unless a save replaces the checkpoint meanwhile
        stamp = files.stamp(directory)
        try:
            if files.holds_bank(directory):
                lora = _restore_bank(directory, entry, frozen, like, sharding, check_base)
            else:
                manifest = read_manifest(directory)
                _check_single(directory, entry, like)
                lora = _restore(directory, manifest, frozen, like, sharding, check_base)
        except Exception:  # where files vanish beneath it, orbax raises a TypeError as well as an OSError
            if files.stamp(directory) == stamp:
                raise
            continue
        if files.stamp(directory) == stamp:
            return lora
        # Else a save replaced the checkpoint and removed these arrays meanwhile: read the new one.


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save` was given, without reading an array.

    Args:
        path: The directory.

    Returns:
        What was passed as ``metadata``, as JSON holds it: a tuple is a list.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: Its ``adapter.json``, or the ``bank.json`` of a bank, is damaged.

    >>> import tempfile, lojax
    >>> frozen, lora = lojax.init(jax.random.key(0), {"kernel": jax.numpy.ones((4, 3))}, "kernel", rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = lojax.save(folder, lora, metadata={"step": 100})
    ...     lojax.read_metadata(folder)
    {'step': 100}
    """
    directory = files.as_local_path(path)
    _wait_for_pending(directory)
    read = read_bank_manifest if files.holds_bank(directory) else read_manifest
    return dict(read(directory).metadata)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """All that ``adapter.json`` says, without reading an array."""
    directory = files.as_local_path(path)
    return Manifest.from_json(files.read_json(directory), directory / files.MANIFEST)


def _check_single(directory: Path, entry: int | str | None, like: Params | Bank | None) -> None:
    if entry is not None:
        raise ValueError(f"{directory}: holds one adapter, and entry={entry!r} is for a bank. Leave entry out.")
    if is_bank(like):
        raise ValueError(f"{directory}: holds one adapter, and like is a bank. Pass one adapter of it, as like[0].")


def _restore(
    directory: Path, manifest: Manifest, frozen: Params, like: Params, sharding: Any, check_base: bool
) -> Params:
    arrays = _read_arrays(directory, manifest, frozen, like, sharding, check_base)
    return build_tree(manifest, {name: to_device(x) for name, x in arrays.items()}, like=like, frozen=frozen)


def _restore_bank(
    directory: Path, entry: int | str | None, frozen: Params, like: Any, sharding: Any, check_base: bool
) -> Params | Bank:
    bank = read_bank_manifest(directory)
    if entry is not None:
        if is_bank(like):
            raise ValueError(f"like is a bank, and entry={entry!r} one adapter. Pass one of it, as like[0].")
        folder = entry_directory(directory, bank, bank.index(entry))
        return _restore(folder, read_manifest(folder), frozen, like, sharding, check_base)
    if like is not None and not is_bank(like):
        raise ValueError(
            f"{directory}: holds a bank of {len(bank.entries)} adapters, and like is one. Pick one with entry=, or "
            "pass a bank."
        )
    if like is not None and len(like) != len(bank.entries):
        raise ValueError(f"{directory}: holds a bank of {len(bank.entries)} adapters, and like one of {len(like)}.")
    shapes = [None] * len(bank.entries) if like is None else entry_shapes(like)
    # Digests of the base: a weight that several adapters adapt is read once.
    known: dict[str, str] = {}
    entries = []
    for i, shape in enumerate(shapes):
        folder = entry_directory(directory, bank, i)
        manifest = read_manifest(folder)
        base = frozen if frozen is None else none_at(frozen, manifest.full)
        arrays = _read_arrays(folder, manifest, base, shape, None, check_base, known)
        entries.append(build_tree(manifest, arrays, like=shape, frozen=base))
    return place_bank(join_entries(entries, bank.names, like, directory), like, sharding)


def _read_arrays(
    directory: Path,
    manifest: Manifest,
    frozen: Params,
    like: Params,
    sharding: Any,
    check_base: bool,
    known: dict[str, str] | None = None,
) -> dict[str, ArrayLike]:
    """The arrays of an adapter by name, with everything checked that can be before they are read."""
    folder = directory / manifest.arrays
    files.check_inventory(folder, manifest.files)
    _check_size(directory, manifest)
    if like is not None:
        check_like(manifest, like, directory)
    if frozen is not None:
        if check_base:
            fingerprint.check_base(manifest, frozen, directory, known)
        fingerprint.check_fits(manifest, frozen, directory)
    expected = {name: array for name, (_, _, array) in manifest.stored.items()}
    return read(folder, expected, _choose_shardings(manifest, like, sharding))


def _check_size(directory: Path, manifest: Manifest) -> None:
    declared = sum(array.bytes for _, _, array in manifest.stored.values())
    stored = sum(file.bytes for file in manifest.files.values())
    if declared > 64 * stored + (1 << 30):  # zeros compress to nothing, so less would refuse a fresh adapter
        file = directory / files.MANIFEST
        raise ValueError(f"{file}: declares arrays of {declared:,} bytes, but their files hold {stored:,}. Refused.")


def _choose_shardings(manifest: Manifest, like: Params, sharding: Any) -> dict[str, jax.sharding.Sharding | None]:
    if isinstance(sharding, jax.sharding.Sharding):
        return dict.fromkeys(manifest.stored, sharding)
    leaves = flatten(like if sharding is None else sharding)
    choices = {}
    for name, (path, field, _) in manifest.stored.items():
        leaf = leaves.get(path)
        value = unbox(getattr(leaf, field) if field and is_adapter(leaf) else leaf)
        choices[name] = named_sharding(value) if sharding is None else value
    return choices
