"""One net of the zoo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """A net, its parameters, one input, and how the net's own library computes its output from parameters."""

    net: Any
    params: Any
    native: Callable[[Any], Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: What the row is called.
        library: The library of the net; the row is skipped where ``requires`` is not installed.
        build: Makes the example.
        targets: As in `lojax.wrap`; every weight that can be adapted, unless the row says otherwise.
        count: How many weights the targets are.
        materialized: The weights that cannot stay factored, with a part of the reason that the report gives.
        promotion: The dtype promotion that the net's own code needs.
        flops: An upper bound of the FLOPs of a gradient step, as a share of the materialized step.
        rows: Whether each row of a batch may have an adapter of its own: the leading axis of the arguments is the
            batch, rows do not meet, and none draws random numbers.
        slow: Whether only ``.ci/thorough`` proves it.
    """

    name: str
    library: str
    build: Callable[[], Example]
    targets: Any
    count: int
    requires: str = "jax"
    rank: int = 2
    materialized: Mapping[str, str] = dataclasses.field(default_factory=dict)
    promotion: Literal["strict", "standard"] = "strict"
    flops: float | None = None
    rows: bool = True
    slow: bool = False


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """A float32 array from NumPy's generator: nothing to compile."""
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens(seed: int, high: int, *shape: int) -> jax.Array:
    """Token ids below ``high``."""
    return jnp.asarray(np.random.default_rng(seed).integers(high, size=shape), jnp.int32)


def fill(tree: Any, scale: float = 0.2) -> Any:
    """Random values for a tree of shapes, where a library's own random init would compile for seconds.

    A norm's scale stays near one and a variance above zero; keys and counts start as they would.
    """
    rng = np.random.default_rng(0)

    def fill_leaf(keys: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        noise = scale * rng.standard_normal(leaf.shape)
        name = jax.tree_util.keystr(keys[-1:], simple=True)
        if name in ("scale", "var") or (name == "weight" and len(leaf.shape) == 1):
            noise = 1 + np.abs(noise)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill_leaf, tree)
