"""What ``adapter.json`` says: entries for people and programs, each checked when it is read.

Every entry is plain data. Names in it are only ever looked up, never opened as files, imported or run.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

import jax.numpy as jnp

from lojax.adapters.adapter import Adapter, array_shapes
from lojax.adapters.axes import check, positions

FORMAT, VERSION = "lojax-adapter", 1
_SOFTWARE = ("lojax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
_DTYPE = re.compile(r"bool|u?int\d+|b?float\d+(_\w+)?|complex\d+")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Adapter)}
_STATIC = [field.name for field in dataclasses.fields(Adapter) if field.metadata.get("static")]
_ALWAYS = ("scale", "axes", "dropout")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Array:
    """One stored array.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
        digest: `lojax.checkpoint.digest` of its content.
        box: The Flax box that it came in: ``{"kind": "Partitioned", "names": [...]}``.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    box: Mapping[str, Any] | None = None

    @property
    def bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def spec(self) -> str:
        """Dtype and shape in one word: ``float32[768,8]``."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        plain = {"shape": list(self.shape), "dtype": self.dtype, "digest": self.digest}
        return plain | ({"box": self.box} if self.box else {})

    @classmethod
    def from_json(cls, value: Any) -> Array:
        """The reverse of `to_json`."""
        shape = tuple(_of(int, size, "a size") for size in _of(list, value["shape"], "shape"))
        dtype = _of(str, value["dtype"], "dtype")
        if any(not 0 <= size < 1 << 48 for size in shape) or not _DTYPE.fullmatch(dtype):
            raise ValueError(f"{dtype!r} of shape {shape} is no array")
        jnp.dtype(dtype)
        return cls(shape, dtype, _of(str, value["digest"], "digest"), value.get("box"))


@dataclasses.dataclass(frozen=True)
class AdapterEntry:
    """One adapter: the static fields of `lojax.Adapter`, and its arrays by field name."""

    static: Mapping[str, Any]
    arrays: Mapping[str, Array]

    @property
    def rank(self) -> int:
        """The rank ``r``; 0 where only token rows train."""
        return self.arrays["a"].shape[-1] if "a" in self.arrays else 0

    @property
    def weight(self) -> tuple[int | None, ...]:
        """The shape of the adapted weight; None where no stored array has an axis of that length."""
        axes = self.static["axes"]
        if "a" not in self.arrays:
            out = iter(self.arrays["rows"].shape[1:])
            return tuple(next(out) if role == "out" else None for role in axes)
        a, b = self.arrays["a"].shape, self.arrays["b"].shape
        stack = len(positions(axes, "stack"))
        sizes = {"stack": iter(a[:stack]), "in": iter(a[stack:-1]), "out": iter(b[stack + 1 :])}
        return tuple(next(sizes[role]) for role in axes)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file. Alpha is told for people, as that which gives the scale by the plain rule."""
        scale = self.static["scale"]
        alpha = scale * self.rank if isinstance(scale, float) else None
        plain = {name: list(x) if isinstance(x, tuple) else x for name, x in self.static.items()}
        said = {name: x for name, x in plain.items() if name in _ALWAYS or x != _DEFAULTS[name]}
        told = {
            "rank": self.rank,
            "alpha": alpha,
            "scaling": "scale = alpha / rank",
            **said,
            "weight": list(self.weight),
        }
        return told | {name: array.to_json() for name, array in self.arrays.items()}

    @classmethod
    def from_json(cls, value: Any, path: str) -> AdapterEntry:
        """The reverse of `to_json`."""
        arrays = {name: Array.from_json(field) for name, field in value.items() if isinstance(field, dict)}
        told = ("rank", "alpha", "scaling", "weight")
        static = {name: field for name, field in value.items() if name not in arrays and name not in told}
        weight = tuple(_of((int, type(None)), size, "a size") for size in value["weight"])
        if unknown := {*static, *arrays} - _DEFAULTS.keys():
            raise ValueError(f"{min(unknown)!r} is no field of lojax.Adapter: perhaps a newer lojax wrote it")
        static = {name: static.get(name, _DEFAULTS[name]) for name in _STATIC}
        static["axes"] = check(_of(list, static["axes"], "axes"), weight, path)
        static["dropout"] = float(_of((int, float), static["dropout"], "dropout"))
        static["scale"] = _scale(static["scale"])
        static["frozen_a"] = bool(static["frozen_a"])
        for name in ("tokens", "ranks"):
            if static[name] is not None:
                static[name] = tuple(_of(int, i, name) for i in _of(list, static[name], name))
        if ("a" in arrays) != ("b" in arrays) or not arrays:
            raise KeyError("b" if "a" in arrays else "a")
        if ("rows" in arrays) != (static["tokens"] is not None):
            raise ValueError("rows and tokens go together")
        known = tuple(size or 0 for size in weight)
        expected = array_shapes(static["axes"], known, value["rank"], len(static["tokens"] or ()))
        for name, array in arrays.items():
            if array.shape != expected[name]:
                raise ValueError(f"{name} has another shape than rank, axes and weight say: {expected[name]}")
        return cls(static, arrays)


