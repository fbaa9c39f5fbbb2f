"""Every public name that takes a ``lora`` tree, given a bank: it works, or says to index one."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import message

import lojax
from tests.helpers import trained

PARAMS = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.zeros(3)}
PAIRS = [lojax.init(jax.random.key(i), PARAMS, "w", rank=i + 1) for i in range(3)]
FROZEN = PAIRS[0][0]
BANK = lojax.stack([trained(lora, i) for i, (_, lora) in enumerate(PAIRS)])
ONE = BANK[0]
X = jnp.ones((2, 4))
MODEL = lojax.wrap(lambda params, x: x @ params["w"] + params["bias"], "w")
QUANTIZED = lojax.quantize({"w": jnp.ones((64, 4)), "bias": jnp.zeros(4)})


def _nnx_model():
    model = lojax.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), "kernel")
    frozen, lora = model.init(jax.random.key(0), model.params, X)
    return model, frozen, lojax.stack([lora, lora])


REFUSED = {
    "transform": lambda tmp: lojax.transform(lambda params, x: x @ params["w"])(FROZEN, BANK, X),
    "merge": lambda tmp: lojax.merge(FROZEN, BANK),
    "unmerge": lambda tmp: lojax.unmerge(PARAMS, BANK),
    "requantization_loss": lambda tmp: lojax.requantization_loss(FROZEN, BANK),
    "resize": lambda tmp: lojax.resize(BANK, 1),
    "rescale": lambda tmp: lojax.rescale(BANK, 0.5),
    "trim": lambda tmp: lojax.trim(BANK),
    "tame": lambda tmp: lojax.tame(FROZEN, BANK),
    "extract like": lambda tmp: lojax.extract(PARAMS, PARAMS, rank=1, like=BANK),
    "subtract": lambda tmp: lojax.subtract(BANK, ONE),
    "subtract other": lambda tmp: lojax.subtract(ONE, BANK),
    "combine one of": lambda tmp: lojax.combine([ONE, BANK], [1.0, 1.0]),
    "advise": lambda tmp: lojax.advise(FROZEN, BANK),
    "analyze": lambda tmp: lojax.analyze(FROZEN, BANK),
    "analyze without a base": lambda tmp: lojax.analyze(None, BANK),
    "similarity": lambda tmp: lojax.similarity(BANK, ONE),
    "similarity other": lambda tmp: lojax.similarity(ONE, BANK),
    "eva": lambda tmp: lojax.eva(MODEL.apply, FROZEN, BANK, [X]),
    "lora_ga": lambda tmp: lojax.lora_ga(lambda f, t, x: MODEL.apply(f, t, x).sum(), FROZEN, BANK, [X]),
    "peft.save": lambda tmp: lojax.peft.save(tmp / "peft", BANK, FROZEN, "llama"),
    "Model.apply": lambda tmp: MODEL.apply(FROZEN, BANK, X),
    "Model.merge": lambda tmp: MODEL.merge(FROZEN, BANK),
    "Model.report": lambda tmp: MODEL.report(FROZEN, BANK, X),
    "Model.as_nnx": lambda tmp: (lambda model, *pair: model.as_nnx(*pair))(*_nnx_model()),
}

WORKS = {
    "combine": lambda tmp: lojax.combine(BANK, [1.0, 0.5, 0.25]),
    "optimizer": lambda tmp: lojax.optimizer(optax.adam(1.0)).init(BANK),
    "save": lambda tmp: lojax.save(tmp / "bank", BANK, frozen=FROZEN, start=None),
    "restore": lambda tmp: lojax.restore(lojax.save(tmp, BANK) and tmp, like=BANK),
    "summary": lambda tmp: lojax.summary(FROZEN, BANK),
    "stack": lambda tmp: lojax.stack([*BANK, ONE]),
    "unstack": lambda tmp: lojax.unstack(BANK),
    "peft.freeze": lambda tmp: lojax.peft.freeze(PARAMS, BANK),
    "sharding.shardings": lambda tmp: lojax.sharding.shardings(FROZEN, BANK, mesh=jax.make_mesh((1,), ("x",))),
    "sharding.check_agreement": lambda tmp: lojax.sharding.check_agreement(BANK),
    "Model.apply with adapter": lambda tmp: MODEL.apply(FROZEN, BANK, X, adapter=[0, -1]),
    "Model.report with adapter": lambda tmp: MODEL.report(FROZEN, BANK, X, adapter=[0, -1]),
}

WITHOUT_LORA = {"Adapter", "Advice", "Analysis", "Bank", "Model", "Quantized", "Rule", "Similarity"} | {
    *("init", "load_bitsandbytes", "quantize", "read_metadata", "wrap")
}
"""Names that take no ``lora`` tree; those of `Model` are in the tables. `remat` is a module of policies."""
ELSEWHERE = {"Sweep", "SweepState", "active_tokens", "conform", "sweep"}
"""Tested beside their own module."""


def test_the_tables_name_every_public_function():
    tested = {name.split(" ")[0].split(".")[0] for name in (*REFUSED, *WORKS)}
    assert tested | WITHOUT_LORA | ELSEWHERE | {"remat"} == set(lojax.__all__)
    takes = {
        f"{where.__name__.split('.')[-1]}.{name}"
        for where in (lojax.peft, lojax.sharding)
        for name in where.__all__
        if inspect.isfunction(f := getattr(where, name)) and "lora" in inspect.signature(f).parameters
    }
    takes |= {f"Model.{n}" for n, f in vars(lojax.Model).items() if "lora" in getattr(f, "__annotations__", {})}
    assert takes <= {name.split(" ")[0] for name in (*REFUSED, *WORKS)}, "a function that takes lora is in no table"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_remedy(tmp_path, name):
    text = message(ValueError, REFUSED[name], tmp_path)
    size = 2 if name == "Model.as_nnx" else 3
    assert f" is a stack of {size} adapters: index one, as bank[0]" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WORKS)
def test_works(tmp_path, name):
    assert WORKS[name](tmp_path) is not False


def test_combine_of_a_bank_is_that_of_its_adapters():
    expected = lojax.combine([*BANK], [1.0, 0.5, 0.25])
    got = lojax.combine(BANK, [1.0, 0.5, 0.25])
    np.testing.assert_array_equal(lojax.merge(FROZEN, got)["w"], lojax.merge(FROZEN, expected)["w"])


def test_peft_freeze_gives_the_base_beside_a_bank():
    loras = [lojax.init(jax.random.key(i), PARAMS, "w", rank=1, train="bias")[1] for i in range(2)]
    frozen = lojax.peft.freeze(PARAMS, lojax.stack(loras))
    assert frozen["bias"] is None and frozen["w"] is PARAMS["w"]
