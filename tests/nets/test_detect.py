"""What `wrap` takes for a net, and what it says of everything else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lojax
from lojax.nets.detect import KINDS, as_net
from lojax.nets.function import FunctionNet
from tests.helpers import message


def refusal(net: Any) -> str:
    return message(TypeError, lojax.wrap, net, "**/kernel")


def test_a_net_of_no_kind_is_told_all_kinds() -> None:
    text = refusal({"kernel": 1})
    assert text == f"lojax.wrap takes {KINDS}; got dict: {{'kernel': 1}}."
    assert all(kind in text for kind in ("Linen", "NNX", "Haiku", "Equinox", "transformers", "function"))


def test_a_long_repr_is_cut() -> None:
    assert len(refusal([0] * 10_000)) < 500


@pytest.mark.parametrize("cls", [nn.Dense, nnx.Linear, dict])
def test_a_class_is_no_net(cls: type) -> None:
    assert refusal(cls).endswith("That is a class: pass an instance.")


def test_a_split_nnx_module_is_to_be_merged() -> None:
    split = nnx.split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    for net in (split, *split):
        assert refusal(net).endswith("already split: pass the module itself, nnx.merge(graphdef, *states).")


def test_a_haiku_multi_transform_is_to_be_one_function() -> None:
    hk = pytest.importorskip("haiku")
    net = hk.multi_transform(lambda: (lambda x: x, {"f": lambda x: x}))
    assert "lambda params, *args: net.apply.name(params, *args)" in refusal(net)


def test_a_torch_module_belongs_elsewhere() -> None:
    torch = pytest.importorskip("torch")
    assert refusal(torch.nn.Linear(2, 2)).endswith("lojax adapts JAX programs. Hugging Face PEFT adapts this one.")


def test_a_keras_model_has_a_function() -> None:
    class Layer:
        def __call__(self) -> None: ...

    Layer.__module__ = "keras.src.layers.layer"
    assert "lambda params, x: net.stateless_call(params" in refusal(Layer())


def test_an_equinox_wrapper_of_a_function_is_a_function() -> None:
    eqx = pytest.importorskip("equinox")
    net = eqx.filter_jit(lambda params, x: x @ params["w"])
    assert isinstance(as_net(net), FunctionNet)
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
    model = lojax.wrap(net, "w", rank=1, strict=True)
    assert model.apply(*model.init(jax.random.key(0), params, x), x).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("net", [lambda params: params, nn.Dense(2)])
def test_nets_without_parameters_say_so(net: Any) -> None:
    model = lojax.wrap(net, "**/kernel")
    assert "holds no parameters" in message(AttributeError, getattr, model, "params")
    params = {"a": jnp.ones(2)}
    assert model.bind(params) is params