def _scale(value: Any) -> float | tuple[float, ...]:
    if isinstance(value, list):
        return tuple(float(_of((int, float), x, "scale")) for x in value)
    return float(_of((int, float), value, "scale"))


@dataclasses.dataclass(frozen=True)
class Record:
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
    full: Mapping[str, Array]
    other: tuple[str, ...]
    keys: Mapping[str, tuple[str | int, ...]]
    base: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    software: Mapping[str, str] = dataclasses.field(default_factory=lambda: _versions())
    saved: str = dataclasses.field(default_factory=lambda: _now())

    @property
    def stored(self) -> dict[str, tuple[str, str | None, Array]]:
        """Every stored array by the name that orbax knows: ``(path, field, array)``."""
        found = [(path, field, array) for path, e in self.adapters.items() for field, array in e.arrays.items()]
        found += [(path, None, array) for path, array in self.full.items()]
        return {stored_name(path, field): (path, field, array) for path, field, array in found}

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of the tree."""
        return (*self.adapters, *self.full, *self.other)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file, less the checksum."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "saved": self.saved,
            "software": self.software,
            "metadata": self.metadata,
            "adapters": {path: entry.to_json() for path, entry in self.adapters.items()},
            "full": {path: entry.to_json() for path, entry in self.full.items()},
            "other": self.other,
            "keys": self.keys,
            "base": self.base,
            "arrays": self.arrays,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], file: Any) -> Record:
        """The reverse of `to_json`, for every version up to `VERSION`.

        Raises:
            ValueError: The file is of another format, a newer version, or breaks its own rules.
        """
        if value.get("format") != FORMAT:
            raise ValueError(f"{file}: format {value.get('format')!r}, expected {FORMAT!r}.")
        if not isinstance(value.get("version"), int) or not 1 <= value["version"] <= VERSION:
            raise ValueError(
                f"{file}: format version {value.get('version')!r}; this lojax reads versions 1 to {VERSION}. "
                "It was written by a newer lojax: update lojax to read it."
            )
        place = "the file"
        try:
            fields: dict[str, Any] = {field.name: value[field.name] for field in dataclasses.fields(cls)}
            for place, file_entry in _of(dict, fields["files"], "files").items():
                _check_file(place, file_entry)
            place = "arrays"
            if not re.fullmatch(r"arrays-\d{1,18}", _of(str, fields["arrays"], "arrays")):
                raise ValueError(f"arrays is {fields['arrays']!r}, expected a name such as 'arrays-1'")
            for kind, read in (("adapters", AdapterEntry.from_json), ("full", lambda entry, _: Array.from_json(entry))):
                entries = {}
                for place, entry in _of(dict, fields[kind], kind).items():
                    entries[place] = read(entry, place)
                fields[kind] = entries
            place = "other"
            fields["other"] = tuple(_of(str, path, "a path") for path in fields["other"])
            place = "keys"
            fields["keys"] = {
                path: tuple(_of((int, str), key, "a key") for key in keys) for path, keys in fields["keys"].items()
            }
            place = "base"
            for entry in _of(dict, {} if fields["base"] is None else fields["base"], "base").values():
                _of((str, type(None)), entry and entry["spec"], "spec")
            record = cls(**fields)
            if len(set(record.paths)) != len(record.paths):
                raise ValueError("a path occurs twice")
        except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{file}: {place!r} is not as lojax writes it: {reason}. Nothing was loaded.") from error
        return record


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


def _check_file(name: str, entry: Any) -> None:
    _of(int, entry["bytes"], "bytes")
    _of(str, entry["blake2b"], "blake2b")
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", name):
        raise ValueError("a file name must stay inside the folder of the arrays")


def _of(kind: Callable[..., _T] | tuple[type, ...], value: Any, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]
        raise TypeError(f"{what} is {value!r}")
    return value


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in _SOFTWARE}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
