"""The directory that a subcommand makes."""

from __future__ import annotations

from pathlib import Path


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises `FileExistsError` where ``target`` exists and must not be replaced."""
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another directory, or pass --overwrite to replace it.")
