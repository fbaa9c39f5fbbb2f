"""What lojax writes is what real PEFT wrote: the same keys, shapes, numbers and meaning."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, message, trained

import lojax
import lojax.peft
from lojax.adapters.adapter import is_adapter
from lojax.files import safetensors
from tests.peft.layouts import EMBEDDING, EXPERTS, LAYOUTS, ROWS, golden, shaped

ALONE = [
    row
    for row in ROWS
    if row[1] in ("flat", "heads", "torch-like") or row[0] not in ("linear", "patterns", "some_layers", "dora")
]
"""Rows in which each leaf is one torch module."""
SHARED = [row for row in ROWS if row[1] != "side by side" and row not in ALONE]
"""Rows in which the entries of a leaf are several."""


def read(path: Path) -> dict[str, np.ndarray]:
    file = safetensors.open_file(path / "adapter_model.safetensors")
    assert file.metadata["format"] == "pt"
    return {name: file.read(name) for name in file.entries}


def fields(path: Path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


def loaded(case, layout):
    path, tensors, x, y = golden(case)
    base = layout.base(tensors)
    lora = lojax.peft.load(path, base, layout.names)
    return path, lora, lojax.peft.freeze(base, lora), x, y


@pytest.mark.parametrize(("case", "name", "layout"), ROWS, ids=[f"{case}-{name}" for case, name, _ in ROWS])
def test_a_round_trip_keeps_the_outputs(case, name, layout, tmp_path):
    _, lora, frozen, x, y = loaded(case, layout)
    lojax.peft.save(tmp_path / "out", lora, frozen, layout.names)
    base = lojax.merge(frozen, jax.tree.map(lambda n: None if is_adapter(n) else n, lora, is_leaf=is_adapter))
    again = lojax.peft.load(tmp_path / "out", base, layout.names)
    adapted = lojax.transform(layout.apply, strict=True)(lojax.peft.freeze(base, again), again, x)
    np.testing.assert_allclose(adapted, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize(("case", "name", "layout"), ALONE + SHARED, ids=[f"{c}-{n}" for c, n, _ in ALONE + SHARED])
def test_the_tensors_are_those_of_real_peft(case, name, layout, tmp_path):
    path, lora, frozen, *_ = loaded(case, layout)
    lojax.peft.save(tmp_path / "out", lora, frozen, layout.names, config=lojax.peft.read_config(path))
    assert_same_bits(read(tmp_path / "out"), read(path))


def _moved_by(init):
    """The pretrained weight, and a pair whose init moved it, before and after some training."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)}
    if init == "lora_ga":
        frozen, start = lojax.init(jax.random.key(0), params, "w", rank=2, alpha=3)
        loss = lambda frozen, lora, x: jnp.sum((x @ lojax.merge(frozen, lora)["w"]) ** 2)
        frozen, start = lojax.lora_ga(loss, frozen, start, [jnp.eye(6)])
    else:
        frozen, start = lojax.init(jax.random.key(0), params, "w", rank=2, alpha=3, init=init)
    assert start["w"].moved_base == init
    return params, frozen, start, {"w": dataclasses.replace(start["w"], a=start["w"].a + 0.1, b=start["w"].b - 0.2)}


MOVED_NAMES = lojax.peft.NameMap.parse("w <-> w.weight")
MOVES = pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "milora", "lora_ga"])


@MOVES
def test_an_adapter_of_a_moved_weight_is_written_for_the_pretrained_one(init, tmp_path):
    params, frozen, start, lora = _moved_by(init)
    lojax.peft.save(tmp_path / "out", lora, frozen, MOVED_NAMES, start=start)
    tensors, config = read(tmp_path / "out"), fields(tmp_path / "out")
    down, up = (next(x for name, x in tensors.items() if f"lora_{factor}" in name) for factor in "AB")
    assert config["r"] == len(down) == 4
    update = config["lora_alpha"] / config["r"] * up.astype("f8") @ down.astype("f8")  # what PEFT itself computes
    np.testing.assert_allclose(np.asarray(params["w"]) + update.T, lojax.merge(frozen, lora)["w"], rtol=0, atol=3e-6)


