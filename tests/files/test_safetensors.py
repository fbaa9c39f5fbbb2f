"""The file format: what `safetensors` itself reads and writes, and damage of every kind."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import message

from lojax.files import safetensors

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)}


def raw(path: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(shape: list, start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_safetensors_itself_reads_what_we_write(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    safetensors.write_all(tmp_path / "x", TENSORS, {"format": "pt"})
    read = theirs.load_file(tmp_path / "x")
    assert set(read) == set(TENSORS)
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(read[name], value)


def test_we_read_what_safetensors_itself_writes(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    theirs.save_file({**TENSORS, "c": np.array(3.0, np.float16), "d": np.zeros((0, 4), np.bool_)}, tmp_path / "x")
    file = safetensors.open_file(tmp_path / "x")
    np.testing.assert_array_equal(file.read("a"), TENSORS["a"])
    assert file.read("c") == 3 and file.read("c").dtype == np.float16 and file.read("d").shape == (0, 4)


def test_every_dtype_goes_through(tmp_path):
    tensors = {name: np.ones((2, 3), dtype) for name, dtype in safetensors.DTYPES.items()}
    safetensors.write_all(tmp_path / "x", tensors, {})
    file = safetensors.open_file(tmp_path / "x")
    for name, value in tensors.items():
        assert file.read(name).dtype == value.dtype and (file.read(name) == value).all()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{nonsense}", "its header is not JSON"),
        (b"[1, 2]  ", "its header is not a JSON object"),
        (b'{"a":1,"a":2}', "its header is not JSON (the name 'a' occurs twice)"),
        (b"\xff\xfe{}", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        ({"__metadata__": {"x": 1}}, "its __metadata__ is not a map of strings"),
        ({"a": 3}, "tensor 'a' lacks a dtype, shape or data_offsets"),
        ({"a": tensor([4], 0, 12)}, "tensor 'a' claims shape [4] of F32 in 12 bytes"),
        ({"a": tensor([-4], 0, 16)}, "tensor 'a' has shape [-4]"),
        ({"a": tensor([2.0], 0, 16)}, "tensor 'a' has shape [2.0]"),
        ({"a": tensor([10**9, 10**9, 10**9], 0, 4 * 10**27)}, "its tensors end at byte"),
        ({"a": tensor([10**12], 0, 16)}, "tensor 'a' claims shape [1000000000000] of F32 in 16 bytes"),
        ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, "tensor 'b' starts at byte"),
        ({"a": tensor([2], 0, 8)}, "its tensors end at byte"),
        ({"a": tensor([4], 0, 16, "F33")}, "tensor 'a' has dtype 'F33'; lojax reads BOOL"),
        ({"a": tensor([4], 0, 16, [])}, "tensor 'a' has dtype []; lojax reads BOOL"),
        ({"a": tensor([1] * 1000, 0, 4)}, "tensor 'a' has shape [1, 1, 1, 1, 1, 1, ...] and"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, reason):
    assert reason in message(ValueError, safetensors.open_file, raw(tmp_path / "x", header))


@pytest.mark.parametrize("kept", [0, 7, 8, 40, -1])
def test_a_cut_file_is_refused(tmp_path, kept):
    safetensors.write_all(tmp_path / "x", TENSORS, {})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:kept])
    assert "is not a whole safetensors file" in message(ValueError, safetensors.open_file, tmp_path / "x")


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b",".join(b'"k":%d' % i for i in range(100_000)) + b"}",
        b'{"a":{"dtype":"F32","data_offsets":[0,16],"shape":[' + b",".join([b"9" * 4000] * 1500) + b"]}}",
        b'{"a":{"dtype":"F32","data_offsets":[0,16],"shape":[' + b",".join([b"9" * 18] * 300_000) + b"]}}",
    ],
    ids=["one key 100,000 times", "sizes of 4,000 digits", "300,000 axes"],
)
def test_hostile_headers_are_refused_in_linear_time(tmp_path, header):
    """Each took minutes: a count for each key, and the product of the sizes."""
    file = raw(tmp_path / "x", header)
    start = time.process_time()
    assert str(file) in message(ValueError, safetensors.open_file, file)
    assert time.process_time() - start < 5


def test_the_hash_of_older_files_is_still_checked(tmp_path):
    data = TENSORS["a"].tobytes()
    for text, same in ((hashlib.sha256(data).hexdigest(), True), ("0" * 64, False)):
        header = {"__metadata__": {"lojax_sha256": text}, "a": tensor([2, 3], 0, 24)}
        file = raw(tmp_path / "x", header, data)
        if same:
            np.testing.assert_array_equal(safetensors.open_file(file).read("a"), TENSORS["a"])
        else:
            assert "bytes were changed after it was written" in message(ValueError, safetensors.open_file, file)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "its header claims 1,152,921,504,606,846,976 bytes of a file of 10" in message(
        ValueError, safetensors.open_file, tmp_path / "x"
    )


def test_every_flipped_byte_of_our_own_files_is_noticed(tmp_path):
    safetensors.write_all(tmp_path / "x", TENSORS, {"format": "pt"})
    data = bytearray((tmp_path / "x").read_bytes())
    names = set(TENSORS)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (tmp_path / "x").write_bytes(flipped)
        try:
            file = safetensors.open_file(tmp_path / "x")
        except ValueError:
            continue
        same = all(
            (file.read(n) == v).all() and file.read(n).shape == v.shape for n, v in TENSORS.items() if n in file.entries
        )
        renamed = set(file.entries) != names or dict(file.metadata).keys() != {"format", safetensors.DIGEST}
        assert renamed or same, f"byte {position} was flipped and other numbers were read"


def test_a_tensor_that_differs_from_its_announcement_is_refused(tmp_path):
    shapes = {"a": (np.dtype(np.float32), (3,))}
    text = message(ValueError, safetensors.write, tmp_path / "x", shapes, lambda _: np.ones(2, np.float32))
    assert "a was announced as" in text


def test_other_dtypes_are_refused(tmp_path):
    array = np.ones(2, ml_dtypes.int4)
    assert "which safetensors cannot hold" in message(
        ValueError, safetensors.write_all, tmp_path / "x", {"a": array}, {}
    )
