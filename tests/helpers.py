"""What several test files need. A helper that finds something wrong raises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.metadata import rebox, unbox


def message(kind: type[Exception], f: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The text of the exception of exactly this kind that ``f`` raises."""
    with pytest.raises(kind) as caught:
        f(*args, **kwargs)
    assert caught.type is kind, f"expected {kind.__name__}, got {caught.type.__name__}"
    return str(caught.value)


def trained(lora: Any, seed: int = 7) -> Any:
    """``lora`` as after some training: ``b`` random instead of zero."""
    rng = np.random.default_rng(seed)

    def move(node: Any) -> Any:
        if not is_adapter(node):
            return node
        b = unbox(node.b)
        return dataclasses.replace(node, b=rebox(node.b, jax.numpy.asarray(rng.normal(size=b.shape), b.dtype)))

    moved = jax.tree.map(move, lora, is_leaf=is_adapter)
    assert any(isinstance(node, Adapter) for node in jax.tree.leaves(moved, is_leaf=is_adapter)), "no adapter to train"
    return moved


def assert_same_bits(left: Any, right: Any) -> None:
    """Both trees have the same structure, shapes, dtypes and bits (-0.0 is not 0.0)."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (keys, x), y in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), jax.tree_util.keystr(keys)
        assert x.tobytes() == y.tobytes(), f"{jax.tree_util.keystr(keys)} differs"


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of its sub-jaxprs and of `written_out` products included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name.startswith("lojax_adapted_product"):
            yield from equations(written_out(eqn))
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
                yield from equations(value)


def written_out(eqn: Any) -> Any:
    """What a primitive of adapted products computes on a CPU, as a jaxpr."""
    return jax.make_jaxpr(lambda *operands: eqn.primitive.impl(*operands, **eqn.params))(*(v.aval for v in eqn.invars))


PRODUCTS = ("dot_general", "lojax_factor_product")
"""The primitives that are matrix products in a jaxpr."""


def products_of_shape(f: Callable[..., Any], shape: tuple[int, ...], *args: Any) -> list[Any]:
    """The `PRODUCTS` in ``f(*args)`` whose result has these axes, in any order."""
    found = [eqn for eqn in equations(jax.make_jaxpr(f)(*args)) if eqn.primitive.name in PRODUCTS]
    assert found, "the program has no product at all"
    return [eqn for eqn in found if sorted(eqn.outvars[0].aval.shape) == sorted(shape)]
