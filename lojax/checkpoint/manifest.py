"""The manifest, ``adapter.json``: entries for people and programs, each checked when it is read.

Every entry is plain data, and its type is that of a field below: what is declared here is what is written, and what
is read is of the declared type. Names in it are only ever looked up, never opened as files, imported or run.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import jax.numpy as jnp

from lojax.adapters.adapter import ARRAYS, Adapter, array_shapes, is_adapter
from lojax.adapters.axes import check
from lojax.adapters.paths import unflatten
from lojax.types import Leaf, Shape

FORMAT, VERSION = "lojax-adapter", 2
M = TypeVar("M")
_SOFTWARE = ("lojax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
_DTYPE = re.compile(r"bool|u?int\d+|b?float\d+(_\w+)?|complex\d+")
_ALWAYS_WRITTEN = ("scale", "axes", "dropout")
_FOR_READERS = ("rank", "alpha", "scaling", "weight")

STATIC_FIELDS = {
    field.name: field.default
    for field in dataclasses.fields(Adapter)
    if field.metadata.get("static") and field.name != "entries"
}
"""The fields of `Adapter` that are written as JSON, with their defaults; adapters of a bank are written one by one."""


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """The size of a file, and its BLAKE2b (see `lojax.files.filesystem.hash_file`)."""

    bytes: int
    blake2b: str


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

    def __post_init__(self) -> None:
        if any(not 0 <= size < 1 << 48 for size in self.shape) or not _DTYPE.fullmatch(self.dtype):
            raise ValueError(f"{self.dtype!r} of shape {self.shape} is not an array")
        jnp.dtype(self.dtype)
        if self.box and not (_is_of(str, self.box["kind"]) and _is_of(tuple, self.box.get("names", []))):
            raise TypeError(f"the box is {self.box}")

    @property
    def bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class BaseEntry:
    """A parameter of the base: its dtype and shape, and the digest of its content where it carries an adapter."""

    spec: str
    content: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of ``adapter.json``, in the order of the file.

    Attributes:
        saved: When, UTC.
        software: Versions of the libraries that wrote it.
        metadata: The user's.
        adapters: The adapters by path, each with `StoredArray` in place of its arrays.
        full: The parameters trained in full, by path.
        other: The paths that hold None in `lora`: what stays frozen.
        keys: The keys of each path that does not simply split at ``/`` into strings.
        base: The fingerprint of the base (see `lojax.checkpoint.fingerprint`) where ``frozen`` was given, else None.
        arrays: The folder of the arrays.
        files: The files in it.
    """

    saved: str = dataclasses.field(default_factory=lambda: now())
    software: Mapping[str, str] = dataclasses.field(default_factory=lambda: versions())
    metadata: Mapping[str, Any]
    adapters: Mapping[str, Adapter]
    full: Mapping[str, StoredArray]
    other: tuple[str, ...]
    keys: Mapping[str, tuple[str | int, ...]]
    base: Mapping[str, BaseEntry | None] | None
    arrays: str
    files: Mapping[str, StoredFile]

    @property
    def stored(self) -> dict[str, tuple[str, str | None, StoredArray]]:
        """Every stored array by the name that orbax knows: ``(path, field, array)``."""
        leaves = {**self.adapters, **self.full}
        return {
            stored_name(path, field): (path, field, array)
            for path, leaf in leaves.items()
            for field, array in fields_of(leaf).items()
        }

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of the tree."""
        return (*self.adapters, *self.full, *self.other)

    def to_json(self) -> dict[str, Any]:
        """The fields of the file, less the checksum."""
        fields = {field.name: to_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"format": FORMAT, "version": VERSION, **fields}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], file: Path) -> Manifest:
        """The reverse of `to_json`, for every version up to `VERSION`.

        Raises:
            ValueError: The file is of another format, a newer version, or breaks its own rules.
        """
        return read_manifest_fields(cls, value, file, (FORMAT, VERSION), _check_names)


def read_manifest_fields(
    kind: type[M], value: Mapping[str, Any], file: Path, form: tuple[str, int], check: Callable[[M], None]
) -> M:
    """A manifest of this kind from the fields of its file.

    Args:
        kind: `Manifest` or that of a bank.
        value: The fields.
        file: The file, for errors.
        form: The format that it must have, and the newest version that is read.
        check: Raises if the manifest breaks the rules of its kind.

    Raises:
        ValueError: The file is of another format, a newer version, or breaks its own rules.
    """
    name, newest = form
    if value.get("format") != name:
        raise ValueError(f"{file}: format {value.get('format')!r}, expected {name!r}.")
    version = value.get("version")
    if not isinstance(version, int) or not 1 <= version <= newest:
        readable = "version 1" if newest == 1 else f"versions 1 to {newest}"
        raise ValueError(
            f"{file}: format version {version!r}; this lojax reads {readable}. It was written by a newer lojax: update "
            "lojax to read it."
        )
    try:
        manifest = kind(**parse_fields(kind, value))
        check(manifest)
    except MALFORMED as error:
        raise ValueError(f"{file} is not as lojax writes it: {explain(error)}. Nothing was loaded.") from error
    return manifest


def _check_names(manifest: Manifest) -> None:
    if not re.fullmatch(r"arrays-\d{1,18}", manifest.arrays):
        raise ValueError(f"'arrays' is {manifest.arrays!r}, expected a name such as 'arrays-1'")
    for name in manifest.files:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", name):
            raise ValueError(f"{name!r}: a file name must stay inside the folder of the arrays")
    if len(set(manifest.paths)) != len(manifest.paths):
        raise ValueError("a path occurs twice")
    if manifest.keys.get("") != ():  # the tree is not a single leaf
        unflatten({manifest.keys.get(path, path): None for path in manifest.paths})
    if unknown := sorted({*(manifest.base or {})} - {*manifest.paths}):
        raise ValueError(f"'base' holds {unknown[0]!r}, which is not a path of the adapter")


def fields_of(leaf: Leaf) -> dict[str | None, Any]:
    """The arrays of a leaf by field of the adapter, in their boxes. A parameter trained in full has the field None."""
    if is_adapter(leaf):
        return {name: value for name in ARRAYS if (value := getattr(leaf, name)) is not None}
    return {} if leaf is None else {None: leaf}


def stored_name(path: str, field: str | None) -> str:
    """The name of an array in the orbax checkpoint: its path, and the field of the adapter.

    Characters that mean something to a file system or an escape are percent-encoded.

    >>> stored_name("params/query/kernel", "a"), stored_name("../x y", None)
    ('params/query/kernel/a', '%2E%2E/x%20y')
    """
    parts = path.split("/") + ([field] if field else [])
    return "/".join(_quote(part) for part in parts)


def _quote(part: str) -> str:
    if part.strip(".") == "":  # "", "." and ".." mean a directory; "%" stands for an empty part
        return part.replace(".", "%2E") or "%"
    return re.sub(r"[^\w.~@+=:,-]", lambda m: "".join(f"%{byte:02X}" for byte in m[0].encode()), part, flags=re.ASCII)


def adapter_to_json(adapter: Adapter) -> dict[str, Any]:
    """The entry of an adapter, whose arrays are `StoredArray`: its fields, and what readers want to know besides.

    Alpha is the value for which scale = alpha / rank.
    """
    written = {
        name: getattr(adapter, name)
        for name, default in STATIC_FIELDS.items()
        if getattr(adapter, name) != default or name in _ALWAYS_WRITTEN
    }
    return {
        "rank": adapter.rank,
        "alpha": adapter.scale * adapter.rank if isinstance(adapter.scale, float) else None,
        "scaling": "scale = alpha / rank",
        **to_plain(written),
        "weight": list(adapter.weight_shape),
        **to_plain(adapter.arrays),
    }


def adapter_from_json(entry: Mapping[str, Any], path: str) -> Adapter:
    """The reverse of `adapter_to_json`. What is there for readers must fit the rest."""
    names = entry.keys() - set(_FOR_READERS)
    if unknown := sorted(names - {field.name for field in dataclasses.fields(Adapter)}):
        raise ValueError(f"{unknown[0]!r} is not a field of lojax.Adapter: perhaps a newer lojax wrote it")
    fields: dict[str, Any] = {name: parse(StoredArray, entry[name], name) if name in names else None for name in ARRAYS}
    fields |= {name: parse(_hints(Adapter)[name], entry[name], name) for name in STATIC_FIELDS if name in names}
    adapter = Adapter(**fields)
    weight = tuple(size or 0 for size in parse(tuple[int | None, ...], entry["weight"], "weight"))
    check(adapter.axes, weight, path)
    if (adapter.a is None) != (adapter.b is None) or not adapter.arrays:
        raise KeyError("a" if adapter.a is None else "b")
    if (adapter.rows is None) != (adapter.tokens is None):
        raise ValueError("rows and tokens go together")
    expected = array_shapes(adapter.axes, weight, entry["rank"], len(adapter.tokens or ()))
    for name, array in adapter.arrays.items():
        if array.shape != expected[name]:
            raise ValueError(f"{name} has shape {array.shape}; rank, axes and weight give {expected[name]}")
    return adapter


def to_plain(value: Any) -> Any:
    """``value`` in the types of JSON; fields of a dataclass that are None are left out.

    >>> to_plain({"w": StoredArray((2, 3), "int8")})
    {'w': {'shape': [2, 3], 'dtype': 'int8'}}
    """
    if isinstance(value, Adapter):
        return adapter_to_json(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return to_plain({name: item for name, item in fields.items() if item is not None})
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What Python raises where an entry is not of the expected form."""


