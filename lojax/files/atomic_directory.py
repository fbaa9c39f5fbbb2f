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
from lojax.files.naming import naming

_NEW, _OLD = "new", "old"


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
    place = Path(os.path.realpath(target))
    with naming(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(place)
        refuse_existing(target, overwrite=overwrite)
        with _staging_directory(place) as staging:
            fresh = staging / _NEW
            fresh.mkdir()
            yield fresh
            # Flushed before it gets its name: after a power cut the name must not stand for files without content.
            sync_tree(fresh)
            refuse_existing(target, overwrite=overwrite)
            if not place.exists():
                fresh.rename(place)
            elif not exchange(fresh, place):
                # Two renames. A program stopped between them leaves no ``place``: `_dispose` puts the old one back.
                place.rename(staging / _OLD)
                fresh.rename(place)
            sync_directory(place.parent)


@contextlib.contextmanager
def _staging_directory(place: Path) -> Iterator[Path]:
    """A hidden directory beside ``place``, removed at the end. Its lock tells others that its program is alive."""
    with contextlib.ExitStack() as stack:
        while True:
            staging = place.with_name(f".{place.name}.lojax-{secrets.token_hex(4)}")
            staging.mkdir()
            try:
                stack.enter_context(lock_directory(staging))
                break
            except FileNotFoundError:  # another program took it for a leftover, in the moment before it was locked
                continue
        stack.callback(_dispose, staging, place)
        yield staging


def _dispose(staging: Path, place: Path) -> None:
    """Removes a staging directory, but for the old content of ``place`` where nothing has taken that name."""
    if (staging / _OLD).exists() and not place.exists():
        (staging / _OLD).rename(place)
    shutil.rmtree(staging, ignore_errors=True)


def _clean_up(place: Path) -> None:
    """Disposes of what killed programs left beside ``place``."""
    for name in os.listdir(place.parent):
        if name.startswith(f".{place.name}.lojax-"):
            staging = place.with_name(name)
            with contextlib.suppress(OSError), lock_directory(staging, timeout=0) as is_locked:
                if is_locked:  # else its program is alive, or nobody can tell
                    _dispose(staging, place)


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
