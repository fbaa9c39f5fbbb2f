"""A bank, saved: back bit for bit, whole or one adapter of it, and never half."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, message, trained
from jax.sharding import NamedSharding, PartitionSpec

import lojax
from lojax.checkpoint import adapter_directory as files
from lojax.checkpoint import save_restore
from lojax.checkpoint.bank_manifest import read_bank_manifest
from tests.checkpoint import bank_cases as cases
from tests.checkpoint import checkpoint_cases

GOLDEN = Path(__file__).parent / "golden"


def _entry_folder(path, i):
    manifest = read_bank_manifest(path)
    return path / manifest.folder / manifest.entries[i].folder


# --- back, bit for bit ---


@pytest.mark.parametrize("name", cases.CASES)
def test_a_bank_comes_back_bit_for_bit(tmp_path, name):
    """The treedef holds names, ranks, scales, missing targets, boxes and all else that is static."""
    frozen, bank = cases.CASES[name]()
    lojax.save(tmp_path, bank, frozen=frozen)
    assert_same_bits(lojax.restore(tmp_path, frozen=frozen), bank)
    assert_same_bits(lojax.restore(tmp_path, like=bank), bank)
    assert_same_bits(lojax.restore(tmp_path, like=jax.eval_shape(lambda: bank), frozen=frozen), bank)
    assert isinstance(lojax.restore(tmp_path), lojax.Bank)


@pytest.mark.parametrize("name", cases.CASES)
def test_each_adapter_is_a_checkpoint_of_its_own(tmp_path, name):
    """As `save` would have written it: the oracle is one save for each adapter."""
    frozen, bank = cases.CASES[name]()
    lojax.save(tmp_path / "bank", bank, frozen=frozen, metadata={"step": 3})
    for i, one in enumerate(bank):
        lojax.save(tmp_path / str(i), one, frozen=frozen, metadata={"step": 3})
        folder = _entry_folder(tmp_path / "bank", i)
        expected, got = (save_restore.read_manifest(path).to_json() for path in (tmp_path / str(i), folder))
        for field in ("saved", "files", "arrays"):
            expected.pop(field), got.pop(field)
        assert expected == got
        for found in (
            lojax.restore(tmp_path / "bank", entry=i, frozen=frozen),
            lojax.restore(tmp_path / "bank", entry=i, like=one),
            lojax.restore(folder, frozen=frozen),
        ):
            assert_same_bits(found, one)


def test_one_adapter_is_read_without_the_others(tmp_path):
    frozen, bank = cases.plain()
    lojax.save(tmp_path, bank, frozen=frozen)
    for i in (0, 2):
        shutil.rmtree(_entry_folder(tmp_path, i))
    for entry in (1, -2, "../é", np.int64(1)):
        assert_same_bits(lojax.restore(tmp_path, entry=entry, frozen=frozen), bank[1])
    text = message(FileNotFoundError, lojax.restore, tmp_path, frozen=frozen)
    assert str(_entry_folder(tmp_path, 0)) in text


def test_folders_stay_inside_whatever_the_names_are(tmp_path):
    lojax.save(tmp_path, cases.plain()[1])
    manifest = read_bank_manifest(tmp_path)
    assert [entry.folder for entry in manifest.entries] == ["0-a_b", "1-..__", "2-A_B"]
    assert manifest.names == ("a/b", "../é", "A/B")
    assert sorted(os.listdir(tmp_path)) == ["bank-1", "bank.json"]


def test_names_are_none_where_there_are_none(tmp_path):
    bank = dataclasses.replace(cases.plain()[1], names=None)
    lojax.save(tmp_path, bank)
    restored = lojax.restore(tmp_path)
    assert restored.names is None and len(restored) == 3
    assert "it has no names" in message(KeyError, lojax.restore, tmp_path, entry="a")


def test_a_bank_of_one(tmp_path):
    bank = lojax.stack([checkpoint_cases.pair()[1]])
    lojax.save(tmp_path, bank)
    assert_same_bits(lojax.restore(tmp_path), bank)


def test_64_bits_stay_where_jax_has_none(tmp_path):
    bank = cases.at_step(1)
    full = {**bank.lora, "step": np.arange(9, dtype=np.int64).reshape(3, 3) << 40}
    lojax.save(tmp_path, dataclasses.replace(bank, lora=full))
    restored = lojax.restore(tmp_path).lora["step"]
    assert restored.dtype == np.int64 and restored.tolist() == full["step"].tolist()


def test_after_a_replacement_and_a_training_step(tmp_path):
    _, bank = cases.plain()
    bank = bank.replace(0, trained(jax.tree.map(lambda x: x, bank[0]), 9))
    bank = jax.tree.map(lambda x: x * 1.5, bank)
    lojax.save(tmp_path, bank)
    assert_same_bits(lojax.restore(tmp_path, like=bank), bank)


def test_sharded_arrays_and_a_sharding_of_the_reader(tmp_path):
    mesh = jax.make_mesh((2,), ("x",))
    bank = lojax.stack([checkpoint_cases.pair(i)[1] for i in range(2)])
    over = NamedSharding(mesh, PartitionSpec("x"))
    sharded = jax.device_put(bank, over)
    lojax.save(tmp_path, sharded)
    for restored in (
        lojax.restore(tmp_path, like=sharded),
        lojax.restore(tmp_path, sharding=over, like=bank),
        lojax.restore(tmp_path, like=bank, sharding=jax.tree.map(lambda _: over, bank)),
    ):
        assert_same_bits(restored, bank)
        assert {x.sharding for x in jax.tree.leaves(restored)} == {over}
    text = message(ValueError, lojax.restore, tmp_path, sharding={"w": over})
    assert "1 shardings for the 6 arrays" in text and "lojax.sharding.shardings(frozen, bank)" in text


# --- the base, the start, the metadata ---


def test_the_fingerprint_of_the_base(tmp_path):
    frozen, bank = cases.plain()
    lojax.save(tmp_path, bank, frozen=frozen)
    other = {**frozen, "blocks": [frozen["blocks"][0], frozen["blocks"][1] + 1]}
    text = message(ValueError, lojax.restore, tmp_path, frozen=other)
    assert text.startswith("blocks/1: frozen holds other values") and str(_entry_folder(tmp_path, 1)) in text
    assert isinstance(lojax.restore(tmp_path, frozen=other, check_base=False), lojax.Bank)
    # The first adapter leaves that weight alone.
    assert_same_bits(lojax.restore(tmp_path, entry=0, frozen=other), bank[0])


def test_each_weight_of_the_base_is_read_once(tmp_path, monkeypatch):
    """Also on the host, where arrays may change and so no digest is kept."""
    from lojax.checkpoint import fingerprint

    frozen, bank = cases.plain()
    frozen = jax.tree.map(np.asarray, frozen)
    read, real = [], fingerprint.digests
    monkeypatch.setattr(fingerprint, "digests", lambda arrays: read.extend(arrays) or real(arrays))
    lojax.save(tmp_path, bank, frozen=frozen)
    assert len(read) == len(set(read)) and "blocks/1:0" in read
    read.clear()
    lojax.restore(tmp_path, frozen=frozen)
    assert len(read) == len(set(read)) and "blocks/1:0" in read


def test_frozen_may_hold_the_base_of_what_is_trained_in_full(tmp_path):
    """It does where rows of a mixed batch use no adapter."""
    frozen, bank = cases.dora()
    whole = {**frozen, "head": jnp.ones((4, 3), jnp.bfloat16)}
    lojax.save(tmp_path, bank, frozen=whole)
    for given in (frozen, whole):
        assert_same_bits(lojax.restore(tmp_path, frozen=given), bank)


@pytest.mark.parametrize("shared", [True, False])
def test_adapters_whose_start_was_taken_out_of_the_weight(tmp_path, shared):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    frozen, start = lojax.init(jax.random.key(1), params, "w", rank=2, init="pissa")
    loras = [trained(start, i) for i in range(2)]
    bank, starts = lojax.stack(loras), start if shared else lojax.stack([start, start])
    lojax.save(tmp_path, bank, frozen=frozen, start=starts)
    restored = lojax.restore(tmp_path, frozen=params)
    for one, lora in zip(restored, loras, strict=True):
        np.testing.assert_allclose(lojax.merge(params, one)["w"], lojax.merge(frozen, lora)["w"], atol=1e-5)
    text = message(ValueError, lojax.save, tmp_path, bank, start=lojax.stack([start]))
    assert "start holds 1 adapters, and lora 2" in text
    assert "start=start[0]" in message(ValueError, lojax.save, tmp_path / "x", loras[0], start=lojax.stack([start]))


@pytest.mark.parametrize("wait", [True, False])
def test_metadata_and_saves_in_the_background(tmp_path, wait):
    bank = cases.at_step(1)
    expected = jax.tree.map(np.asarray, bank)
    saving = lojax.save(tmp_path, bank, metadata={"step": 1}, wait=wait)
    jax.tree.map(lambda x: x.delete(), bank)  # as a donation would
    assert_same_bits(lojax.restore(tmp_path), jax.tree.map(jnp.asarray, expected))  # waits for it
    assert saving.done() and lojax.read_metadata(tmp_path) == {"step": 1}
    assert lojax.read_metadata(_entry_folder(tmp_path, 0)) == {"step": 1}


# --- one place, one kind ---


def test_overwrite(tmp_path):
    lojax.save(tmp_path, cases.at_step(1))
    text = message(FileExistsError, lojax.save, tmp_path, cases.at_step(2), overwrite=False)
    assert "holds a bank. Pass overwrite=True" in text
    lojax.save(tmp_path, cases.at_step(2))
    assert_same_bits(lojax.restore(tmp_path), cases.at_step(2))
    assert sorted(os.listdir(tmp_path)) == ["bank-2", "bank.json"]


@pytest.mark.parametrize("wait", [True, False])
def test_an_adapter_and_a_bank_do_not_replace_each_other(tmp_path, wait):
    lora, bank = checkpoint_cases.at_step(1), cases.at_step(1)
    lojax.save(tmp_path / "one", lora)
    lojax.save(tmp_path / "bank", bank)
    text = message(FileExistsError, lojax.save, tmp_path / "one", bank, wait=wait)
    assert str(tmp_path / "one") in text and "holds an adapter, which a bank does not replace" in text
    text = message(FileExistsError, lojax.save, tmp_path / "bank", lora, wait=wait)
    assert "holds a bank, which an adapter does not replace" in text
    assert_same_bits(lojax.restore(tmp_path / "one"), jax.tree.map(jnp.asarray, lora))
    assert_same_bits(lojax.restore(tmp_path / "bank"), bank)


def test_both_in_one_directory_is_an_error(tmp_path):
    lojax.save(tmp_path / "one", checkpoint_cases.at_step(1))
    lojax.save(tmp_path / "bank", cases.at_step(1))
    shutil.copytree(tmp_path / "one", tmp_path / "bank", dirs_exist_ok=True)
    for read in (lojax.restore, lojax.read_metadata):
        assert "holds both adapter.json and bank.json" in message(ValueError, read, tmp_path / "bank")


def test_the_wrong_kind_is_asked_for(tmp_path):
    frozen, bank = cases.plain()
    lojax.save(tmp_path / "bank", bank, frozen=frozen)
    lojax.save(tmp_path / "one", bank[0], frozen=frozen)
    text = message(ValueError, lojax.restore, tmp_path / "bank", like=bank[0])
    assert "holds a bank of 3 adapters, and like is one. Pick one with entry=" in text
    assert "as like[0]" in message(ValueError, lojax.restore, tmp_path / "one", like=bank)
    assert "as like[0]" in message(ValueError, lojax.restore, tmp_path / "bank", entry=0, like=bank)
    assert "Leave entry out" in message(ValueError, lojax.restore, tmp_path / "one", entry=0)
    assert "no adapter 'a/c'; its names: a/b" in message(KeyError, lojax.restore, tmp_path / "bank", entry="a/c")
    assert "The number 3 is out of range: the bank holds 3 adapters" in message(
        IndexError, lojax.restore, tmp_path / "bank", entry=3
    )
    text = message(FileNotFoundError, lojax.restore, tmp_path / "bank" / "a")
    assert f"{tmp_path / 'bank'} holds a bank: pass {tmp_path / 'bank'} and entry='a'" in text
    assert "holds a bank" in message(FileNotFoundError, save_restore.read_manifest, tmp_path / "bank")


def test_like_must_be_the_same_bank(tmp_path):
    _, bank = cases.plain()
    lojax.save(tmp_path, bank)
    assert "and like one of 2" in message(ValueError, lojax.restore, tmp_path, like=lojax.stack([*bank][:2]))
    text = message(ValueError, lojax.restore, tmp_path, like=dataclasses.replace(bank, names=("x", "y", "z")))
    assert "named a/b, ../é, A/B, but like holds 3 adapters named x, y, z" in text
    other = lojax.stack([lojax.rescale(one, 2.0) for one in bank], names=bank.names)
    text = message(ValueError, lojax.restore, tmp_path, like=other)
    assert text.startswith("blocks/0: ") and "scale=2.0, but like has 4.0" in text


def test_values_that_a_save_would_lose(tmp_path):
    _, bank = cases.plain()
    noisy = jax.tree.map(lambda x: x + 1, bank)
    text = message(ValueError, lojax.save, tmp_path, noisy)
    assert text.startswith("blocks/0: bank['a/b'] has rank 2 of 4, and what its a holds beyond that is not zero")
    assert not list(tmp_path.iterdir())
    lojax.save(tmp_path, lojax.stack(lojax.unstack(noisy), names=noisy.names))
    for one, expected in zip(lojax.restore(tmp_path, like=bank), noisy, strict=True):
        assert_same_bits(one, expected)
    adapter = bank.lora["blocks"][1]
    moved = dataclasses.replace(adapter, b=adapter.b.at[0].add(1))
    lora = {**bank.lora, "blocks": [bank.lora["blocks"][0], moved]}
    text = message(ValueError, lojax.save, tmp_path, dataclasses.replace(bank, lora=lora))
    assert text.startswith("blocks/1: bank['a/b'] leaves this weight alone")


def test_errors_name_the_adapter(tmp_path):
    _, bank = cases.plain()
    nothing = jax.tree.map(lambda _: None, bank[0], is_leaf=lambda x: isinstance(x, lojax.Adapter))
    text = message(ValueError, lojax.save, tmp_path, lojax.stack([*bank, nothing]))
    assert text.startswith("bank[3]: lora holds no adapter")
    with pytest.raises(TypeError, match="Save outside jit"):
        jax.jit(lambda bank: lojax.save(tmp_path, bank))(bank)
    with pytest.raises(ValueError, match="different structure"):
        lojax.save(tmp_path, bank, frozen={"w": jnp.ones(3)})


# --- stopped, full, damaged ---


class Stop(BaseException):
    """Stands for a kill: no handler for ordinary errors may catch it."""


_MOMENTS = [
    ("start_write", 0),
    ("start_write", 2),
    ("take_inventory", 2),
    ("commit", 1),
    ("commit", 3),  # that of bank.json
    ("replace", 3),
    ("rmtree", 0),
]


@pytest.mark.parametrize(("moment", "when"), _MOMENTS)
@pytest.mark.parametrize("kind", [Stop, OSError])
def test_stopped_at_each_step_of_a_save(tmp_path, monkeypatch, moment, kind, when):
    """At this call of it: there are three adapters, and the last ``commit`` is that of the bank."""
    lojax.save(tmp_path, cases.at_step(1))
    holder = {"start_write": save_restore, "replace": os, "rmtree": shutil}.get(moment, files)
    real, calls = getattr(holder, moment), []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) > when:
            raise kind(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, moment, stop)
        with pytest.raises(kind) as caught:
            lojax.save(tmp_path, cases.at_step(2))
    now = 2 if moment == "rmtree" else 1  # by then the new checkpoint is complete
    assert_same_bits(lojax.restore(tmp_path), cases.at_step(now))
    if kind is OSError and moment != "rmtree":
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value) and "The previous checkpoint there is whole." in str(caught.value)
    lojax.save(tmp_path, cases.at_step(3))
    assert sorted(os.listdir(tmp_path)) == [read_bank_manifest(tmp_path).folder, "bank.json"]
    assert_same_bits(lojax.restore(tmp_path), cases.at_step(3))


def test_a_reader_during_a_save(tmp_path, monkeypatch):
    """The bank is replaced after its first adapter has been read."""
    lojax.save(tmp_path, cases.at_step(1))
    real, calls = save_restore.read, []

    def slow(*args):
        calls.append(1)
        found = real(*args)
        if len(calls) == 1:
            lojax.save(tmp_path, cases.at_step(2))
        return found

    monkeypatch.setattr(save_restore, "read", slow)
    assert_same_bits(lojax.restore(tmp_path), cases.at_step(2))


def test_every_file_cut_short_flipped_or_missing(tmp_path):
    lojax.save(tmp_path, cases.at_step(1))
    for file in sorted(file for file in tmp_path.rglob("*") if file.is_file()):
        data = file.read_bytes()
        for damage in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]) if data else b"x", data + b"\0", None):
            if damage == data:
                continue
            file.unlink() if damage is None else file.write_bytes(damage)
            text = message(FileNotFoundError if damage is None else ValueError, lojax.restore, tmp_path)
            assert str(file) in text or (damage is None and file.name == "bank.json")
            file.write_bytes(data)
    assert_same_bits(lojax.restore(tmp_path), cases.at_step(1))


def test_an_adapter_that_was_saved_over(tmp_path):
    lojax.save(tmp_path, cases.at_step(1))
    lojax.save(_entry_folder(tmp_path, 1), cases.at_step(2)[1])
    text = message(ValueError, lojax.restore, tmp_path)
    assert str(_entry_folder(tmp_path, 1)) in text and "bank.replace(i, lora)" in text


_FORGED = {
    "newer version": (lambda r: r.update(version=2), "version 2"),
    "another format": (lambda r: r.update(format="lojax-adapter"), "format 'lojax-adapter'"),
    "folder above": (lambda r: r.update(folder="../bank-1"), "'folder'"),
    "entry above": (lambda r: r["entries"][0].update(folder="../0-one"), "'../0-one'"),
    "no entries": (lambda r: r.update(entries=[]), "'entries' is empty"),
    "not a list": (lambda r: r.update(entries={"0": 1}), "entries"),
    "a name twice": (lambda r: r["entries"][0].update(name="two"), "twice"),
    "a name is missing": (lambda r: r["entries"][0].pop("name"), "missing"),
    "a folder twice": (lambda r: r["entries"][0].update(r["entries"][1]), "twice"),
    "a hash of numbers": (lambda r: r["entries"][0].update(blake2b=3), "blake2b"),
}


@pytest.mark.parametrize("name", _FORGED)
def test_forged(tmp_path, name):
    change, expected = _FORGED[name]
    lojax.save(tmp_path, cases.at_step(1))
    record = json.loads((tmp_path / files.BANK).read_text())
    del record["checksum"]
    change(record)
    files.commit(tmp_path, record, files.BANK)
    text = message(ValueError, lojax.restore, tmp_path)
    assert expected in text and str(tmp_path / files.BANK) in text


# --- several processes ---

PROGRAM = """
import sys, jax, numpy as np
process, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)
import lojax
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((4,), ("x",))
def spread(x, *spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda index: x[index])
def lora(rank):
    a = np.arange(64 * rank, dtype=np.float32).reshape(64, rank)
    return {"q": lojax.Adapter(a, np.ones((rank, 8), np.float32), float(rank), ("in", "out"))}
