"""``python -m lojax merge``: the merged files compute what real PEFT computed, in bounded memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import message

from lojax.cli.main import main
from lojax.cli.merge_files import merge
from lojax.cli.model_directory import INDEX
from lojax.files import safetensors
from lojax.peft import patch as patching
from lojax.peft.patch import patches
from tests.peft.adapter_files import copied, edited
from tests.peft.layouts import CONV1D, CONV2D, EMBEDDING, EXPERTS, LAYOUTS, golden

FLAT = LAYOUTS["flat"]
CASES = {
    "linear": FLAT,
    "patterns": FLAT,
    "some_layers": FLAT,
    "conv1d": CONV1D,
    "embedding": EMBEDDING,
    "conv2d": CONV2D,
    "experts": EXPERTS,
    "dora": FLAT,
    "dora_conv1d": CONV1D,
    "dora_embedding": EMBEDDING,
    "dora_conv2d": CONV2D,
    "tokens": EMBEDDING,
}


def written(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    safetensors.write(path, shapes, tensors.__getitem__, metadata={"format": "pt"})
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    file = safetensors.open_file(path)
    return {name: file.read(name) for name in file.entries}


def sharded(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    names = list(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in parts.items():
        written(path / file, {name: tensors[name] for name in held})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (path / INDEX).write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"stale")
    return path


@pytest.mark.parametrize("block", [1 << 20, 5])
@pytest.mark.parametrize("case", CASES)
def test_merged_files_compute_what_peft_computed(case, block, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patching, "BLOCK", block)
    adapter, tensors, x, y = golden(case)
    base = written(tmp_path / "model.safetensors", tensors)
    orientation = ["--experts", "out_in"] if case == "experts" else []
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out"), *orientation]) == 0
    merged = read(tmp_path / "out" / "model.safetensors")
    layout = CASES[case]
    np.testing.assert_allclose(layout.apply(layout.base(merged), x), y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_shards_keep_their_names_and_what_lies_beside_them(tmp_path):
    adapter, tensors, *_ = golden("linear")
    merge(sharded(tmp_path / "base", tensors), adapter, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["config.json", INDEX, "one.safetensors", "two.safetensors"]
    merge(written(tmp_path / "model.safetensors", tensors), adapter, tmp_path / "whole")
    whole = read(tmp_path / "whole" / "model.safetensors")
    parts = read(tmp_path / "out" / "one.safetensors") | read(tmp_path / "out" / "two.safetensors")
    assert set(parts) == set(whole)
    assert all((parts[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize("shift", ["added", "removed"])
def test_a_base_under_another_prefix_is_found(shift, tmp_path):
    adapter, tensors, *_ = golden("linear")
    if shift == "added":
        named = {f"model.{name}": value for name, value in tensors.items()}
    else:
        named = tensors
        rename = lambda key: key.replace("base_model.model.", "base_model.model.net.")
        adapter = edited(adapter, lambda found: [found.update({rename(k): found.pop(k)}) for k in list(found)])
    merge(written(tmp_path / "model.safetensors", named), adapter, tmp_path / "out")
    merged = read(tmp_path / "out" / "model.safetensors")
    plain = patches(golden("linear")[0], {name: (value.dtype, value.shape) for name, value in tensors.items()})
    changed = {name for name, value in merged.items() if (value != named[name]).any()}
    assert {name.removeprefix("model.") for name in changed} == set(plain)


def test_a_bfloat16_base_is_summed_in_float32_and_cast_once(tmp_path):
    bfloat16 = safetensors.DTYPES["BF16"]
    adapter, tensors, *_ = golden("linear")
    base = {name: value.astype(bfloat16) for name, value in tensors.items()}
    merge(written(tmp_path / "model.safetensors", base), adapter, tmp_path / "out")
    merged = read(tmp_path / "out" / "model.safetensors")
    found = read(adapter / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.layers.0.q.lora_{side}.weight"] for side in "AB")
    expected = (base["layers.0.q.weight"].astype(np.float32) + 1.5 * b @ a).astype(bfloat16)
    assert merged["layers.0.q.weight"].dtype == bfloat16
    assert (merged["layers.0.q.weight"] == expected).all()
    assert (merged["head.weight"] == base["head.weight"]).all()


def test_a_square_conv1d_weight_lies_as_its_neighbours_do(tmp_path):
    """GPT-2's attention output is square, and PEFT may have left fan_in_fan_out false: the others tell."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    start = "base_model.model"
    tensors = {
        f"{start}.{m}.lora_{s}.weight": draw(*shape)
        for m, s, shape in (("fc", "A", (2, 4)), ("fc", "B", (6, 2)), ("proj", "A", (2, 4)), ("proj", "B", (4, 2)))
    }
    config = {"r": 2, "lora_alpha": 2, "fan_in_fan_out": False, "target_modules": ["fc", "proj"]}
    adapter = edited(copied("linear", tmp_path / "adapter", config=config), lambda t: (t.clear(), t.update(tensors)))
    base = {"fc.weight": draw(4, 6), "proj.weight": draw(4, 4)}
    merge(written(tmp_path / "model.safetensors", base), adapter, tmp_path / "out")
    merged = read(tmp_path / "out" / "model.safetensors")
    update = (tensors[f"{start}.proj.lora_B.weight"] @ tensors[f"{start}.proj.lora_A.weight"]).T
    np.testing.assert_allclose(merged["proj.weight"], base["proj.weight"] + update, atol=1e-5)


