"""The fingerprint of a base: what an adapter was trained on, so that it is never put on something else.

It holds the structure, shape and dtype of every parameter in `frozen`, and the content of the weights
that carry an adapter (see `lojax.checkpoint.digest`). A parameter trained in full is None in `frozen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.checkpoint.codec import check_paths
from lojax.checkpoint.digest import digests
from lojax.checkpoint.manifest import Record


def fingerprint(frozen: Any, adapted: Iterable[str]) -> dict[str, Any]:
    """The fingerprint of ``frozen``, with the content of the weights at the ``adapted`` paths.

    Returns:
        ``{path: {"spec": "float32[768,768]", "content": digest}}``, plain data. Only adapted weights
        have ``content``; a path where ``frozen`` holds None has None.
    """
    leaves = flatten(frozen)
    content = _content(leaves, adapted)
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        told = {"spec": spec(leaf)} | ({"content": content[path]} if path in content else {})
        found[path] = told if told["spec"] else None
    return found


def spec(leaf: Any) -> str | None:
    """Dtype and shape in one word, ``float32[768,768]``; of all its parts for a leaf that is a tree; or None.

    >>> spec(np.zeros((4, 3), np.float16))
    'float16[4,3]'
    """
    return " ".join(_spec(part) for part in jax.tree.leaves(unbox(leaf))) or None


def _spec(part: Any) -> str:
    dtype = getattr(part, "dtype", None) or np.result_type(part)
    return f"{dtype}[{','.join(map(str, np.shape(part)))}]"


def _content(leaves: Mapping[str, Any], adapted: Iterable[str]) -> dict[str, str]:
    """The digest of each adapted weight; a weight of several arrays has several, in one word."""
    parts = {path: jax.tree.leaves(unbox(leaves[path])) for path in adapted}
    named = {f"{path}:{i}": part for path, found in parts.items() for i, part in enumerate(found)}
    named = {name: part for name, part in named.items() if isinstance(part, (jax.Array, np.ndarray))}
    known = digests(named)
    return {
        path: "-".join(known[f"{path}:{i}"] for i in range(len(found)))
        for path, found in parts.items()
        if all(f"{path}:{i}" in known for i in range(len(found)))
    }


def check_base(record: Record, frozen: Any, place: Any) -> None:
    """Raises unless ``frozen`` is the base that the adapter was trained on.

    Shapes (`jax.ShapeDtypeStruct`) are enough; then the content is not compared.

    Raises:
        ValueError: Names the first path that differs, what was expected, what was found, and what to do.
    """
    leaves, base = flatten(frozen), record.base or {}
    check_paths(record, leaves, "frozen", place)
    for path, leaf in leaves.items():
        got = spec(leaf)
        if path in record.full and got is not None:
            raise ValueError(
                f"{path}: was trained in full, so frozen must hold None there, but it holds {got}. "
                "Pass the frozen tree that model.init returned, with the targets of the save."
            )
        expected = (base.get(path) or {}).get("spec", got)
        if got != expected:
            raise ValueError(
                f"{path}: the adapter in {place} was trained on {expected}, but frozen holds {got}. {_FIX}"
            )
    known = {path: entry["content"] for path, entry in base.items() if (entry or {}).get("content")}
    for path, value in _content(leaves, known).items():
        if value != known[path]:
            raise ValueError(
                f"{path}: frozen holds other values than the base that the adapter in {place} was trained on: "
                f"same shape ({spec(leaves[path])}), content {value}, expected {known[path]}. {_FIX}"
            )


_FIX = "Load the right base, or pass check_base=False to use this one all the same."


def _alike(shape: tuple[int, ...], known: tuple[int | None, ...]) -> bool:
    return len(shape) == len(known) and all(k in (None, n) for n, k in zip(shape, known, strict=True))


def check_fits(record: Record, frozen: Any, place: Any) -> None:
    """Raises unless every adapter has a weight of its shape in ``frozen``: what no override can waive."""
    leaves = flatten(frozen)
    for path in (*record.adapters, *record.full):
        if path not in leaves:
            check_paths(record, leaves, "frozen", place)
    for path, entry in record.adapters.items():
        weight = unbox(leaves[path])
        if weight is None or not _alike(np.shape(weight), entry.weight):
            got = "None" if weight is None else f"shape {np.shape(weight)}"
            raise ValueError(
                f"{path}: the adapter in {place} is for a weight of shape {entry.weight}, but frozen holds {got}. "
                "It was made for another model."
            )
