"""The fingerprint of a base: what an adapter was trained on, so that it is never put on something else.

It holds the structure, shape and dtype of every parameter in `frozen`, and the content (see `lojax.checkpoint.digest`)
of the weights that carry an adapter and of every floating-point vector: biases, norms, batch statistics. Those are
small, and change when a base is trained further. A parameter trained in full is None in `frozen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.adapters.trees import unpacked_shape
from lojax.checkpoint.codec import check_paths
from lojax.checkpoint.digest import digests
from lojax.checkpoint.manifest import BaseEntry, Manifest
from lojax.text import spec
from lojax.types import ArrayLike, Leaf, Params, Path, Shape

_REMEDY = "Load the right base, or pass check_base=False to use this one all the same."


def fingerprint(frozen: Params, adapted: Iterable[Path]) -> dict[Path, BaseEntry | None]:
    """The fingerprint of ``frozen``, with the content of the weights at the ``adapted`` paths and of all vectors.

    Returns:
        The entries by path; None where ``frozen`` holds None.
    """
    leaves = flatten(frozen)
    vectors = (path for path, leaf in leaves.items() if _is_vector(leaf))
    contents = _contents(leaves, dict.fromkeys([*adapted, *vectors]))
    specs = {path: describe_leaf(leaf) for path, leaf in leaves.items()}
    return {path: BaseEntry(text, contents.get(path)) if text else None for path, text in specs.items()}


def restrict(
    base: Mapping[Path, BaseEntry | None], frozen: Params, adapted: Iterable[Path]
) -> dict[Path, BaseEntry | None]:
    """The fingerprint for fewer ``adapted`` paths than ``base`` was made for."""
    leaves, adapted = flatten(frozen), set(adapted)
    return {
        path: entry if entry is None or path in adapted or _is_vector(leaves[path]) else BaseEntry(entry.spec)
        for path, entry in base.items()
    }


def describe_leaf(leaf: Leaf) -> str | None:
    """Dtype and shape in one word, ``float32[768,768]``; of all its arrays for a leaf that is a tree; or None.

    >>> describe_leaf(np.zeros((4, 3), np.float16))
    'float16[4,3]'
    """
    arrays = jax.tree.leaves(unbox(leaf))
    return " ".join(spec(array if hasattr(array, "dtype") else np.asarray(array)) for array in arrays) or None


def _contents(
    leaves: Mapping[Path, Leaf], adapted: Iterable[Path], known: dict[Path, str] | None = None
) -> dict[Path, str]:
    """The digest of each adapted weight that holds values; a weight of several arrays has several, in one word.

    Args:
        leaves: The weights by path.
        adapted: Those that count.
        known: Digests of other calls for the same ``leaves``; those of this one are added.
    """
    arrays = {path: values for path in adapted if (values := _values(leaves[path]))}
    contents = {} if known is None else known
    new = {path: of for path, of in arrays.items() if path not in contents}
    results = digests({f"{path}:{i}": array for path, of in new.items() for i, array in enumerate(of)})
    contents |= {path: "-".join(results[f"{path}:{i}"] for i in range(len(of))) for path, of in new.items()}
    return {path: contents[path] for path in arrays}


def _values(leaf: Leaf) -> list[ArrayLike]:
    """The arrays of a leaf; none where it only has shapes."""
    arrays = jax.tree.leaves(unbox(leaf))
    return arrays if all(isinstance(array, (jax.Array, np.ndarray)) for array in arrays) else []


def _is_vector(leaf: Leaf) -> bool:
    """Whether a leaf is one floating-point array of at most one axis."""
    array = unbox(leaf)
    return isinstance(array, (jax.Array, np.ndarray)) and array.ndim <= 1 and jnp.issubdtype(array.dtype, jnp.floating)


def check_base(manifest: Manifest, frozen: Params, directory: FilePath, known: dict[Path, str] | None = None) -> None:
    """Raises unless ``frozen`` is the base that the adapter was trained on.

    Shapes (`jax.ShapeDtypeStruct`) are enough; then the content is not compared.

    Args:
        manifest: That of the adapter.
        frozen: The base.
        directory: The checkpoint, for errors.
        known: The digests that calls for other adapters of the same base have computed; new ones are added.

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
                "Pass the frozen tree that model.init returned, with the targets= and train= of the save."
            )
        entry = base.get(path)
        expected = got if entry is None else entry.spec
        if got is None and expected is not None:
            raise ValueError(
                f"{path}: frozen holds None, so this init trains it in full, but it was frozen ({expected}) when the "
                f"adapter in {directory} was saved. Pass the frozen tree of an init with the targets= and train= of "
                "the save."
            )
        if got != expected:
            raise ValueError(
                f"{path}: the adapter in {directory} was trained on {expected}, but frozen holds {got}. {_REMEDY}"
            )
    expected_contents = {path: entry.content for path, entry in base.items() if entry and entry.content}
    for path, content in _contents(leaves, expected_contents, known).items():
        if content != expected_contents[path]:
            raise ValueError(
                f"{path}: frozen holds other values than the base that the adapter in {directory} was trained on: "
                f"same shape ({describe_leaf(leaves[path])}), content {content}, expected {expected_contents[path]}. "
                f"{_explain_move(manifest.adapters.get(path)) or _REMEDY}"
            )
    for path, adapter in manifest.adapters.items():
        reason = _explain_move(adapter)
        if reason and path not in expected_contents and _values(leaves[path]):
            raise ValueError(
                f"{path}: {directory} was saved without frozen=, so nobody can tell whether frozen holds the weight "
                f"that its adapter belongs to. {reason} If frozen is that tree, pass check_base=False."
            )


def _explain_move(adapter: Adapter | None) -> str | None:
    """What to do about an adapter whose start was taken out of its weight; None for any other."""
    if adapter is None or adapter.moved_base is None:
        return None
    return (
        f"The start of this adapter ({adapter.moved_base}) was taken out of its weight, so it belongs to the frozen "
        "tree that init returned with it, and is wrong on the pretrained weight. Restore it onto that tree (the same "
        "init with the same key gives it again), or save an adapter for the pretrained weight: "
        "lojax.save(path, lora, frozen=frozen, start=start), start being the lora tree of that init."
    )


def check_fits(manifest: Manifest, frozen: Params, directory: FilePath) -> None:
    """Raises unless every adapter has a weight of its shape in ``frozen``: what no override can waive."""
    leaves = flatten(frozen)
    if not leaves.keys() >= {*manifest.adapters, *manifest.full}:
        check_paths(manifest, leaves, "frozen", directory)
    for path, entry in manifest.adapters.items():
        weight = unbox(leaves[path])
        if weight is None or not _matches(unpacked_shape(weight, entry.weight_shape), entry.weight_shape):
            got = "None: this init trains it in full" if weight is None else f"shape {np.shape(weight)}"
            raise ValueError(
                f"{path}: the adapter in {directory} is for a weight of shape {entry.weight_shape}, but frozen holds "
                f"{got}. Pass the frozen tree of the model and the targets of the save."
            )


def _matches(shape: Shape, pattern: tuple[int | None, ...]) -> bool:
    return len(shape) == len(pattern) and all(n in (None, size) for size, n in zip(shape, pattern, strict=True))