# --- refused, with nothing written ---


def refusal(base: Path, adapter: Path, kind: type[Exception] = ValueError) -> str:
    target = base.parent / "out"
    text = message(kind, merge, base, adapter, target)
    assert not target.exists() and not [p for p in base.parent.iterdir() if p.name.startswith(".out")]
    return text


def test_an_adapter_for_another_model_is_refused(tmp_path):
    text = refusal(written(tmp_path / "model.safetensors", golden("linear")[1]), golden("conv2d")[0])
    assert "does not fit the base:" in text and "wide has no place (nearest in the base: " in text


def test_misshapen_updates_are_refused(tmp_path):
    tensors = dict(golden("linear")[1])
    tensors["layers.0.q.weight"] = np.zeros((6, 5), np.float32)
    text = refusal(written(tmp_path / "model.safetensors", tensors), golden("linear")[0])
    assert "layers.0.q: lora_B @ lora_A is (6, 6), layers.0.q.weight is (6, 5)" in text


def test_a_quantized_base_is_refused(tmp_path):
    tensors = {name: value.astype(np.int8) for name, value in golden("linear")[1].items()}
    text = refusal(written(tmp_path / "model.safetensors", tensors), golden("linear")[0])
    assert "layers.0.q.weight is int8: a quantized base cannot be merged into" in text


def test_a_saved_head_of_another_size_is_refused(tmp_path):
    tensors = dict(golden("patterns")[1]) | {"head.weight": np.zeros((4, 6), np.float32)}
    text = refusal(written(tmp_path / "model.safetensors", tensors), golden("patterns")[0])
    assert "base_model.model.head.weight (3, 6) has no place: head.weight is (4, 6)" in text


def test_square_experts_are_refused_where_nothing_tells_their_orientation(tmp_path):
    rng = np.random.default_rng(0)
    base = {"experts.w": rng.normal(size=(2, 4, 4)).astype(np.float32)}
    tensors = {
        f"base_model.model.experts.lora_{s}.weight": np.ones(shape, np.float32)
        for s, shape in (("A", (6, 4)), ("B", (4, 6)))
    }
    config = {"r": 3, "lora_alpha": 3, "target_parameters": ["w"], "target_modules": []}
    adapter = edited(copied("experts", tmp_path / "adapter", config=config), lambda t: (t.clear(), t.update(tensors)))
    text = refusal(written(tmp_path / "model.safetensors", base), adapter)
    assert "experts: experts.w can be [expert, out, in] or [expert, in, out] by shape; say which with experts=" in text


