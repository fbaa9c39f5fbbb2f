"""The adapters of a bank as shapes, and a bank in the hands of what writes pytrees."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import serialization
from helpers import assert_same_bits, message

import lojax
from lojax.adapters.bank_shapes import check_bank_pair, entry_shapes
from lojax.text import spec
from tests.checkpoint import bank_cases

CASES = pytest.mark.parametrize("name", bank_cases.CASES)


@CASES
def test_shapes_are_those_of_the_adapters(name):
    _, bank = bank_cases.CASES[name]()
    expected = [*bank]
    for got in (entry_shapes(bank), entry_shapes(jax.eval_shape(lambda: bank))):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        assert [spec(x) for x in jax.tree.leaves(got)] == [spec(x) for x in jax.tree.leaves(expected)]


@CASES
def test_a_bank_fits_its_base(name):
    frozen, bank = bank_cases.CASES[name]()
    check_bank_pair(frozen, bank)
    check_bank_pair(jax.eval_shape(lambda: frozen), jax.eval_shape(lambda: bank))


def test_a_bank_that_does_not_fit():
    frozen, bank = bank_cases.plain()
    text = message(ValueError, check_bank_pair, {**frozen, "blocks": [frozen["blocks"][0], jnp.ones((9, 6))]}, bank)
    assert text.startswith("blocks/1: a weight of shape (9, 6)")
    text = message(ValueError, check_bank_pair, frozen, jax.tree.map(lambda x: x[:2], bank))
    assert "of a bank of 3 adapters have a first axis of that length, and one here has 2" in text
    assert "different structure" in message(ValueError, check_bank_pair, {"w": jnp.ones(3)}, bank)


# --- pytrees that are written ---


@CASES
def test_flax_writes_and_reads_it(name):
    _, bank = bank_cases.CASES[name]()
    state = serialization.msgpack_restore(serialization.to_bytes(bank))
    assert state.keys() == {"lora"}
    zeros = jax.tree.map(jnp.zeros_like, bank)
    restored = serialization.from_state_dict(zeros, state)
    assert_same_bits(jax.tree.map(jnp.asarray, restored), bank)
    assert restored.names == bank.names


def test_flax_refuses_what_is_no_bank():
    _, bank = bank_cases.plain()
    state = serialization.to_state_dict(bank[0])
    assert "the target is a bank" in message(ValueError, serialization.from_state_dict, bank, state)
    smaller = lojax.stack([lojax.resize(one, 1) for one in bank])
    with pytest.raises(ValueError, match="has shape"):
        serialization.from_state_dict(smaller, serialization.to_state_dict(bank))


@CASES
def test_jax_exports_functions_of_it(name):
    _, bank = bank_cases.CASES[name]()
    pytest.importorskip("flatbuffers")
    if name == "boxed":
        pytest.skip("JAX does not export the boxes of Flax")
    exported = jax.export.export(jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree)))(bank)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.in_tree == exported.in_tree == jax.tree.structure(((bank,), {}))
    assert_same_bits(loaded.call(bank), jax.tree.map(lambda x: x + 1, bank))


@CASES
def test_it_can_be_pickled_copied_and_mapped(name):
    _, bank = bank_cases.CASES[name]()
    pickled, mapped = pickle.loads(pickle.dumps(bank)), jax.tree.map(lambda x: x, bank)
    for other in (pickled, mapped, copy.deepcopy(bank), copy.copy(bank)):
        assert isinstance(other, lojax.Bank)
        assert_same_bits(other, bank)
