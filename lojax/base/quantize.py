"""Quantizing a base: a parameter tree whose large weights are stored in few bits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lojax.adapters.leaves import check_finite
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.rule import Rule, as_rules
from lojax.adapters.targets import match_rule
from lojax.quantized.formats import KINDS, make_format
from lojax.quantized.quantized import is_quantized, quantize_weight
from lojax.text import spec, suggest
from lojax.types import Leaf, Params, Path


def quantize(params: Params, kind: str = "nf4", targets: Any = None, *, block: int = 64, double: bool = True) -> Params:
    """``params`` with quantized weights, which lojax takes wherever it takes weights.

    A product with a quantized weight computes its values as a temporary, forward and again backward; what is saved for
    the backward pass is what is stored.

    Args:
        params: A parameter tree.
        kind: ``"nf4"``: 4 bits, quantiles of a normal distribution (QLoRA, arXiv:2305.14314); ``"int4"``: 4 bits,
            evenly spaced; both with a scale for each ``block`` entries of a flattened weight. ``"int8"`` and
            ``"float8_e4m3fn"``: 8 bits, with a scale for each entry of the last axis.
        targets: Which weights, as in `lojax.wrap`; None for every floating-point weight of two axes or more, but
            biases and what belongs to a norm (which have two axes where layers are stacked).
        block: The entries that share a scale, for kinds of 4 bits. The last block may be shorter.
        double: Whether the scales of blocks are quantized as well, to 8 bits in blocks of 256: 4.127 bits an entry
            instead of 4.5 for NF4.

    Returns:
        A tree of the same structure with a `Quantized` in the place of each of these weights. Weights are quantized
        one after another, so one weight at a time is there in float32.

    Raises:
        ValueError: ``kind`` is unknown, ``block`` is not a positive even number, or a target matches nothing, is
            quantized already, or holds NaN or infinity.
        TypeError: A target is not a floating-point array.

    >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
    >>> quantize(params, "nf4", double=False)["kernel"]
    Quantized((64, 64), nf4, float32, 4.5 bits)
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; expected one of {list(KINDS)}.{suggest(kind, KINDS)}")
    if not isinstance(block, int) or block < 2 or block % 2:
        raise ValueError(f"block={block!r}: expected a positive even number, such as 64 (two codes share a byte).")
    leaves = {path: unbox(leaf) for path, leaf in flatten(params).items() if leaf is not None}
    if targets is None:
        chosen = {path for path, leaf in leaves.items() if not is_quantized(leaf) and _is_weight(path, leaf)}
    else:
        chosen = {path for rule in as_rules(targets, Rule((), train="none")) for path in match_rule(rule, leaves)}
    for path in chosen:
        _check(path, leaves[path])

    def replace(path: Path, leaf: Leaf) -> Leaf:
        if path not in chosen:
            return leaf
        weight = unbox(leaf)
        check_finite(path, weight, "so would its scales be", "Load it again.")
        format = make_format(kind, block=block, double=double)
        return rebox(leaf, quantize_weight(weight, format))

    return map_paths(replace, params)


def _is_weight(path: Path, leaf: Leaf) -> bool:
    if path.rpartition("/")[2] in ("bias", "b", "scale") or "norm" in path.lower():
        return False
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and len(leaf.shape) >= 2


def _check(path: Path, leaf: Leaf) -> None:
    if is_quantized(leaf):
        raise ValueError(f"{path}: is quantized already ({leaf}). Quantize the original weights, or leave it out.")
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        got = spec(leaf) if hasattr(leaf, "dtype") else repr(leaf)
        raise TypeError(
            f"{path}: holds {got}, and only floating-point weights can be quantized. Leave it out of targets."
        )
