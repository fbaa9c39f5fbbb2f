"""Paths on the command line: what ``~`` means, and which directory may be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path


def user_path(text: str) -> Path:
    """A path, with ``~`` for the home of the user where the shell left it."""
    return Path(text).expanduser()


def check_target(
    target: Path, inputs: Iterable[Path], *, overwrite: bool, foreign: Callable[[Path], str | None]
) -> None:
    """Checks the directory that a subcommand makes.

    Args:
        target: The directory.
        inputs: What the subcommand reads.
        overwrite: Whether the user allows to replace it.
        foreign: The name of something in a directory that lojax did not write there, if there is any.

    Raises:
        ValueError: ``target`` is an input, or holds one.
        FileExistsError: ``target`` exists, and must not be replaced.
    """
    if not target.exists():
        return
    for source in inputs:
        real = source.resolve()
        # by identity and not by name: links and mounts give one directory several names
        if any(place.exists() and place.samefile(target) for place in (real, *real.parents)):
            raise ValueError(f"{target} is or holds {source}, which is an input. Choose another directory.")
    if not overwrite:
        raise FileExistsError(f"{target} exists. Choose another directory, or pass --overwrite to replace it.")
    name = foreign(target) if target.is_dir() else target.name
    if name is not None:
        raise FileExistsError(
            f"{target} holds {name}, which lojax did not write, and --overwrite replaces only what it wrote. Remove it "
            "yourself, or choose another directory."
        )
