"""Hashes, locks, what is flushed, and JSON that a program cannot misread."""

from __future__ import annotations

import errno
import hashlib
import os
import threading

import pytest
from helpers import message

from lojax.files.filesystem import hash_file, lock_directory, new_hash, parse_json, sync_directory, sync_tree


def test_hash_file_is_blake2b_from_a_byte_on(tmp_path):
    (tmp_path / "x").write_bytes(b"header and data")
    assert hash_file(tmp_path / "x") == new_hash(b"header and data").hexdigest()
    assert hash_file(tmp_path / "x", 7) == hashlib.blake2b(b"and data", digest_size=16).hexdigest()
    assert hash_file(tmp_path / "x", 7, hashlib.sha256) == hashlib.sha256(b"and data").hexdigest()


def test_sync_directory_takes_any_directory(tmp_path):
    sync_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_directory(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": {"x": 1, "x": 1}}', "the name 'x' occurs twice"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"-Infinity", "-Infinity is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "5,000 digits"),
        (b"\xff", "codec can't decode"),
        (b"", "Expecting value"),
    ],
)
def test_parse_json_refuses(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_parse_json_takes_plain_json():
    assert parse_json('{"é": [1, 2.5, null, true]}'.encode()) == {"é": [1, 2.5, None, True]}
    assert "occurs twice" in message(ValueError, parse_json, b'{"": 1, "": 2}')


def test_a_lock_has_one_holder_and_ends_with_it(tmp_path):
    with lock_directory(tmp_path) as is_locked:
        if not is_locked:
            pytest.skip("this file system has no locks")
        with pytest.raises(TimeoutError, match="another thread of this process"), lock_directory(tmp_path, timeout=0):
            pass
    with pytest.raises(ZeroDivisionError), lock_directory(tmp_path, timeout=0):
        _ = 1 / 0
    with lock_directory(tmp_path, timeout=0) as is_locked:
        assert is_locked
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_directory_that_was_replaced_is_not_the_lock_of_the_new_one(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    held, replaced = threading.Event(), threading.Event()

    def hold():
        with lock_directory(directory):
            held.set()
            assert replaced.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    directory.rename(tmp_path / "old")
    directory.mkdir()
    with lock_directory(directory, timeout=0) as is_locked:
        assert is_locked
    replaced.set()
    holder.join()
    with pytest.raises(FileNotFoundError), lock_directory(tmp_path / "missing"):
        pass


@pytest.mark.parametrize("error", [errno.EBADF, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_gives_none(tmp_path, monkeypatch, error):
    fcntl = pytest.importorskip("fcntl")

    def flock(*args):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_directory(tmp_path) as is_locked:
        assert not is_locked


def test_sync_tree_reaches_every_file(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("")
    real, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino) or real(descriptor))
    sync_tree(tmp_path)
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))} == set(synced)
