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

A bank is saved in the same way: ``bank.json`` names a folder of whole adapter checkpoints, one for each entry::

    PATH/
      bank.json          the names of the entries, and the BLAKE2b of the adapter.json of each
      bank-7/0-french/   an adapter checkpoint as above, which `lojax.restore` also reads alone

Version 1 differs in one entry: each array has a ``digest``, which is no longer read.
"""

from __future__ import annotations

import contextlib
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
BANK = "bank.json"
_NAMED_BY = {MANIFEST: "arrays", BANK: "folder"}  # the field of each that names the folder beside it
_FOLDER = re.compile(r"(?:arrays|bank)-(\d{1,18})")
_LEFTOVER = re.compile(r"arrays-\d{1,18}(\.orbax-checkpoint-tmp.*)?|bank-\d{1,18}|(adapter|bank)\.json\.tmp")
_MANIFEST_LIMIT = 256 << 20  # bytes; a million parameters take about 200 each
_REMEDY = "Nothing was loaded. Copy the checkpoint again from its source, or restore another one."


def as_local_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as an absolute local path. Bucket URLs are refused: they have no atomic rename."""
    directory = as_path(path)
    if "://" in (text := os.fspath(path)):
        raise ValueError(f"{text}: an adapter is saved to a file system. Save to a local path, then copy it there.")
    return Path(os.path.abspath(directory))


def next_number(directory: Path) -> int:
    """A number for a new folder, above that of any in ``directory``, finished or not."""
    # Also above an unfinished one: a saver that was killed may have left files that orbax would mistake for its own.
    numbers = [int(match[1]) for name in os.listdir(directory) if (match := _FOLDER.match(name))]
    return max(numbers, default=0) + 1


def remove_leftovers(directory: Path) -> None:
    """Removes the folders that no manifest names, and unfinished files. Never raises.

    A manifest that is there but cannot be read may name any of them, so then all are kept.
    """
    present = [name for name in _NAMED_BY if (directory / name).exists()]
    keep = {current_folder(directory, name) for name in present}
    if None in keep:
        return
    for entry in list(os.scandir(directory)):
        if entry.name in keep or not _LEFTOVER.fullmatch(entry.name):
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


def commit(directory: Path, manifest: Mapping[str, Any], name: str = MANIFEST) -> None:
    """Makes ``manifest`` the checkpoint in ``directory``, in one atomic step.

    A checksum of the rest is added, so that a byte that flips in the file itself is noticed.

    Args:
        directory: Where.
        manifest: As plain data.
        name: The file: `MANIFEST` or `BANK`.
    """
    # Flushed before the rename, and the directory after it: a power cut leaves the old manifest or the whole new one.
    file = directory / f"{name}.tmp"
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(format_json({**manifest, "checksum": _checksum(manifest)}))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(file, directory / name)
    sync_directory(directory)
    sync_directory(directory.parent)


def holds_bank(directory: Path) -> bool:
    """Whether the checkpoint in ``directory`` is that of a bank.

    Raises:
        ValueError: There is an adapter as well, so one of the two is stale.
    """
    present = [name for name in _NAMED_BY if (directory / name).is_file()]
    if len(present) > 1:
        raise ValueError(
            f"{directory}: holds both {MANIFEST} and {BANK}, and lojax writes one of them: files were copied together, "
            "or an older lojax saved an adapter over a bank. Remove the one that is not wanted."
        )
    return present == [BANK]


def read_json(directory: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest that `commit` wrote, as plain data.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not JSON, or not as it was written.
    """
    file = directory / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found, so {directory} holds no adapter checkpoint.{_hint(directory)}")
    # A hostile file must not fill the memory before it is judged.
    if file.stat().st_size > _MANIFEST_LIMIT:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; no {name} is longer than {_MANIFEST_LIMIT}.")
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
    for name in _NAMED_BY:
        with contextlib.suppress(OSError):
            status = (directory / name).stat()
            return status.st_ino, status.st_mtime_ns  # an inode is used again, but not in the same nanosecond
    return None


def current_folder(directory: Path, name: str = MANIFEST) -> str | None:
    """The folder that the manifest names; None if the manifest cannot be read."""
    try:
        return read_json(directory, name).get(_NAMED_BY[name])
    except (OSError, ValueError):
        return None


def _hint(directory: Path) -> str:
    if not directory.is_dir():
        bank, name = directory.parent, directory.name
        return f" {bank} holds a bank: pass {bank} and entry={name!r}." if (bank / BANK).is_file() else ""
    if (directory / BANK).is_file():
        return " It holds a bank: lojax.restore reads all of it, and one adapter with entry=."
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