bank = lojax.stack([lora(1), lora(3)], names=["one", "three"])
spec = lambda x: (None, "x") if x.shape[1] == 64 else ()
sharded = jax.tree.map(lambda x: spread(np.asarray(x), *spec(x)), bank)
frozen = {"q": spread(np.ones((64, 8), np.float32), "x")}
for wait in (True, False):
    lojax.save(path, sharded, frozen=frozen, wait=wait).result()
restored = lojax.restore(path, frozen=frozen)
for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(bank)):
    assert (np.asarray(x) == np.asarray(y)).all()
restored = lojax.restore(path, like=sharded)
assert jax.tree.structure(restored) == jax.tree.structure(bank)
for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(sharded)):
    assert x.sharding == y.sharding
assert lojax.restore(path, entry="three", frozen=frozen)["q"].rank == 3
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    checkpoint_cases.run_in_two_processes(PROGRAM, tmp_path)
    restored = lojax.restore(tmp_path, frozen={"q": jnp.ones((64, 8))})
    assert np.asarray(restored[1]["q"].a).ravel().tolist() == list(range(192))
    assert restored.names == ("one", "three")


# --- golden ---


def _known() -> lojax.Bank:
    """What golden/bank_v1 holds, from numbers alone."""

    def ramp(*shape: int) -> jax.Array:
        return jnp.asarray((np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 5) / 8)

    def adapter(rank: int, scale: float) -> lojax.Adapter:
        return lojax.Adapter(ramp(6, rank), ramp(rank, 4), scale, ("in", "out"), 0.25)

    first = {"w": adapter(2, 8.0), "v": None, "head": ramp(4, 3)}
    second = {"w": adapter(1, 0.5), "v": adapter(3, 1.0), "head": -ramp(4, 3)}
    return lojax.stack([first, second], names=["one/é", "two"])


def test_a_golden_bank():
    """Written by the commit that added banks (jax 0.10.2, orbax-checkpoint 0.12.8). Never write it again."""
    frozen = {"w": jnp.ones((6, 4)), "v": jnp.full((6, 4), 2.0), "head": None}
    path = GOLDEN / "bank_v1"
    for given in ({}, {"frozen": frozen}, {"like": _known()}):
        assert_same_bits(lojax.restore(path, **given), _known())
    assert_same_bits(lojax.restore(path, entry="two", frozen=frozen), _known()[1])
    assert lojax.read_metadata(path) == {"step": 1234}
    text = message(ValueError, lojax.restore, path, entry="two", frozen={**frozen, "v": frozen["v"] + 1})
    assert text.startswith("v: frozen holds other values")
