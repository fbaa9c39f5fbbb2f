"""What may be a leaf of a parameter tree."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lojax import Adapter
from lojax.adapters.leaves import check_leaf
from tests.helpers import message

ADAPTER = Adapter(a=np.ones((3, 1)), b=np.ones((1, 2)), scale=1.0, axes=("in", "out"))


@pytest.mark.parametrize(
    "leaf",
    [
        *(None, 0.5, 1, True, 1j, np.float32(2)),
        *(np.ones(3), jnp.ones(3), jnp.ones(2, jnp.float8_e4m3fn), jax.ShapeDtypeStruct((2,), jnp.bfloat16)),
        *(jax.random.key(0), nn.Partitioned(jnp.ones(3), ("x",))),
    ],
    ids=repr,
)
def test_arrays_numbers_and_none(leaf):
    check_leaf("path", leaf, "params")


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        ("bert", "a/b: params holds 'bert' (str), which is neither an array nor a number. Take it out of the tree."),
        (np.array("bert"), "a/b: params holds array('bert', dtype='<U4') (ndarray), which"),
        (np.array([object()]), "a/b: params holds array([<object"),
        (print, "a/b: params holds <built-in function print> (builtin_function_or_method), which"),
        (nn.Partitioned("bert", ("x",)), "a/b: params holds 'bert' (str), which"),
        (
            np.zeros(3, [("x", "f4")]),
            "a/b: params holds ndarray [('x', '<f4')][3], which JAX does not take as an array.",
        ),
        (np.ma.ones(3), "a/b: params holds MaskedArray float64[3], which JAX does not take as an array. Convert it"),
        (Fraction(1, 2), "a/b: params holds Fraction(1, 2), which JAX does not take as an array. Convert it, such as"),
        ("x" * 1000, "a/b: params holds '" + "x" * 79 + "… (str), which"),
        (ADAPTER, "a/b: params holds an adapter, which belongs in lora."),
    ],
    ids=[
        "string",
        "array of strings",
        "array of objects",
        "function",
        "box",
        "records",
        "masked",
        "fraction",
        "long",
        "adapter",
    ],
)
def test_anything_else_is_named_with_its_path(leaf, text):
    assert message(TypeError, check_leaf, "a/b", leaf, "params").startswith(text)
