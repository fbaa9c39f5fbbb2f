"""What a checkpoint asks of a file system: content hashed and flushed, directories locked, JSON that is strict."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lojax.text import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_DIGITS = 40
"""The most digits of an integer in JSON; in a real file they have at most 20."""

_BUSY_LIMIT = 600.0


def hash_file(file: Path, start: int = 0, algorithm: Callable[[], Any] | None = None) -> str:
    """The hash of a file from byte ``start`` on: BLAKE2b of 128 bits, which ``b2sum -l 128`` prints, or another."""
    with open(file, "rb") as stream:
        stream.seek(start)
        return hashlib.file_digest(stream, algorithm or new_hash).hexdigest()


def new_hash(data: bytes = b"") -> hashlib.blake2b:
    """A hash of ``data``, of the kind that `hash_file` computes. It can be updated.

    >>> new_hash(b"adapter").hexdigest()
    'f6c34bbe94a1b7ce392dc1883d001673'
    """
    return hashlib.blake2b(data, digest_size=16)


def sync_tree(directory: Path) -> None:
    """Flushes all files in a directory to disk, and their names, so that they survive a power cut."""
    for parent, _, names in os.walk(directory):
        for name in names:
            with open(Path(parent, name), "rb") as stream:
                os.fsync(stream.fileno())
        sync_directory(parent)


def sync_directory(directory: str | Path) -> None:
    """Flushes the names in a directory to disk, so that a file made or renamed in it survives a power cut."""
    if os.name == "nt":
        return  # Windows cannot open a directory
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_directory(directory: Path, *, timeout: float | None = None) -> Iterator[bool]:
    """Locks a directory: at most one thread, of this process or another, is inside at a time.

    The lock is `flock` on the directory itself. So it leaves no file behind, and the system releases it when its
    holder dies, even by SIGKILL. It says nothing to programs that do not ask for it.

    Args:
        directory: An existing directory.
        timeout: Seconds to wait for another holder; the default is ten minutes.

    Yields:
        Whether there is a lock. There is none on Windows and on file systems that do not offer it.

    Raises:
        FileNotFoundError: The directory does not exist, or was removed in the meantime.
        TimeoutError: Another one still holds the lock; the message says which process.
    """
    descriptor = _lock(directory, _BUSY_LIMIT if timeout is None else timeout) if fcntl else None
    if fcntl is None or descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile holds a copy
        os.close(descriptor)


def _lock(directory: Path, timeout: float) -> int | None:
    """The descriptor of the locked directory; None where there are no locks."""
    assert fcntl is not None
    start, pause = time.monotonic(), 0.001
    while True:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return descriptor
            # Else the directory was replaced before we had its lock: the lock is that of the old one.
        except BlockingIOError:
            if time.monotonic() - start > timeout:
                holder = _lock_holder(descriptor)
                os.close(descriptor)
                raise TimeoutError(
                    f"{holder} has been writing to {directory} for {timeout:g} seconds. Wait until it is done, "
                    "end it, or choose another path"
                ) from None
        except FileNotFoundError:
            os.close(descriptor)
            raise
        except OSError:  # EBADF on NFS, whose locks need a file open for writing; ENOTSUP and ENOLCK elsewhere
            os.close(descriptor)
            return None
        os.close(descriptor)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _lock_holder(descriptor: int) -> str:
    """The holder of the lock of an open directory, as far as Linux tells."""
    inode = os.fstat(descriptor).st_ino
    with contextlib.suppress(OSError):
        if match := re.search(rf"FLOCK +ADVISORY +WRITE (\d+) \S+:{inode} ", Path("/proc/locks").read_text()):
            return "another thread of this process" if int(match[1]) == os.getpid() else f"process {match[1]}"
    return "another process"


def parse_json(text: bytes) -> Any:
    """Parses JSON, and refuses what programs read differently: a name that occurs twice, NaN and infinity.

    Raises:
        ValueError: The text is not JSON, or is refused.

    >>> parse_json(b'{"r": 8, "r": 16}')
    Traceback (most recent call last):
    ...
    ValueError: the name 'r' occurs twice
    """
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_unique_names,
            parse_constant=_refuse_constant,
            parse_int=_parse_short_integer,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the name {printable(repr(name))} occurs twice")
        fields[name] = value
    return fields


def _parse_short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # thousands of digits take quadratic time to multiply, and Python refuses 4,300
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")
