"""The files of a checkpoint: counted, hashed, committed in one step, and swept without harm."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from helpers import message

from lojax.checkpoint.adapter_directory import (
    MANIFEST,
    as_local_path,
    check_inventory,
    commit,
    current_folder,
    format_json,
    next_number,
    read_json,
    remove_leftovers,
    take_inventory,
)
from lojax.checkpoint.manifest import StoredFile


def test_as_local_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert as_local_path("x/../y") == tmp_path / "y"
    assert as_local_path(Path("/a/b")) == Path("/a/b")
    monkeypatch.setenv("HOME", "/home/someone")
    assert as_local_path("~/adapter") == Path("/home/someone/adapter")
    assert message(ValueError, as_local_path, "gs://bucket/x").startswith(
        "gs://bucket/x: an adapter is saved to a file"
    )


def test_next_number_is_above_any_that_was_used(tmp_path):
    assert next_number(tmp_path) == 1
    for name in ("arrays-2", "arrays-10.orbax-checkpoint-tmp-123", "arrays-of-mine", "other-99"):
        (tmp_path / name).mkdir()
    assert next_number(tmp_path) == 11


def test_an_inventory_holds_every_file_and_is_checked_against_it(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data").write_bytes(b"numbers")
    (tmp_path / "meta").write_bytes(b"")
    inventory = take_inventory(tmp_path)
    blake2b = hashlib.blake2b(b"numbers", digest_size=16).hexdigest()
    assert list(inventory) == ["d/data", "meta"] and inventory["d/data"] == StoredFile(7, blake2b)
    check_inventory(tmp_path, inventory)
    (tmp_path / "d" / "data").write_bytes(b"numbert")
    text = message(ValueError, check_inventory, tmp_path, inventory)
    assert str(tmp_path / "d" / "data") in text and "BLAKE2b" in text
    (tmp_path / "d" / "data").write_bytes(b"number")
    assert "6 bytes, expected 7" in message(ValueError, check_inventory, tmp_path, inventory)
    os.remove(tmp_path / "d" / "data")
    assert "missing from the checkpoint" in message(FileNotFoundError, check_inventory, tmp_path, inventory)


def test_what_is_committed_is_read_and_any_change_of_it_noticed(tmp_path):
    commit(tmp_path, {"arrays": "arrays-1", "note": "é"})
    assert os.listdir(tmp_path) == [MANIFEST] and current_folder(tmp_path) == "arrays-1"
    manifest = read_json(tmp_path)
    assert manifest.pop("checksum") and manifest == {"arrays": "arrays-1", "note": "é"}
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace("arrays-1", "arrays-2"))
    assert "(checksum)" in message(ValueError, read_json, tmp_path) and current_folder(tmp_path) is None


def test_a_manifest_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    commit(tmp_path, {})
    os.truncate(tmp_path / MANIFEST, 1 << 40)  # sparse
    assert "1099511627776 bytes" in message(ValueError, read_json, tmp_path)


def test_remove_leftovers_keeps_the_checkpoint_and_what_is_not_ours(tmp_path):
    for name in ("arrays-1", "arrays-2", "arrays-3.orbax-checkpoint-tmp", "arrays-x"):
        (tmp_path / name).mkdir()
    for name in (f"{MANIFEST}.tmp", "notes.txt"):
        (tmp_path / name).write_text("")
    commit(tmp_path, {"arrays": "arrays-2"})
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "arrays-2", "arrays-x", "notes.txt"]


@pytest.mark.parametrize("damaged", [True, False])
def test_remove_leftovers_under_a_damaged_manifest_removes_nothing(tmp_path, damaged):
    (tmp_path / "arrays-1").mkdir()
    if damaged:
        (tmp_path / MANIFEST).write_text("{")
    remove_leftovers(tmp_path)
    assert (tmp_path / "arrays-1").exists() == damaged


def test_format_json_gives_each_parameter_a_line():
    value = {
        "adapters": {"q": {"rank": 8, "axes": ["in", "out"]}, "v": {}},
        "other": ["a", "b"],
        "note": "é",
        "none": {},
    }
    text = format_json(value)
    assert json.loads(text) == value
    assert ' "adapters": {\n  "q": {"rank": 8, "axes": ["in", "out"]},\n  "v": {}\n },' in text
    assert message(ValueError, format_json, {"x": float("nan")})
