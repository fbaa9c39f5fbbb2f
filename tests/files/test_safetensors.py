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
        (b'{"a":1,"a":2}', "the name 'a' occurs twice"),
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
        ({"a": tensor([4], 0, 16) | {"dtype": []}}, "tensor 'a' has dtype []; lojax reads BOOL"),
        ({"a": tensor([4], 0, 16) | {"dtype": {"F32": 1}}}, "tensor 'a' has dtype {'F32': 1}; lojax reads BOOL"),
        ({"a": tensor([1] * 65, 0, 4)}, "tensor 'a' has 65 axes, of which NumPy has 64 at most"),
        ({"a": tensor([4], 0, 16), "b": tensor([True], 0, 16)}, "tensor 'b' has shape [True]"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}', "a number of 5,000 digits"),
        (b'{"a":{"dtype":"F32","shape":[-' + b"9" * 30 + b'],"data_offsets":[0,16]}}', "'a' has shape [-999"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, reason):
    assert reason in message(ValueError, safetensors.open_file, raw(tmp_path / "x", header))


HOSTILE = {
    "one key twice among many": lambda n: ",".join(f'"key{i % (n - 1)}":1' for i in range(n)),
    "one key many times": lambda n: ",".join('"key":1' for _ in range(n)),
    "long sizes": lambda n: (
        f'"a":{{"dtype":"F32","shape":[{",".join(["9" * 4000] * (n // 300))}],"data_offsets":[0,16]}}'
    ),
    "many axes": lambda n: f'"a":{{"dtype":"F32","shape":[{",".join(["9" * 18] * n)}],"data_offsets":[0,16]}}',
    "one long name": lambda n: f'"{"a" * 10 * n}":1',
    "deep nesting": lambda n: '"a":' + "[" * n,
    "much metadata": lambda n: '"__metadata__":{' + ",".join(f'"{i}":{i}' for i in range(n)) + "}",
    "many offsets": lambda n: f'"a":{{"dtype":"F32","shape":[4],"data_offsets":{list(range(n))}}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_time_to_refuse_a_header_is_linear_in_its_size(kind, tmp_path):
    header = ("{" + HOSTILE[kind](100_000) + "}").encode()
    start = time.process_time()
    text = message(ValueError, safetensors.open_file, raw(tmp_path / "x", header))
    seconds = time.process_time() - start
    assert seconds < 2, f"{len(header):,} bytes took {seconds:.1f} s"
    assert str(tmp_path / "x") in text and len(text) < 2000, "the file is named, and not copied into the text"


@pytest.mark.parametrize("change", ["dtype", "name", "shape"])
def test_every_change_of_the_header_of_our_own_files_is_noticed(change, tmp_path):
    """A bit that turns F32 into I32, or one layer into another, leaves a valid header and the same data."""
    safetensors.write_all(tmp_path / "x", {"layers.0.a": np.ones((2, 3), np.float32)}, {"format": "pt"})
    old, new = {"dtype": (b"F32", b"I32"), "name": (b"layers.0", b"layers.1"), "shape": (b"[2,3]", b"[3,2]")}[change]
    data = (tmp_path / "x").read_bytes()
    assert data.count(old) == 1
    (tmp_path / "x").write_bytes(data.replace(old, new))
    assert "its header differs from the hash stored with it" in message(
        ValueError, safetensors.open_file, tmp_path / "x"
    )


def test_files_of_lojax_0_1_which_have_no_digest_of_the_header_are_read(tmp_path):
    header = {"__metadata__": {"lojax_sha256": hashlib.sha256(b"\0" * 16).hexdigest()}, "a": tensor([4], 0, 16)}
    assert set(safetensors.open_file(raw(tmp_path / "x", header)).entries) == {"a"}
    path = raw(tmp_path / "x", header, b"\0" * 15 + b"\1")
    assert "its data differs from the hash" in message(ValueError, safetensors.open_file, path)


def test_digests_of_another_file_are_not_kept(tmp_path):
    """As a merge would that copies the metadata of its base."""
    safetensors.write_all(tmp_path / "base", TENSORS, {"format": "pt"})
    base = safetensors.open_file(tmp_path / "base")
    shapes = {name: (value.dtype, value.shape) for name, value in TENSORS.items()}
    safetensors.write(tmp_path / "x", shapes, lambda name: TENSORS[name] + 1, metadata=base.metadata)
    again = safetensors.open_file(tmp_path / "x")
    assert again.metadata["format"] == "pt" and (again.read("b") == TENSORS["b"] + 1).all()


@pytest.mark.parametrize("kept", [0, 7, 8, 40, -1])
def test_a_cut_file_is_refused(tmp_path, kept):
    safetensors.write_all(tmp_path / "x", TENSORS, {})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:kept])
    assert "is not a whole safetensors file" in message(ValueError, safetensors.open_file, tmp_path / "x")


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
        renamed = set(file.entries) != names or dict(file.metadata).keys() != {
            "format",
            safetensors.DIGEST,
            safetensors.HEADER_DIGEST,
        }
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


def test_a_tensor_may_be_shorter_than_announced_where_that_is_said(tmp_path):
    """Its header is written again, in the room of the first: the data stay where they are."""
    shapes = {name: (np.dtype(np.uint8), (120,)) for name in "abc"}
    tensors = {name: np.full(length, length, np.uint8) for name, length in (("a", 7), ("b", 120), ("c", 99))}
    safetensors.write(tmp_path / "file", shapes, tensors.__getitem__, metadata={"x": "y"}, at_most={"a", "c"})
    file = safetensors.open_file(tmp_path / "file")
    assert dict(file.metadata).items() >= {"x": "y"}.items()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(file.read(name), expected)
    for name, at_most in (("a", {"b", "c"}), ("c", set("ab"))):
        write = lambda: safetensors.write(tmp_path / name, shapes, tensors.__getitem__, at_most=at_most)
        assert f"{name} was announced as" in message(ValueError, write)
    longer = lambda: safetensors.write(
        tmp_path / "longer", {"a": shapes["a"]}, lambda _: np.zeros(121, np.uint8), at_most="a"
    )
    assert "a was announced as" in message(ValueError, longer)
