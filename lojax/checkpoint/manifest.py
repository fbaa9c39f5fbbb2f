"""The manifest, ``adapter.json``: entries for people and programs, each checked when it is read.

Every entry is plain data. Names in it are only ever looked up, never opened as files, imported or run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import array_axes, array_shapes, check
from lojax.types import Shape

FORMAT, VERSION = "lojax-adapter", 2
_SOFTWARE = ("lojax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
_DTYPE = re.compile(r"bool|u?int\d+|b?float\d+(_\w+)?|complex\d+")
_HINTS = typing.get_type_hints(Adapter)
_ALWAYS_WRITTEN = ("scale", "axes", "dropout")
_FOR_READERS = ("rank", "alpha", "scaling", "weight")

STATIC_FIELDS = {field.name: field.default for field in dataclasses.fields(Adapter) if field.metadata.get("static")}
"""The fields of `Adapter` that are written as JSON, with their defaults; any whose type is plain."""
ARRAY_FIELDS = tuple(field.name for field in dataclasses.fields(Adapter) if field.name not in STATIC_FIELDS)
"""The fields of `Adapter` that are written as arrays."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One stored array.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
        box: The Flax box that it came in: ``{"kind": "Partitioned", "names": [...]}``.
    """

    shape: Shape
    dtype: str
    box: Mapping[str, Any] | None = None

    @property
    def bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """The entry in the file."""
        fields = {"shape": list(self.shape), "dtype": self.dtype}
        return fields | ({"box": self.box} if self.box else {})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], path: str) -> StoredArray:
        """The reverse of `to_json`."""
        shape = tuple(expect_type(int, size, "a size") for size in expect_type(list, entry["shape"], "shape"))
        dtype = expect_type(str, entry["dtype"], "dtype")
        if any(not 0 <= size < 1 << 48 for size in shape) or not _DTYPE.fullmatch(dtype):
            raise ValueError(f"{dtype!r} of shape {shape} is not an array")
        jnp.dtype(dtype)
        box = expect_type((dict, types.NoneType), entry.get("box"), "box")
        if box is not None:
            expect_type(str, box["kind"], "the kind of a box")
            expect_type(list, box.get("names", []), "the names of a box")
        return cls(shape, dtype, box)


@dataclasses.dataclass(frozen=True)
class AdapterEntry:
    """One adapter: the static fields of `lojax.Adapter`, and its arrays by field."""

    static: Mapping[str, Any]
    arrays: Mapping[str, StoredArray]

    @property
    def rank(self) -> int:
        """The rank ``r``; 0 where only token rows train."""
        return self.arrays["a"].shape[-1] if "a" in self.arrays else 0

    @property
    def weight(self) -> tuple[int | None, ...]:
        """The shape of the adapted weight; None where no stored array has an axis of that length."""
        along = array_axes(self.static["axes"])
        sizes: dict[int | None, int] = {}
        for name, array in self.arrays.items():
            sizes |= zip(along[name], array.shape, strict=True)
        return tuple(sizes.get(axis) for axis in range(len(self.static["axes"])))

    def to_json(self) -> dict[str, Any]:
        """The entry in the file. Alpha is for readers: it is the value for which scale = alpha / rank."""
        scale = self.static["scale"]
        static = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.static.items()
            if value != STATIC_FIELDS[name] or name in _ALWAYS_WRITTEN
        }
        return {
            "rank": self.rank,
            "alpha": scale * self.rank if isinstance(scale, float) else None,
            "scaling": "scale = alpha / rank",
            **static,
            "weight": list(self.weight),
            **{name: array.to_json() for name, array in self.arrays.items()},
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], path: str) -> AdapterEntry:
        """The reverse of `to_json`."""
        arrays = {name: StoredArray.from_json(value, path) for name, value in entry.items() if isinstance(value, dict)}
        written = {name: value for name, value in entry.items() if name not in arrays and name not in _FOR_READERS}
        if unknown := sorted({*written, *arrays} - {*STATIC_FIELDS, *ARRAY_FIELDS}):
            raise ValueError(f"{unknown[0]!r} is not a field of lojax.Adapter: perhaps a newer lojax wrote it")
        static: dict[str, Any] = {
            name: parse_field(_HINTS[name], written[name], name) if name in written else default
            for name, default in STATIC_FIELDS.items()
        }
        weight = tuple(expect_type((int, types.NoneType), size, "a size") for size in entry["weight"])
        static["axes"] = check(static["axes"], [size or 0 for size in weight], path)
        if ("a" in arrays) != ("b" in arrays) or not arrays:
            raise KeyError("b" if "a" in arrays else "a")
        if ("rows" in arrays) != (static["tokens"] is not None):
            raise ValueError("rows and tokens go together")
        sizes = tuple(size or 0 for size in weight)
        expected = array_shapes(static["axes"], sizes, entry["rank"], len(static["tokens"] or ()))
        for name, array in arrays.items():
            if array.shape != expected[name]:
                raise ValueError(f"{name} has shape {array.shape}; rank, axes and weight give {expected[name]}")
        return cls(static, arrays)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All of ``adapter.json``.

    Attributes:
        arrays: The folder of the arrays.
        files: Size and BLAKE2b of each file in it.
        adapters: The adapters by path.
        full: The parameters trained in full, by path.
        other: The paths that hold None in `lora`: what stays frozen.
        keys: The keys of each path that does not simply split at ``/`` into strings.
        base: The fingerprint of the base (see `lojax.checkpoint.fingerprint`) where ``frozen`` was given, else None.
        metadata: The user's.
        software: Versions of the libraries that wrote it.
        saved: When, UTC.
    """

    arrays: str
    files: Mapping[str, Mapping[str, Any]]
    adapters: Mapping[str, AdapterEntry]
    full: Mapping[str, StoredArray]
    other: tuple[str, ...]
    keys: Mapping[str, tuple[str | int, ...]]
    base: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    software: Mapping[str, str] = dataclasses.field(default_factory=lambda: _versions())
    saved: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @property
    def stored(self) -> dict[str, tuple[str, str | None, StoredArray]]:
        """Every stored array by the name that orbax knows: ``(path, field, array)``."""
        entries = [(path, field, array) for path, e in self.adapters.items() for field, array in e.arrays.items()]
        entries += [(path, None, array) for path, array in self.full.items()]
        return {stored_name(path, field): (path, field, array) for path, field, array in entries}

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of the tree."""
        return (*self.adapters, *self.full, *self.other)

    def to_json(self) -> dict[str, Any]:
        """The fields of the file, less the checksum."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "saved": self.saved,
            "software": self.software,
            "metadata": self.metadata,
            "adapters": {path: entry.to_json() for path, entry in self.adapters.items()},
            "full": {path: array.to_json() for path, array in self.full.items()},
            "other": self.other,
            "keys": self.keys,
            "base": self.base,
            "arrays": self.arrays,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], file: Path) -> Manifest:
        """The reverse of `to_json`, for every version up to `VERSION`.

        Raises:
            ValueError: The file is of another format, a newer version, or breaks its own rules.
        """
        if value.get("format") != FORMAT:
            raise ValueError(f"{file}: format {value.get('format')!r}, expected {FORMAT!r}.")
        version = value.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise ValueError(
                f"{file}: format version {version!r}; this lojax reads versions 1 to {VERSION}. "
                "It was written by a newer lojax: update lojax to read it."
            )
        with _locate_errors(file, "the file"):
            fields = {field.name: value[field.name] for field in dataclasses.fields(cls)}
            fields["other"] = tuple(expect_type(str, path, "a path") for path in fields["other"])
            if not re.fullmatch(r"arrays-\d{1,18}", expect_type(str, fields["arrays"], "arrays")):
                raise ValueError(f"'arrays' is {fields['arrays']!r}, expected a name such as 'arrays-1'")
        for name, parse in _PARSERS.items():
            if name == "base" and fields[name] is None:
                continue
            with _locate_errors(file, name):
                entries = expect_type(dict, fields[name], name)
            fields[name] = {}
            for path, entry in entries.items():
                with _locate_errors(file, path):
                    fields[name][path] = parse(entry, path)
        manifest = cls(**fields)
        with _locate_errors(file, "the file"):
            if len(set(manifest.paths)) != len(manifest.paths):
                raise ValueError("a path occurs twice")
            if manifest.base and (unknown := manifest.base.keys() - {*manifest.paths}):
                raise ValueError(f"'base' holds {min(unknown)!r}, which is not a path of the adapter")
        return manifest


