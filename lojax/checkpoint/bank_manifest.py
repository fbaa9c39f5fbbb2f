"""``bank.json``: the adapters of a saved bank, each of which is an adapter checkpoint of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lojax.adapters.bank import Bank
from lojax.checkpoint.adapter_directory import BANK, MANIFEST, read_json
from lojax.checkpoint.manifest import now, read_manifest_fields, to_plain, versions
from lojax.files.filesystem import hash_file

FORMAT, VERSION = "lojax-bank", 1
_SAFE_NAME = re.compile(r"\d{1,9}(-[\w.-]{1,60})?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class StoredEntry:
    """One adapter of a saved bank.

    Attributes:
        folder: Its checkpoint, in the folder of the bank.
        blake2b: The BLAKE2b of its ``adapter.json``, which holds that of its other files.
        name: Its name, where the bank has names.
    """

    folder: str
    blake2b: str
    name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BankManifest:
    """All of ``bank.json``, in the order of the file.

    Attributes:
        saved: When, UTC.
        software: Versions of the libraries that wrote it.
        metadata: The user's.
        entries: The adapters, in order.
        folder: The folder of their checkpoints.
    """

    saved: str = dataclasses.field(default_factory=now)
    software: Mapping[str, str] = dataclasses.field(default_factory=versions)
    metadata: Mapping[str, Any]
    entries: tuple[StoredEntry, ...]
    folder: str

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of the adapters; None where they have none."""
        names = tuple(entry.name for entry in self.entries if entry.name is not None)
        return names or None

    def index(self, which: int | str) -> int:
        """The number of an adapter, as `lojax.Bank.index` gives it."""
        return Bank(None, len(self.entries), self.names).index(which)

    def to_json(self) -> dict[str, Any]:
        """The fields of the file, less the checksum."""
        fields = {field.name: to_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"format": FORMAT, "version": VERSION, **fields}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], file: Path) -> BankManifest:
        """The reverse of `to_json`.

        Raises:
            ValueError: The file is of another format, a newer version, or breaks its own rules.
        """
        return read_manifest_fields(cls, value, file, (FORMAT, VERSION), _check)


def folder_name(number: int, name: str | None) -> str:
    """The folder of an adapter: its number, and of its name what any file system can spell.

    >>> folder_name(0, "French/v2"), folder_name(1, None)
    ('0-French_v2', '1')
    """
    # The number keeps apart names that differ in what is lost here, or in case, which some file systems ignore.
    spelled = re.sub(r"[^\w.-]", "_", name or "", flags=re.ASCII)[:60].rstrip(".")
    return f"{number}-{spelled}" if spelled else str(number)


def read_bank_manifest(directory: Path) -> BankManifest:
    """All that ``bank.json`` says, without reading an adapter."""
    return BankManifest.from_json(read_json(directory, BANK), directory / BANK)


def entry_directory(directory: Path, manifest: BankManifest, number: int) -> Path:
    """The checkpoint of one adapter of a bank.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is another one than the bank was saved with.
    """
    entry = manifest.entries[number]
    file = directory / manifest.folder / entry.folder / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise FileNotFoundError(f"{file}: missing from the bank. Nothing was loaded. Copy the bank again.")
    if hash_file(file) != entry.blake2b:
        raise ValueError(
            f"{file}: the content differs from what was saved with the bank (BLAKE2b): damaged, or saved over. Nothing "
            "was loaded. To change one adapter of a bank, save the whole bank: lojax.save(path, bank.replace(i, lora))."
        )
    return file.parent


def add_hashes(manifest: BankManifest, directory: Path) -> BankManifest:
    """The manifest with the BLAKE2b of the ``adapter.json`` of each entry, which is there by now."""
    folder = directory / manifest.folder
    entries = [dataclasses.replace(x, blake2b=hash_file(folder / x.folder / MANIFEST)) for x in manifest.entries]
    return dataclasses.replace(manifest, entries=tuple(entries))


def _check(manifest: BankManifest) -> None:
    if not re.fullmatch(r"bank-\d{1,18}", manifest.folder):
        raise ValueError(f"'folder' is {manifest.folder!r}, expected a name such as 'bank-1'")
    if not manifest.entries:
        raise ValueError("'entries' is empty")
    for entry in manifest.entries:
        if not _SAFE_NAME.fullmatch(entry.folder):
            raise ValueError(f"{entry.folder!r} is not the name of a folder that lojax makes")
    # Either all have a name or none has.
    names = [entry.name for entry in manifest.entries]
    folders = [entry.folder for entry in manifest.entries]
    has_names = names != [None] * len(names)
    if len(set(folders)) != len(folders) or (has_names and (len(set(names)) != len(names) or not all(names))):
        raise ValueError("a name occurs twice, or is missing")