def test_experts_that_shapes_tell_apart_need_no_word(tmp_path):
    """Gate and up side by side are twice as wide as down: only one reading fits."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    base = {"experts.down": draw(2, 4, 3), "experts.gate_up": draw(2, 6, 4)}
    start = "base_model.model.experts"
    tensors = {
        f"{start}.base_layer.lora_A.weight": draw(4, 4),
        f"{start}.base_layer.lora_B.weight": draw(6, 4),
        f"{start}.lora_A.weight": draw(4, 3),
        f"{start}.lora_B.weight": draw(4, 4),
    }
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["gate_up", "down"], "target_modules": []}
    adapter = edited(copied("experts", tmp_path / "adapter", config=config), lambda t: (t.clear(), t.update(tensors)))
    merge(written(tmp_path / "model.safetensors", base), adapter, tmp_path / "out")
    merged = read(tmp_path / "out" / "model.safetensors")
    a, b = tensors[f"{start}.lora_A.weight"].reshape(2, 2, 3), tensors[f"{start}.lora_B.weight"].reshape(4, 2, 2)
    np.testing.assert_allclose(
        merged["experts.down"], base["experts.down"] + np.einsum("ore,eri->eoi", b, a), atol=1e-5
    )


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3])
def test_an_index_that_leads_out_of_its_directory_is_refused(name, tmp_path):
    base = sharded(tmp_path / "base", golden("linear")[1])
    (base / INDEX).write_text(json.dumps({"weight_map": {"x": name, "y": name}}))
    assert f"names {name!r}, which is not a plain file name" in refusal(base, golden("linear")[0])


@pytest.mark.parametrize("text", ["{nonsense", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(text, tmp_path):
    base = sharded(tmp_path / "base", golden("linear")[1])
    (base / INDEX).write_text(text)
    assert "is not an index of safetensors files" in refusal(base, golden("linear")[0])


def test_missing_files_are_named(tmp_path):
    base = sharded(tmp_path / "base", golden("linear")[1])
    (base / "two.safetensors").unlink()
    assert "names two.safetensors, which is not in" in refusal(base, golden("linear")[0], FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors file" in refusal(tmp_path / "empty", golden("linear")[0], FileNotFoundError)


def test_an_existing_target_is_refused(tmp_path, capsys):
    base = written(tmp_path / "model.safetensors", golden("linear")[1])
    (tmp_path / "out").mkdir()
    arguments = ["merge", str(base), str(golden("linear")[0]), str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "exists. Choose another directory, or pass --overwrite to replace it." in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize("target", [".", "..", "base", "adapter", "base/..", "link", "base/model.safetensors", "blobs"])
def test_a_target_that_is_or_holds_an_input_is_refused(target, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir((tmp_path / "root").mkdir() or tmp_path / "root")
    blob = written(Path("blobs/1234"), golden("linear")[1])
    Path("base").mkdir()
    Path("base/model.safetensors").symlink_to(blob.resolve())  # as in the cache of the Hugging Face hub
    copied("linear", Path("adapter"))
    Path("link").symlink_to("base")
    before = sorted(map(str, tmp_path.rglob("*")))
    assert main(["merge", "base", "adapter", target, "--overwrite"]) == 1
    assert "which is an input. Choose another directory." in capsys.readouterr().err
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_model_in_the_cache_of_the_hub_is_merged_with_all_that_lies_beside_it(tmp_path):
    blobs = sharded(tmp_path / "blobs", golden("linear")[1])
    (blobs / "tokenizer.json").write_text("words")
    base = tmp_path / "snapshots" / "revision"
    base.mkdir(parents=True)
    for path in blobs.iterdir():
        (base / path.name).symlink_to(path.resolve())
    for source, target in ((blobs, "plain"), (base, "linked")):
        assert main(["merge", str(source), str(golden("linear")[0]), str(tmp_path / target)]) == 0
    plain, from_links = (sorted((tmp_path / name).iterdir()) for name in ("plain", "linked"))
    assert [path.name for path in plain] == [path.name for path in from_links]
    assert "tokenizer.json" in {path.name for path in plain}
    for one, other in zip(plain, from_links, strict=True):
        assert one.read_bytes() == other.read_bytes() and not other.is_symlink()


def test_a_target_inside_the_base_is_taken(tmp_path):
    base = sharded(tmp_path / "base", golden("linear")[1])
    assert main(["merge", str(base), str(golden("linear")[0]), str(base / "merged")]) == 0


@pytest.mark.parametrize(
    "entry", ["notes.txt", "pytorch_model.bin", "mine/deep.txt", "other.safetensors", "config.json"]
)
def test_overwrite_replaces_only_what_lojax_wrote(entry, tmp_path, capsys):
    base = sharded(tmp_path / "base", golden("linear")[1])
    arguments = ["merge", str(base), str(golden("linear")[0]), str(tmp_path / "out"), "--overwrite"]
    assert main(arguments) == 0 and main(arguments) == 0, "what it wrote is replaced"
    if entry == "config.json":  # somebody else's model, with a config of the same name
        for path in (tmp_path / "out").glob("*.safetensors"):
            path.unlink()
    path = tmp_path / "out" / entry
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    assert main(arguments) == 1
    assert f"holds {entry.partition('/')[0]}, which lojax did not write" in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_a_merged_model_can_be_merged_again(tmp_path):
    """Its base may be a file of lojax, whose digest is not that of what is merged into it."""
    safetensors.write_all(tmp_path / "model.safetensors", golden("linear")[1], {"format": "pt"})
    merge(tmp_path / "model.safetensors", golden("linear")[0], tmp_path / "one")
    merge(tmp_path / "one", golden("linear")[0], tmp_path / "two")
    assert set(read(tmp_path / "two" / "model.safetensors")) == set(golden("linear")[1])


def test_many_misfits_are_refused_in_linear_time(tmp_path):
    count = 20_000
    base = {f"layers.{i}.w.weight": np.zeros((2, 2), np.float16) for i in range(2000)}
    keys = [f"base_model.model.other.{i}.lora_{side}.weight" for i in range(count) for side in "AB"]
    adapter = edited(copied("linear", tmp_path / "a"), lambda t: t.update(dict.fromkeys(keys, np.zeros((2, 2), "f2"))))
    path = written(tmp_path / "model.safetensors", base)
    start = time.process_time()
    assert "has no place (nearest in the base: layers." in refusal(path, adapter)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("key", "shape"),
    [("q.lora_A.weight", ()), ("q.lora_A.weight", (0, 6)), ("q.lora_B.weight", (6,)), ("o.lora_A.weight", (2, 0))],
)
def test_factors_of_any_shape_are_refused(key, shape, tmp_path):
    spoil = lambda t: t.update({f"base_model.model.layers.0.{key}": np.zeros(shape, np.float32)})
    text = refusal(
        written(tmp_path / "model.safetensors", golden("linear")[1]), edited(copied("linear", tmp_path / "a"), spoil)
    )
    assert "does not fit the base" in text and "layers.0" in text


def test_memory_stays_near_the_largest_tensor(tmp_path):
    base = {f"layers.{i}.w.weight": np.zeros((2048, 2048), np.float32) for i in range(5)}  # 16 MiB each
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["w"]}
    tensors = {
        f"base_model.model.layers.{i}.w.lora_{side}.weight": np.ones(shape, np.float32)
        for i in range(5)
        for side, shape in (("A", (4, 2048)), ("B", (2048, 4)))
    }
    adapter = edited(copied("linear", tmp_path / "adapter", config=config), lambda t: (t.clear(), t.update(tensors)))
    path = written(tmp_path / "model.safetensors", base)
    tracemalloc.start()
    merge(path, adapter, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert 16 < peak < 36, f"{peak:.0f} MiB for a base of 80 MiB"
    assert (read(tmp_path / "out" / "model.safetensors")["layers.4.w.weight"] == 4).all()
