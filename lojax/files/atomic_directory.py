"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raises `FileExistsError` where ``target`` exists and must not be replaced."""
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another directory, or pass overwrite=True to replace it.")


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory beside ``target`` to write into; it takes the name ``target`` when all went well.

    Raises:
        FileExistsError: ``target`` exists, and ``overwrite`` is False.

    >>> with tempfile.TemporaryDirectory() as root:
    ...     with atomic_directory(Path(root, "out")) as fresh:
    ...         _ = (fresh / "file").write_text("text")
    ...     [path.name for path in Path(root).rglob("*")]
    ['out', 'file']
    """
    refuse_existing(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = fresh.with_name(fresh.name + ".old")
    try:
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o777 & ~mask)
        yield fresh
        refuse_existing(target, overwrite=overwrite)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