@MOVES
def test_an_adapter_of_a_moved_weight_needs_its_start(init, tmp_path):
    _, frozen, _, lora = _moved_by(init)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, MOVED_NAMES)
    assert text.startswith(f"w: the start of this adapter ({init}) was taken out of its weight")
    assert "Pass start=, the lora tree as init returned it" in text
    plain = lojax.init(jax.random.key(0), {"w": jnp.ones((6, 5))}, "w", rank=2)[1]
    text = message(ValueError, lojax.peft.save, tmp_path / "out", plain, None, MOVED_NAMES, start=plain)
    assert "lora holds none. Leave it out." in text
    assert list(tmp_path.iterdir()) == []


def test_the_config_says_what_real_peft_said(tmp_path):
    for case, _, layout in [row for row in ROWS if row[1] in ("flat", "conv1d", "conv2d", "embedding")]:
        path, lora, frozen, *_ = loaded(case, layout)
        lojax.peft.save(tmp_path / case, lora, frozen, layout.names, config=lojax.peft.read_config(path))
        ours, theirs = lojax.peft.read_config(tmp_path / case), lojax.peft.read_config(path)
        for parameter in layout.names.table(shaped(layout.shapes)).parameters.values():
            assert ours.targets(parameter.module) == theirs.targets(parameter.module), (case, parameter.module)
            if ours.targets(parameter.module) and parameter.is_weight:
                rank = theirs.rank(parameter.module)
                assert ours.rank(parameter.module) == rank
                assert ours.scale(parameter.module, rank) == pytest.approx(
                    theirs.scale(parameter.module, rank), rel=1e-12
                )
        kept = (
            "use_rslora",
            "bias",
            "fan_in_fan_out",
            "modules_to_save",
            "peft_version",
            "auto_mapping",
            "lora_dropout",
        )
        assert {n: ours[n] for n in kept} == {n: theirs[n] for n in kept}, case


def test_unknown_fields_are_kept_and_written_back(tmp_path):
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    config = {"revision": "main", "megatron_core": "x", "r": 77, "new_field": None}
    names = LAYOUTS["flat"].names
    save = lojax.peft.save
    save(tmp_path / "a", lora, frozen, names, config=config, base_model_name_or_path="org/base", task_type="CAUSAL_LM")
    written = fields(tmp_path / "a")
    assert (written["revision"], written["megatron_core"], written["new_field"], written["r"]) == ("main", "x", None, 2)
    assert (written["base_model_name_or_path"], written["task_type"]) == ("org/base", "CAUSAL_LM")


