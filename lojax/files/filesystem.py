"""What a checkpoint asks of a file system: content flushed and hashed, directories locked, JSON that is strict."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lojax.text import printable

MAX_DIGITS = 40
"""Of an integer in JSON; those of a real file have 20 at most."""


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


def sync_directory(directory: str | Path) -> None:
    """Flushes the entries of a directory to disk, so that a file made or renamed in it survives a power cut."""
    if os.name == "nt":
        return  # Windows cannot open a directory
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: bytes) -> Any:
    """Parses JSON, and refuses what a program can misread: a name that occurs twice, NaN and infinity.

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
