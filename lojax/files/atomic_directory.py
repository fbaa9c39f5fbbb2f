"""A directory that appears whole or not at all, and replaces another one in a single step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lojax.files.filesystem import lock_directory, sync_directory, sync_tree

_OLD = ".old"


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raises `FileExistsError` where ``target`` exists and must not be replaced."""
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another directory, or pass overwrite=True to replace it.")


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory beside ``target`` to write into; it takes the name ``target`` when all went well.

    Until then ``target`` is what it was, whatever stops the program, SIGKILL and a power cut included. The next call
    for the same target removes what was left over. A symbolic link stays one: what it points to is replaced.

    Raises:
        FileExistsError: ``target`` exists, and ``overwrite`` is False.
        OSError: The disk is full, or the directory cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     with atomic_directory(Path(root, "out")) as fresh:
    ...         _ = (fresh / "file").write_text("text")
    ...     [path.name for path in Path(root).rglob("*")]
    ['out', 'file']
    """
    refuse_existing(target, overwrite=overwrite)
    place = Path(os.path.realpath(target))
    with _name_in_errors(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(place)
        with _locked_fresh_directory(place) as fresh:
            try:
                yield fresh
                # Flushed before it gets its name: after a power cut the name must not stand for files without content.
                sync_tree(fresh)
                refuse_existing(target, overwrite=overwrite)
                _put(fresh, place)
            finally:
                _remove(fresh)  # it has the old content once it has changed places with ``place``


@contextlib.contextmanager
def _locked_fresh_directory(place: Path) -> Iterator[Path]:
    """A new directory beside ``place``. Its lock tells others that its program is alive."""
    with contextlib.ExitStack() as stack:
        while True:
            fresh = place.with_name(f".{place.name}.lojax-{secrets.token_hex(4)}")
            fresh.mkdir()
            try:
                stack.enter_context(lock_directory(fresh))
                break
            except FileNotFoundError:  # another program took it for a leftover, in the moment before it was locked
                continue
        yield fresh


def _put(fresh: Path, place: Path) -> None:
    if not place.exists():
        fresh.rename(place)
    elif not exchange(fresh, place):
        # Two renames. A program killed between them leaves no ``place``: `_clean_up` puts the old one back.
        old = fresh.with_name(fresh.name + _OLD)
        place.rename(old)
        fresh.rename(place)
        _remove(old)
    sync_directory(place.parent)


def exchange(left: Path, right: Path) -> bool:
    """Swaps two names in one step. False where the system or the file system cannot.

    POSIX has no call that replaces a directory with content; Linux and macOS each have one of their own.
    """
    names = os.fsencode(left), os.fsencode(right)
    if sys.platform == "linux":
        at_working_directory, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of fcntl.h and stdio.h
        function = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28, musl 1.2.6
        arguments = (at_working_directory, names[0], at_working_directory, names[1], swap)
    elif sys.platform == "darwin":
        function, arguments = getattr(ctypes.CDLL(None), "renamex_np", None), (*names, 2)  # RENAME_SWAP
    else:
        return False
    return function is not None and function(*arguments) == 0


def _clean_up(place: Path) -> None:
    """Removes what programs that were killed left beside ``place``, and finishes the replacing of ``place`` itself."""
    prefix = f".{place.name}.lojax-"
    for name in sorted(os.listdir(place.parent)):
        leftover = place.with_name(name)
        if not name.startswith(prefix):
            continue
        if name.endswith(_OLD):
            if place.exists() and not leftover.with_suffix("").exists():
                _remove(leftover)
            continue
        with contextlib.suppress(OSError), lock_directory(leftover, timeout=0) as is_locked:
            if is_locked:  # else its program lives, or nobody knows
                old = leftover.with_name(name + _OLD)
                if old.exists() and not place.exists():
                    old.rename(place)
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _name_in_errors(target: Path) -> Iterator[None]:
    """Adds the path to an error of the system that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        state = "What was there is unchanged." if target.exists() else "Nothing was written."
        raise OSError(error.errno, f"{target} could not be written: {error.strerror}. {state}") from error