def parse(hint: Any, value: Any, name: str) -> Any:
    """The reverse of `to_plain`: a value read from JSON as the declared type, a tuple for a list, a float for 2.

    Args:
        hint: A plain class, a dataclass, ``Literal``, ``tuple[X, ...]``, ``Mapping[str, X]``, or a union of these.
        value: What the file holds.
        name: What it is called in errors.

    >>> parse(float | tuple[float, ...], [1, 0.5], "scale")
    (1.0, 0.5)
    """
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        options = [option for option in arguments if _is_of(option, value)]
        if not options:
            raise TypeError(f"{name} is {value!r}")
        return parse(options[0], value, name)
    if hint is not Any and not _is_of(hint, value):
        raise TypeError(f"{name} is {value!r}")
    if kind is tuple:
        return tuple(parse(arguments[0], item, name) for item in value)
    if kind is Mapping:
        return {key: _parse_entry(arguments[1], item, key) for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return adapter_from_json(value, name) if hint is Adapter else hint(**parse_fields(hint, value))
    if kind is typing.Literal and value not in arguments:
        raise ValueError(f"{name} holds {value!r}, expected one of {', '.join(map(repr, arguments))}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}")
    return float(value) if hint is float else value


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value read from JSON has the outer form of a declared type. A bool is not a number."""
    form = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(form) or form is Mapping:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return form is bool
    return isinstance(value, {tuple: list, float: (int, float), typing.Literal: str}.get(form, form))


def _parse_entry(hint: Any, value: Any, key: str) -> Any:
    try:
        return parse(hint, value, key)
    except MALFORMED as error:
        raise ValueError(f"{key!r}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """What is wrong with an entry, in words, from one of `MALFORMED`."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def parse_fields(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that the file holds; those without a default value must be there."""
    return {
        field.name: _parse_entry(_hints(kind)[field.name], value[field.name], field.name)
        for field in dataclasses.fields(kind)
        if field.name in value or field.default is dataclasses.MISSING
    }


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions of the libraries that write a checkpoint."""
    return {name: _version(name) for name in _SOFTWARE}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