@contextlib.contextmanager
def _locate_errors(file: Path, entry: str) -> Iterator[None]:
    """Turns what Python says of a malformed entry into an error that says which entry it is."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: {entry!r} is not as lojax writes it: {reason}. Nothing was loaded.") from error


def stored_name(path: str, field: str | None) -> str:
    """The name of an array in the orbax checkpoint: its path, and the field of the adapter.

    Characters that mean something to a file system or an escape are percent-encoded.

    >>> stored_name("params/query/kernel", "a"), stored_name("../x y", None)
    ('params/query/kernel/a', '%2E%2E/x%20y')
    """
    parts = path.split("/") + ([field] if field else [])
    return "/".join(_quote(part) for part in parts)


def _quote(part: str) -> str:
    if part.strip(".") == "":
        return part.replace(".", "%2E") or "%"
    return re.sub(r"[^\w.~@+=:,-]", lambda m: "".join(f"%{byte:02X}" for byte in m[0].encode()), part, flags=re.ASCII)


def _parse_file(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    expect_type(int, entry["bytes"], "bytes")
    expect_type(str, entry["blake2b"], "blake2b")
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", name):
        raise ValueError("a file name must stay inside the folder of the arrays")
    return entry


def _parse_keys(keys: Any, path: str) -> tuple[str | int, ...]:
    return tuple(expect_type((int, str), key, "a key in 'keys'") for key in expect_type(list, keys, "'keys'"))


def _parse_base(entry: Any, path: str) -> Mapping[str, Any] | None:
    for text in () if entry is None else (entry["spec"], entry.get("content", "")):
        expect_type(str, text, "an entry of 'base'")
    return entry


_PARSERS = {
    "files": _parse_file,
    "adapters": AdapterEntry.from_json,
    "full": StoredArray.from_json,
    "keys": _parse_keys,
    "base": _parse_base,
}
"""How the entries of a field of `Manifest` are parsed, each with its name."""


def expect_type(kind: type | tuple[type, ...], value: Any, what: str) -> Any:
    """``value``, or an error that calls it ``what``, where it is not of this type. A bool is not a number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{what} is {value!r}")
    return value


def parse_field(hint: Any, value: Any, name: str) -> Any:
    """A value read from JSON as the type that a field declares: a tuple for a list, a float for 2.

    Args:
        hint: The declared type: a plain class, ``Literal``, ``tuple[X, ...]``, or a union of these.
        value: What the file holds.
        name: The field, for the error.

    >>> parse_field(float | tuple[float, ...], [1, 0.5], "scale")
    (1.0, 0.5)
    """
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(TypeError):
                return parse_field(option, value, name)
        raise TypeError(f"{name} is {value!r}")
    if kind is tuple:
        return tuple(parse_field(arguments[0], item, name) for item in expect_type(list, value, name))
    if kind is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{name} holds {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float:
        if not math.isfinite(expect_type((int, float), value, name)):
            raise ValueError(f"{name} is {value}")
        return float(value)
    return expect_type(hint, value, name)


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in _SOFTWARE}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
