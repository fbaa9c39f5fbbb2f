"""The fingerprint of a base: what an adapter was trained on, so that it is never put on something else.

It holds the structure, shape and dtype of every parameter in `frozen`, and the content of the weights
that carry an adapter (see `lojax.checkpoint.digest`). A parameter trained in full is None in `frozen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath

import jax
import numpy as np

from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.checkpoint.codec import check_paths
from lojax.checkpoint.digest import digests
from lojax.checkpoint.manifest import BaseEntry, Manifest
from lojax.text import spec
from lojax.types import Leaf, Params, Path, Shape

_REMEDY = "Load the right base, or pass check_base=False to use this one all the same."


def fingerprint(frozen: Params, adapted: Iterable[Path]) -> dict[Path, BaseEntry | None]:
    """The fingerprint of ``frozen``, with the content of the weights at the ``adapted`` paths.

    Returns:
        The entries by path; None where ``frozen`` holds None.
    """
    leaves = flatten(frozen)
    contents = _contents(leaves, adapted)
    specs = {path: describe_leaf(leaf) for path, leaf in leaves.items()}
    return {path: BaseEntry(text, contents.get(path)) if text else None for path, text in specs.items()}


def describe_leaf(leaf: Leaf) -> str | None:
    """Dtype and shape in one word, ``float32[768,768]``; of all its arrays for a leaf that is a tree; or None.

    >>> describe_leaf(np.zeros((4, 3), np.float16))
    'float16[4,3]'
    """
    arrays = jax.tree.leaves(unbox(leaf))
    return " ".join(spec(array if hasattr(array, "dtype") else np.asarray(array)) for array in arrays) or None


def _contents(leaves: Mapping[Path, Leaf], adapted: Iterable[Path]) -> dict[Path, str]:
    """The digest of each adapted weight that holds values; a weight of several arrays has several, in one word."""
    arrays = {path: jax.tree.leaves(unbox(leaves[path])) for path in adapted}
    arrays = {path: of for path, of in arrays.items() if all(isinstance(x, (jax.Array, np.ndarray)) for x in of)}
    values = digests({f"{path}:{i}": array for path, of in arrays.items() for i, array in enumerate(of)})
    return {path: "-".join(values[f"{path}:{i}"] for i in range(len(of))) for path, of in arrays.items()}


def check_base(manifest: Manifest, frozen: Params, directory: FilePath) -> None:
    """Raises unless ``frozen`` is the base that the adapter was trained on.

    Shapes (`jax.ShapeDtypeStruct`) are enough; then the content is not compared.

    Raises:
        ValueError: Names the first path that differs, what was expected, what it holds, and what to do.
    """
    leaves, base = flatten(frozen), manifest.base or {}
    check_paths(manifest, leaves, "frozen", directory)
    for path, leaf in leaves.items():
        got = describe_leaf(leaf)
        if path in manifest.full and got is not None:
            raise ValueError(
                f"{path}: was trained in full, so frozen must hold None there, but it holds {got}. "
                "Pass the frozen tree that model.init returned, with the targets of the save."
            )
        entry = base.get(path)
        expected = got if entry is None else entry.spec
        if got != expected:
            raise ValueError(
                f"{path}: the adapter in {directory} was trained on {expected}, but frozen holds {got}. {_REMEDY}"
            )
    expected_contents = {path: entry.content for path, entry in base.items() if entry and entry.content}
    for path, content in _contents(leaves, expected_contents).items():
        if content != expected_contents[path]:
            raise ValueError(
                f"{path}: frozen holds other values than the base that the adapter in {directory} was trained on: "
                f"same shape ({describe_leaf(leaves[path])}), content {content}, expected {expected_contents[path]}. "
                f"{_REMEDY}"
            )


def check_fits(manifest: Manifest, frozen: Params, directory: FilePath) -> None:
    """Raises unless every adapter has a weight of its shape in ``frozen``: what no override can waive."""
    leaves = flatten(frozen)
    if not leaves.keys() >= {*manifest.adapters, *manifest.full}:
        check_paths(manifest, leaves, "frozen", directory)
    for path, entry in manifest.adapters.items():
        shape = None if leaves[path] is None else np.shape(unbox(leaves[path]))
        if shape is None or not _matches(shape, entry.weight_shape):
            raise ValueError(
                f"{path}: the adapter in {directory} is for a weight of shape {entry.weight_shape}, but frozen holds "
                f"{'None' if shape is None else f'shape {shape}'}. It was made for another model."
            )


def _matches(shape: Shape, pattern: tuple[int | None, ...]) -> bool:
    return len(shape) == len(pattern) and all(n in (None, size) for size, n in zip(shape, pattern, strict=True))
