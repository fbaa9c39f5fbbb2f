"""Paths as a caller passes them, and errors of the operating system that name their file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def as_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` expanded.

    Raises:
        TypeError: It is something else: a tree that was meant for another argument, for one.

    >>> as_path("adapters/french").name
    'french'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; expected a directory, as a str or a pathlib.Path.")
    return Path(path).expanduser()


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds ``path`` to an `OSError` that names no file, such as that of a full disk.

    >>> with naming("model.safetensors"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    ...
    OSError: [Errno 28] No space left on device: 'model.safetensors'
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
