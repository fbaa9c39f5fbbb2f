"""PEFT folders into a bank and out of it: `lojax.stack` of `lojax.peft.load`, `lojax.peft.save` of each adapter."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, trained

import lojax
from lojax.files import safetensors
from tests.peft.layouts import LAYOUTS, golden

NAMES = lojax.peft.NameMap.parse("layers/{i}/{x*}/* <-> base.{i}.{x*}\nhead/* <-> head")


def base():
    key = jax.random.key(0)
    layer = lambda i: {x: {"kernel": jax.random.normal(jax.random.fold_in(key, i), (6, 6))} for x in ("q", "v")}
    return {"layers": [layer(0), layer(1)], "head": {"weight": jnp.ones((6, 3)), "bias": jnp.zeros(3)}}


def loras(**settings):
    """Ranks, alphas and targets that differ, within an adapter too."""
    targets = [
        ["**/q/kernel"],
        [lojax.Rule("layers/0/q/kernel", rank=4, alpha=1), lojax.Rule("**/v/kernel", rank=2, alpha=6)],
        ["layers/1/*/kernel"],
    ]
    return [
        trained(lojax.init(jax.random.key(i), base(), chosen, rank=i + 1, alpha=5 * i + 1, **settings)[1], i)
        for i, chosen in enumerate(targets)
    ]


@pytest.mark.parametrize("settings", [{}, {"scaling": "rslora"}, {"train": "head/bias"}], ids=str)
def test_folders_become_a_bank_and_a_bank_becomes_folders(tmp_path, settings):
    """load → stack → unstack → save → load: bit for bit, and the files too."""
    params, originals = base(), loras(**settings)
    frozen = lojax.peft.freeze(params, originals[0])
    for i, lora in enumerate(originals):
        lojax.peft.save(tmp_path / f"in{i}", lora, frozen, NAMES)
    folders = [tmp_path / f"in{i}" for i in range(3)]
    bank = lojax.stack([lojax.peft.load(folder, params, NAMES) for folder in folders], names=["a", "b", "c"])
    for i, (lora, folder) in enumerate(zip(originals, folders, strict=True)):
        assert_same_bits(bank[i], lojax.peft.load(folder, params, NAMES))
        lojax.peft.save(tmp_path / f"out{i}", bank["abc"[i]], lojax.peft.freeze(params, bank), NAMES)
        again = lojax.peft.load(tmp_path / f"out{i}", params, NAMES)
        assert_same_bits(again, bank[i])
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(lora), strict=True):
            np.testing.assert_array_equal(x, y)
        configs = [json.loads((p / "adapter_config.json").read_text()) for p in (folder, tmp_path / f"out{i}")]
        assert configs[0] == configs[1]
        files = [safetensors.open_file(p / "adapter_model.safetensors") for p in (folder, tmp_path / f"out{i}")]
        assert files[0].entries.keys() == files[1].entries.keys()
        for key in files[0].entries:
            np.testing.assert_array_equal(files[0].read(key), files[1].read(key))
    scales = {leaf.scale for leaf in (bank[1]["layers"][0]["q"]["kernel"], bank[1]["layers"][0]["v"]["kernel"])}
    assert len(scales) == 2


def test_a_mixed_batch_of_folders_that_peft_wrote():
    """Real files of PEFT (see make_golden.py), against each adapter by itself."""
    path, tensors, x, y = golden("linear")
    layout = LAYOUTS["flat"]
    params = layout.base(tensors)
    lora = lojax.peft.load(path, params, layout.names)
    half = lojax.resize(lojax.rescale(lora, 0.5), 1)
    bank = lojax.stack([lora, half])
    frozen = lojax.peft.freeze(params, bank)
    f = lojax.transform(layout.apply)
    rows = jnp.asarray(x)[:2]
    got = f(frozen, bank, rows, adapter=[0, 1])
    np.testing.assert_allclose(got[0], y[0], rtol=1e-5, atol=1e-5 * np.abs(y).max())
    np.testing.assert_allclose(got[1], f(frozen, half, rows)[1], rtol=1e-5, atol=1e-5)