def test_one_update_across_a_fused_kernel_becomes_one_per_module_with_a_common_a(tmp_path):
    layout = LAYOUTS["fused"]
    base = layout.base(golden("linear")[1])
    x = golden("linear")[2]
    axes = ("in", "out", "out")
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/*/qv/kernel", rank=2, alpha=6, axes=axes)
    lora = trained(lora)
    expected = lojax.transform(layout.apply)(frozen, lora, x)
    lojax.peft.save(tmp_path / "out", lora, frozen, layout.names)
    tensors = read(tmp_path / "out")
    q, v = (tensors[f"base_model.model.layers.0.{m}.lora_A.weight"] for m in "qv")
    assert q.shape == (2, 6) and (q == v).all()
    again = lojax.peft.load(tmp_path / "out", base, layout.names)
    np.testing.assert_allclose(lojax.transform(layout.apply)(frozen, again, x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_rank_for_each_layer_of_a_stack_becomes_patterns(scaling, tmp_path):
    layout = LAYOUTS["scanned"]
    base, x = layout.base(golden("linear")[1]), golden("linear")[2]
    rules = [
        lojax.Rule("layers/q/kernel", rank=[1, 3], alpha=6, scaling=scaling, axes=("stack", "in", "out", "out")),
        lojax.Rule("layers/o/kernel", rank=[0, 2], axes=("stack", "in", "in", "out")),
    ]
    frozen, lora = lojax.init(jax.random.key(0), base, rules)
    lora = within_ranks(trained(lora))
    lojax.peft.save(tmp_path / "out", lora, frozen, layout.names, config={"use_rslora": scaling == "rslora"})
    tensors, config = read(tmp_path / "out"), lojax.peft.read_config(tmp_path / "out")
    shapes = {key.split(".lora_A")[0][17:]: t.shape for key, t in tensors.items() if "lora_A" in key}
    assert shapes == {"layers.0.q": (1, 6), "layers.1.q": (3, 6), "layers.1.o": (2, 6)}
    assert [config.rank(f"layers.{i}.q") for i in (0, 1)] == [1, 3] and not config.targets("layers.0.o")
    assert [config.scale(f"layers.{i}.q", r) for i, r in ((0, 1), (1, 3))] == pytest.approx(
        lora["layers"]["q"]["kernel"].scale
    )
    again = lojax.peft.load(tmp_path / "out", base, layout.names)
    assert again["layers"]["q"]["kernel"].ranks == (1, 3) and again["layers"]["o"]["kernel"].ranks == (0, 2)
    expected = lojax.transform(layout.apply)(frozen, lora, x)
    np.testing.assert_allclose(lojax.transform(layout.apply)(frozen, again, x), expected, rtol=1e-5, atol=1e-5)


def within_ranks(lora):
    """``lora`` with zeros above the rank of each entry, where training leaves them."""

    def cut(node):
        if not is_adapter(node) or node.ranks is None:
            return node
        kept = (np.arange(node.rank) < np.array(node.ranks)[:, None]).astype(np.float32)
        return dataclasses.replace(node, b=node.b * kept.reshape(*kept.shape, *[1] * (node.b.ndim - 2)))

    return jax.tree.map(cut, lora, is_leaf=is_adapter)


def test_experts_of_different_ranks_become_one_parameter_of_the_largest(tmp_path):
    base, x = EXPERTS.base(golden("experts")[1]), golden("experts")[2]
    rule = lojax.Rule("experts/up", rank=[1, 0, 2], alpha=4, axes=("stack", "in", "out"))
    frozen, lora = lojax.init(jax.random.key(0), base, rule)
    lora = within_ranks(trained(lora))
    lojax.peft.save(tmp_path / "out", lora, frozen, EXPERTS.names)
    assert read(tmp_path / "out")["base_model.model.mlp.experts.lora_A.weight"].shape == (6, 4)
    again = lojax.peft.load(tmp_path / "out", base, EXPERTS.names)
    expected = lojax.transform(EXPERTS.apply)(frozen, lora, x)
    np.testing.assert_allclose(lojax.transform(EXPERTS.apply)(frozen, again, x), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_from_the_other_end_is_turned_round(tmp_path):
    layout = LAYOUTS["flat"]
    base = layout.base(golden("linear")[1])
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/0/q/kernel", rank=2, axes=("out", "in"))
    lora = trained(lora)
    lojax.peft.save(tmp_path / "out", lora, frozen, layout.names)
    again = lojax.peft.load(tmp_path / "out", base, layout.names)
    assert again["layers"]["0"]["q"]["kernel"].axes == ("in", "out")
    left, right = lojax.merge(frozen, lora), lojax.merge(frozen, again)
    np.testing.assert_allclose(left["layers"]["0"]["q"]["kernel"], right["layers"]["0"]["q"]["kernel"], atol=1e-5)


def test_axes_that_contradict_the_map_are_refused(tmp_path):
    layout = LAYOUTS["heads"]
    base = layout.base(golden("linear")[1])
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/0/q/kernel", rank=2, axes=("in", "in", "out"))
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, layout.names)
    assert "layers/0/q/kernel: the adapter has axes ('in', 'in', 'out')" in text and "('in', 'out', 'out')" in text
    assert not (tmp_path / "out").exists()


def test_without_frozen_targets_are_spelled_in_full(tmp_path):
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    lojax.peft.save(tmp_path / "a", lora, None, LAYOUTS["flat"].names)
    lojax.peft.save(tmp_path / "b", lora, frozen, LAYOUTS["flat"].names)
    assert fields(tmp_path / "a")["target_modules"] == sorted(f"layers.{i}.{m}" for i in "01" for m in "qvo")
    assert fields(tmp_path / "b")["target_modules"] == ["o", "q", "v"]
    assert_same_bits(read(tmp_path / "a"), read(tmp_path / "b"))


def test_the_rest_of_a_module_trained_in_part_is_written_with_it(tmp_path):
    layout = LAYOUTS["flat"]
    base = layout.base(golden("linear")[1])
    frozen, lora = lojax.init(jax.random.key(0), base, "layers/0/q/kernel", rank=2, train="head/kernel")
    lojax.peft.save(tmp_path / "out", lora, frozen, layout.names)
    assert fields(tmp_path / "out")["modules_to_save"] == ["head"]
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} <= set(read(tmp_path / "out"))
    abstract = jax.eval_shape(lambda: frozen)
    text = message(ValueError, lojax.peft.save, tmp_path / "no", lora, abstract, layout.names)
    assert "head/bias belongs to a module that is saved in full; pass its array" in text


@pytest.mark.parametrize(
    ("train", "whole", "expected"),
    [
        (["head/**"], True, ["head"]),
        (["head/**"], False, ["head.dense", "head.out"]),
        (["head/out/*"], True, ["head.out"]),
    ],
)
def test_a_head_of_several_layers_is_one_module_where_all_of_it_is_trained(train, whole, expected, tmp_path):
    params = {"head": {m: {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)} for m in ("dense", "out")}}
    params |= {"body": {"kernel": jnp.ones((3, 3))}}
    names = lojax.peft.NameMap.parse("head/{m:dense,out}/* <-> head.{m}\nbody/kernel <-> body")
    frozen, lora = lojax.init(jax.random.key(0), params, "body/kernel", rank=2, train=train)
    lojax.peft.save(tmp_path / "out", lora, frozen if whole else None, names)
    assert fields(tmp_path / "out")["modules_to_save"] == expected


def test_bfloat16_goes_through(tmp_path):
    layout = LAYOUTS["flat"]
    lora = lojax.peft.load(golden("linear")[0], layout.base(golden("linear")[1]), layout.names, dtype=jnp.bfloat16)
    lojax.peft.save(tmp_path / "out", lora, None, layout.names)
    assert {value.dtype.name for value in read(tmp_path / "out").values()} == {"bfloat16"}
    again = lojax.peft.load(tmp_path / "out", layout.base(golden("linear")[1]), layout.names, dtype=None)
    assert_same_bits(lora, again)


# --- refused before anything is written ---


def test_leaves_without_a_rule_are_listed(tmp_path):
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    names = lojax.peft.NameMap.parse("layers/{i}/{m:q,v}/* <-> layers.{i}.{m}")
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, names)
    assert "no rule for 2 of the 6 trained leaves, so nothing was written:" in text
    assert "\n  layers/0/o/kernel (6, 6)\n  layers/1/o/kernel (6, 6)\nAdd rules: name_map | " in text
    assert not list(tmp_path.iterdir())


def test_names_that_would_be_one_are_refused(tmp_path):
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    names = lojax.peft.NameMap.parse(
        "layers/{i}/{m*}/kernel[in, out] <-> layers.{i}.{m}\nlayers/{i}/{m*}/bias <-> x.{i}.{m}"
    )
    doubled = lojax.peft.NameMap.parse("layers/{i}/{m:q=v,v,o}/* <-> layers.{i}.{m}")
    lojax.peft.save(tmp_path / "fine", lora, frozen, names)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, doubled)
    assert "Two leaves map to one torch parameter, layers.0.v.bias: layers/0/q/bias by" in text
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_refused_unless_overwritten(tmp_path):
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    names = LAYOUTS["flat"].names
    lojax.peft.save(tmp_path / "out", lora, frozen, names)
    (tmp_path / "out" / "mine").write_text("precious")
    text = message(FileExistsError, lojax.peft.save, tmp_path / "out", lora, frozen, names)
    assert "exists. Choose another directory, or pass overwrite=True" in text
    assert (tmp_path / "out" / "mine").exists()
    lojax.peft.save(tmp_path / "out", lora, frozen, names, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_adapter_that_lojax_wrote_is_replaced_by_default_as_by_lojax_save(tmp_path):
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    names = LAYOUTS["flat"].names
    (tmp_path / "out").mkdir()
    for scale in (1, 2):
        lojax.peft.save(tmp_path / "out", lojax.rescale(lora, scale), frozen, names)
        assert fields(tmp_path / "out")["lora_alpha"] == 3 * scale
    text = message(FileExistsError, lojax.peft.save, tmp_path / "out", lora, frozen, names, overwrite=False)
    assert "exists. Choose another directory, or pass overwrite=True" in text


@pytest.mark.parametrize("kind", ["of PEFT", "half", "a config", "a model", "a file"])
def test_what_lojax_did_not_write_is_replaced_only_when_asked(kind, tmp_path):
    path, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    names, out = LAYOUTS["flat"].names, tmp_path / "out"
    if kind == "a file":
        out.write_text("precious")
    else:
        shutil.copytree(path, out)
        (out / "golden.safetensors").unlink()
    if kind == "a config":
        (out / "adapter_model.safetensors").unlink()
    if kind == "half":
        (out / "adapter_model.safetensors").write_bytes(b"precious")
    if kind == "a model":
        lojax.peft.save(out, lora, frozen, names, overwrite=True)
        (out / "model.safetensors").write_bytes(b"precious")
    text = message(FileExistsError, lojax.peft.save, out, lora, frozen, names)
    assert f"{out} exists. Choose another directory, or pass overwrite=True to replace it." in text
    assert out.exists()


def test_a_full_disk_is_named_with_the_file(tmp_path):
    """A limit on the size of a file stands for the end of the disk."""
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 20_000):  # in the weights, and in the config
        big = {"revision": "x" * 100_000}
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            text = message(OSError, lojax.peft.save, tmp_path / "out", lora, frozen, LAYOUTS["flat"].names, config=big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "File too large" in text and str(tmp_path / "out") in text
        assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    _, lora, frozen, *_ = loaded("linear", LAYOUTS["flat"])
    monkeypatch.setattr(
        safetensors, "write", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    text = message(OSError, lojax.peft.save, tmp_path / "out", lora, frozen, LAYOUTS["flat"].names)
    assert "No space left" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("train", [["head/**"], [lojax.Rule("embed/embedding", train="tokens", tokens=[1])]])
def test_a_tree_without_a_low_rank_update_is_refused_as_peft_would(train, tmp_path):
    frozen, lora = lojax.init(jax.random.key(0), EMBEDDING.base(golden("embedding")[1]), (), train=train)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, EMBEDDING.names)
    assert "lora holds no low-rank update, only" in text and "PEFT loads no LoRA without one. Adapt some weight" in text


def test_an_empty_tree_is_refused(tmp_path):
    text = message(ValueError, lojax.peft.save, tmp_path / "out", {"w": None}, {"w": jnp.ones((2, 2))}, EXPERTS.names)
    assert "lora holds nothing that trains" in text


def test_different_dropouts_are_refused(tmp_path):
    layout = LAYOUTS["flat"]
    base = layout.base(golden("linear")[1])
    rules = [lojax.Rule("layers/0/q/kernel", dropout=0.1), lojax.Rule("layers/1/q/kernel", dropout=0.2)]
    frozen, lora = lojax.init(jax.random.key(0), base, rules, rank=2)
    text = message(ValueError, lojax.peft.save, tmp_path / "out", lora, frozen, layout.names)
    assert "PEFT has one lora_dropout for all adapters; these have [0.1, 0.2]" in text
