"""Hashes, and JSON that a program cannot misread."""

from __future__ import annotations

import hashlib

import pytest
from helpers import message

from lojax.files.filesystem import hash_file, new_hash, parse_json, sync_directory


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
