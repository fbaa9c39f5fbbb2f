"""Errors of the operating system that name their file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], *, written_as: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Adds ``path`` to an `OSError` that names no file, such as that of a full disk.

    ``written_as``: the temporary name of the file, which is replaced by ``path`` in errors.

    >>> with naming("model.safetensors"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    ...
    OSError: [Errno 28] No space left on device: 'model.safetensors'
    """
    try:
        yield
    except OSError as error:
        names_another = error.filename is not None and error.filename != os.fspath(written_as or "")
        if names_another or error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
