"""The files of an adapter checkpoint, and why no interruption can damage one.

Layout, version 2::

    PATH/
      adapter.json       the manifest: what the arrays mean, and the size and BLAKE2b of every file below
      arrays-7/          an orbax PyTree checkpoint: a flat dict {"params/layer_0/query/kernel/a": array}

``arrays-7`` is written once, under a number never used before at this path, and never changed. A save
becomes the checkpoint in one atomic step, the rename of a finished ``adapter.json`` over the old one;
until then the old file still names the old arrays, which are removed only afterwards. So whenever the
machine stops, ``adapter.json`` is whole, and so is what it names. Anything else is left over from an
unfinished save: it is never read, and the next save removes it. Everything is fsynced before the rename,
so this also holds for a power cut.

Why not overwrite one orbax directory in place: orbax removes the old directory before it renames the
new one, and a process killed between the two leaves nothing.

To read the arrays without lojax::

    folder = json.load(open("PATH/adapter.json"))["arrays"]
    orbax.checkpoint.PyTreeCheckpointer().restore(f"PATH/{folder}")

Programs that save to one path take turns (see `lojax.files.filesystem.lock_directory`), where the file system has
locks; any number may read, also during a save.
Version 1 differs in one entry: each array has a ``digest``, which is no longer read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lojax.checkpoint.manifest import StoredFile
from lojax.files.filesystem import hash_file, new_hash, parse_json, sync_directory, sync_tree
from lojax.files.naming import as_path

MANIFEST = "adapter.json"
_FOLDER = re.compile(r"arrays-(\d{1,18})")
_LEFTOVER = re.compile(r"arrays-\d{1,18}(\.orbax-checkpoint-tmp.*)?|adapter\.json\.tmp")
_MANIFEST_LIMIT = 256 << 20  # bytes; a million parameters take about 200 each
_REMEDY = "Nothing was loaded. Copy the checkpoint again from its source, or restore another one."


def as_local_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as an absolute local path. Bucket URLs are refused: they have no atomic rename."""
    directory = as_path(path)
    if "://" in (text := os.fspath(path)):
        raise ValueError(f"{text}: an adapter is saved to a file system. Save to a local path, then copy it there.")
    return Path(os.path.abspath(directory))


def next_number(directory: Path) -> int:
    """A number for a folder of new arrays, above that of any in ``directory``, finished or not."""
    # Also above an unfinished one: a saver that was killed may have left files that orbax would mistake for its own.
    numbers = [int(match[1]) for name in os.listdir(directory) if (match := _FOLDER.match(name))]
    return max(numbers, default=0) + 1


def remove_leftovers(directory: Path) -> None:
    """Removes the arrays that the manifest does not name, and unfinished files. Never raises.

    A manifest that is there but cannot be read may name any of them, so then all are kept.
    """
    keep = current_folder(directory)
    if keep is None and (directory / MANIFEST).exists():
        return
    for entry in list(os.scandir(directory)):
        if entry.name == keep or not _LEFTOVER.fullmatch(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def take_inventory(folder: Path) -> dict[str, StoredFile]:
    """The size and BLAKE2b of every file in ``folder``. Each file is flushed to disk."""
    sync_tree(folder)
    sync_directory(folder.parent)  # orbax makes the folder by a rename, which is in its parent
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): StoredFile(path.stat().st_size, hash_file(path)) for path in paths}


def check_inventory(folder: Path, files: Mapping[str, StoredFile]) -> None:
    """Raises unless every file in ``files`` is in ``folder``, with the recorded size and content."""
    for name, expected in files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise FileNotFoundError(f"{file}: missing from the checkpoint. {_REMEDY}")
        # Sizes first: a file that was cut short is told without reading what is left of it.
        size = file.stat().st_size
        if size != expected.bytes:
            raise ValueError(f"{file}: {size} bytes, expected {expected.bytes}: cut short or overwritten. {_REMEDY}")
        if hash_file(file) != expected.blake2b:
            raise ValueError(f"{file}: the content differs from what was saved (BLAKE2b). {_REMEDY}")


def commit(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Makes ``manifest`` the checkpoint in ``directory``, in one atomic step.

    A checksum of the rest is added, so that a byte that flips in the file itself is noticed.
    """
    # Flushed before the rename, and the directory after it: a power cut leaves the old manifest or the whole new one.
    file = directory / f"{MANIFEST}.tmp"
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(format_json({**manifest, "checksum": _checksum(manifest)}))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(file, directory / MANIFEST)
    sync_directory(directory)
    sync_directory(directory.parent)


def read_json(directory: Path) -> dict[str, Any]:
    """The manifest that `commit` wrote, as plain data.

    Raises:
        FileNotFoundError: There is no ``adapter.json``.
        ValueError: It is not JSON, or not as it was written.
    """
    file = directory / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found, so {directory} holds no adapter checkpoint.{_hint(directory)}")
    # A hostile file must not fill the memory before it is judged.
    if file.stat().st_size > _MANIFEST_LIMIT:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; no {MANIFEST} is longer than {_MANIFEST_LIMIT}.")
    try:
        manifest = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}). {_REMEDY}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{file}: holds a JSON {type(manifest).__name__}, expected an object. {_REMEDY}")
    if manifest.get("checksum") != _checksum(manifest):
        raise ValueError(f"{file}: the content differs from what was saved (checksum). {_REMEDY}")
    return manifest


def stamp(directory: Path) -> tuple[int, int] | None:
    """What tells one manifest from the next one in its place, without reading them; None where there is none."""
    try:
        status = (directory / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns  # an inode is used again, but not in the same nanosecond


def current_folder(directory: Path) -> str | None:
    """The folder of arrays that the manifest names; None where there is no readable manifest."""
    try:
        return read_json(directory).get("arrays")
    except (OSError, ValueError):
        return None


def _hint(directory: Path) -> str:
    if not directory.is_dir():
        return ""
    others = sorted(file.parent for file in directory.glob(f"*/{MANIFEST}"))[:5]
    unfinished = any(_LEFTOVER.fullmatch(name) for name in os.listdir(directory))
    text = " It holds an unfinished save." if unfinished else ""
    return text + (f" Did you mean one of: {', '.join(map(str, others))}?" if others else "")


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return new_hash(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def format_json(value: Any, depth: int = 0) -> str:
    """JSON for people: one line for each parameter, file and setting."""
    if depth == 2 or not isinstance(value, (dict, list, tuple)) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    start, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        lines = [f"{json.dumps(name, ensure_ascii=False)}: {format_json(x, depth + 1)}" for name, x in value.items()]
        return "{" + start + f",{start}".join(lines) + end + "}"
    return "[" + start + f",{start}".join(format_json(x, depth + 1) for x in value) + end + "]"
