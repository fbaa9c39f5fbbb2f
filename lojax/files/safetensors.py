"""The safetensors file format: eight bytes of length, a JSON header, and the raw bytes of the tensors.

Everything the header claims is checked against the file before a byte of data is used, so a damaged or
hostile file is an error and never a large allocation, in time linear in its size. Tensors are read one at a
time, and written as a stream, so a model passes through in the memory of its largest tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lojax.files.filesystem import hash_file, new_hash, parse_json
from lojax.text import printable

MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIGEST = "lojax_blake2b"
"""The metadata key under which `write_all` leaves the hash of the data (`b2sum -l 128`), which `open_file` checks."""
HEADER_DIGEST = "lojax_header_blake2b"
"""The metadata key under which `write` leaves the hash of the rest of the header, which `open_file` checks."""
_OLD_DIGEST = "lojax_sha256"  # the hash of the data as lojax 0.1.0 wrote it
MAX_AXES = 64


@dataclasses.dataclass(frozen=True)
class Entry:
    """The position of one tensor: bytes ``start`` to ``stop`` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class File:
    """An open safetensors file: its header. Tensors are read when asked for."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """The tensor called ``name``, little-endian bytes in the machine's order."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        data = np.fromfile(self.path, dtype=entry.dtype, count=count, offset=entry.start)
        if data.size != count:
            raise ValueError(f"{self.path}: the file ended inside tensor {name!r}; it was cut while being read.")
        return data.reshape(entry.shape)


def open_file(path: str | os.PathLike[str]) -> File:
    """Reads and checks the header of a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not safetensors, is cut short, or its header contradicts itself or the
            file; or the data differs from the hash that `write` left.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        # Before the header is read: a length that the file does not have would otherwise be allocated.
        if len(head) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _damaged(path, f"its header claims {length:,} bytes of a file of {size:,}")
        text = stream.read(length)
    header = _parse(path, text)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a map of strings")
    if HEADER_DIGEST in metadata and _digest_header(header) != metadata[HEADER_DIGEST]:
        raise _damaged(path, f"its header differs from the hash stored with it: {_CHANGED}")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    _check_layout(path, entries, 8 + length, size)
    for name, algorithm in ((DIGEST, new_hash), (_OLD_DIGEST, hashlib.sha256)):
        if name in metadata and hash_file(path, 8 + length, algorithm) != metadata[name]:
            raise _damaged(path, f"its data differs from the hash stored with it: {_CHANGED}")
    return File(path, entries, metadata)


_CHANGED = "bytes were changed after it was written"


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not a whole safetensors file: {reason}. Fetch or save it again.")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({printable(error)})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _quoted(value: object) -> str:
    return printable(repr(value))


def _entry(path: Path, name: str, fields: Any, base: int) -> Entry:
    def is_sizes(value: object) -> bool:
        # `type` and not `isinstance`: JSON's true is an int to Python.
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise _damaged(path, f"tensor {_quoted(name)} lacks a dtype, shape or data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {_quoted(name)} has shape {_quoted(shape)} and data_offsets {_quoted(offsets)}")
    if len(shape) > MAX_AXES:  # the product of thousands of sizes takes quadratic time
        raise _damaged(path, f"tensor {_quoted(name)} has {len(shape):,} axes, of which NumPy has {MAX_AXES} at most")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: tensor {_quoted(name)} has dtype {_quoted(fields['dtype'])}; lojax reads {', '.join(DTYPES)}."
        )
    dtype = DTYPES[fields["dtype"]]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        claim = f"shape {_quoted(shape)} of {fields['dtype']} in {offsets[1] - offsets[0]:,} bytes"
        raise _damaged(path, f"tensor {_quoted(name)} claims {claim}")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _check_layout(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    end = base
    # By stop too: empty tensors start where the next one starts.
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise _damaged(path, f"tensor {_quoted(name)} starts at byte {entry.start:,}, not at {end:,}")
        end = entry.stop
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end:,}, the file at {size:,}")


def _digest_header(header: Mapping[str, Any]) -> str:
    """The hash of a header without the hash itself."""
    metadata = {key: value for key, value in header.get("__metadata__", {}).items() if key != HEADER_DIGEST}
    canonical = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return new_hash(canonical.encode()).hexdigest()


def is_from_lojax(path: Path) -> bool:
    """Whether `write` made a file, by its header alone."""
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            metadata = _parse(path, stream.read(min(length, MAX_HEADER))).get("__metadata__", {})
    except (OSError, ValueError, struct.error):
        return False
    return isinstance(metadata, dict) and bool({DIGEST, HEADER_DIGEST, _OLD_DIGEST} & metadata.keys())


def write(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    produce: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    digest: str | None = None,
    watch: Callable[[Iterable[str]], Iterable[str]] = iter,
    at_most: Collection[str] = (),
) -> None:
    """Writes tensors one at a time, in the order of ``shapes``.

    Args:
        path: The file; it must not exist.
        shapes: The dtype and shape of every tensor.
        produce: Returns the tensor of a name; called once for each, in order.
        metadata: Strings to keep in the header; hashes among them are of another file, and are left out.
        digest: The hash of the bytes of all tensors (`new_hash`), where it is known, to leave in the header.
        watch: Wraps the iteration, for a progress bar.
        at_most: The names whose shape is only known when they are produced; ``shapes`` has the largest.

    Raises:
        FileExistsError: ``path`` exists.
        ValueError: ``produce`` returned another dtype or shape than announced.
    """
    strings = {key: value for key, value in (metadata or {}).items() if key not in (DIGEST, HEADER_DIGEST, _OLD_DIGEST)}
    strings |= {DIGEST: digest} if digest else {}
    head = _head(shapes, strings)
    written = dict(shapes)
    with open(path, "xb") as stream:
        stream.write(head)
        for name in watch(shapes):
            array = produce(name)
            dtype, shape = written[name] = (array.dtype, array.shape)
            largest_dtype, largest = shapes[name]
            fits = len(shape) == len(largest) and all(map(operator.le, shape, largest))
            if dtype != largest_dtype or not fits or (shape != largest and name not in at_most):
                raise ValueError(f"{name} was announced as {shapes[name]}, and came as {dtype} {shape}.")
            # As bytes, because bfloat16 and float8 have no buffer protocol; flat, because an array without axes has no
            # such view.
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made
        if written != shapes:
            # No number in the header grew, so the new one fits into the room of the first.
            stream.seek(0)
            stream.write(_head(written, strings, len(head)))
        stream.flush()
        os.fsync(stream.fileno())


def _head(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], strings: Mapping[str, str], length: int = 0) -> bytes:
    """What stands before the data: at least ``length`` bytes, filled up with spaces."""
    header: dict[str, Any] = {"__metadata__": dict(strings)}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        if dtype not in NAMES:
            raise ValueError(f"{name} has dtype {dtype}, which safetensors cannot hold.")
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    header["__metadata__"][HEADER_DIGEST] = _digest_header(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data then starts at a multiple of eight bytes, so that a memory map of the file has aligned tensors.
    text = text.ljust(max(len(text) + -len(text) % 8, length - 8))
    return struct.pack("<Q", len(text)) + text


def write_all(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes tensors that are in memory, with a hash of their bytes in the header's metadata."""
    digest = new_hash()
    for array in tensors.values():
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    shapes = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    write(path, shapes, tensors.__getitem__, metadata=metadata, digest=digest.hexdigest())
