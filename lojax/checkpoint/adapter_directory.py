"""The files of an adapter checkpoint, and why no interruption can damage one.

Layout, version 1::

    PATH/
      adapter.json       the checkpoint: what the arrays mean, and the size and BLAKE2b of every file below
      arrays-7/          an orbax PyTree checkpoint: a flat dict {"params/layer_0/query/kernel/a": array}

``arrays-7`` is written once, under a number never used before at this path, and never changed. A save
becomes the checkpoint in one atomic step, the rename of a finished ``adapter.json`` over the old one;
until then the old file still names the old arrays, which are removed only afterwards. So whenever the
machine stops, ``adapter.json`` is whole, and so is what it names; anything else is litter of an
unfinished save, never read and swept up by the next one. Everything is fsynced before the rename, so
that this also holds for a power cut.

Why not overwrite one orbax directory in place: orbax removes the old directory before it renames the
new one, and a process killed between the two leaves nothing.

To read the arrays without lojax::

    folder = json.load(open("PATH/adapter.json"))["arrays"]
    orbax.checkpoint.PyTreeCheckpointer().restore(f"PATH/{folder}")

One process (group) may write to a path at a time; any number may read, also while a save goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POINTER = "adapter.json"
_FOLDER = re.compile(r"arrays-(\d{1,18})")
_LITTER = re.compile(r"arrays-\d{1,18}(\.orbax-checkpoint-tmp.*)?|adapter\.json\.tmp")
_POINTER_LIMIT = 256 << 20  # bytes


def local(path: str | os.PathLike[str]) -> Path:
    """``path`` as an absolute local path. Bucket URLs are refused: they have no atomic rename."""
    spelled = os.fspath(path)
    if "://" in spelled:
        raise ValueError(f"{spelled}: an adapter is saved to a file system. Save to a local path, then copy it there.")
    return Path(os.path.abspath(spelled))


def next_number(path: Path) -> int:
    """A number for new arrays, higher than any at ``path``, finished or not."""
    numbers = [int(match[1]) for name in os.listdir(path) if (match := _FOLDER.match(name))]
    return max(numbers, default=0) + 1


def folder_name(number: int) -> str:
    """The name of the folder of arrays with this number."""
    return f"arrays-{number}"


def sweep(path: Path, keep: str | None) -> None:
    """Removes arrays that ``adapter.json`` does not name, and unfinished files. Never raises."""
    for entry in list(os.scandir(path)):
        if entry.name == keep or not _LITTER.fullmatch(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != POINTER:
            Path(entry.path).unlink(missing_ok=True)


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and BLAKE2b (128 bits, ``b2sum -l 128``) of every file in ``folder``, each flushed to disk."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            found[file.relative_to(folder).as_posix()] = _stamp(file, flush=True)
        _flush(parent)
    _flush(folder.parent)
    return dict(sorted(found.items()))


def check_inventory(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises unless every file in ``files`` is in ``folder``, with the recorded size and content."""
    for name, expected in files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise FileNotFoundError(f"{file}: missing from the checkpoint. {_AGAIN}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{file}: {size} bytes, expected {expected['bytes']}: cut short or overwritten. {_AGAIN}")
        if _stamp(file)["blake2b"] != expected["blake2b"]:
            raise ValueError(f"{file}: the content differs from what was saved (BLAKE2b). {_AGAIN}")


_AGAIN = "Nothing was loaded. Copy the checkpoint again from its source, or restore another one."


def _stamp(file: Path, flush: bool = False) -> dict[str, Any]:
    with open(file, "rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        value = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"bytes": stream.tell(), "blake2b": value}


def _flush(folder: str | Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a directory
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_pointer(path: Path, record: Mapping[str, Any]) -> None:
    """Makes ``record`` the checkpoint at ``path``, in one atomic step.

    A checksum of the rest is added, so that a byte that flips in the file itself is found.
    """
    file = path / f"{POINTER}.tmp"
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(spell({**record, "checksum": _checksum(record)}))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(file, path / POINTER)
    _flush(path)
    _flush(path.parent)


def read_pointer(path: Path) -> dict[str, Any]:
    """What `write_pointer` wrote.

    Raises:
        FileNotFoundError: There is no ``adapter.json``.
        ValueError: It is no JSON, or not as it was written.
    """
    file = path / POINTER
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found, so {path} holds no adapter checkpoint.{_instead(path)}")
    if file.stat().st_size > _POINTER_LIMIT:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; no adapter.json is longer than {_POINTER_LIMIT}.")
    try:
        record = json.loads(file.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}). {_AGAIN}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}: holds a JSON {type(record).__name__}, expected an object. {_AGAIN}")
    if record.get("checksum") != _checksum(record):
        raise ValueError(f"{file}: the content differs from what was saved (checksum). {_AGAIN}")
    return record


def current_folder(path: Path) -> str | None:
    """The folder that ``adapter.json`` names; None where there is no readable checkpoint."""
    try:
        return read_pointer(path).get("arrays")
    except (OSError, ValueError):
        return None


def _instead(path: Path) -> str:
    if not path.is_dir():
        return ""
    near = sorted(file.parent for file in path.glob(f"*/{POINTER}"))[:5]
    litter = any(_LITTER.fullmatch(name) for name in os.listdir(path))
    text = " It holds an unfinished save." if litter else ""
    return text + (f" Did you mean one of: {', '.join(map(str, near))}?" if near else "")


def _checksum(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def spell(value: Any, depth: int = 0) -> str:
    """JSON for people: one line for each parameter, file and setting."""
    if depth == 2 or not isinstance(value, (dict, list, tuple)) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    pad, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        lines = (f"{json.dumps(name, ensure_ascii=False)}: {spell(entry, depth + 1)}" for name, entry in value.items())
        return "{" + pad + f",{pad}".join(lines) + end + "}"
    return "[" + pad + f",{pad}".join(spell(entry, depth + 1) for entry in value) + end + "]"
