"""``python -m lojax quantize``: what it writes is what `lojax.quantize` computes, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import message

import lojax
from lojax.base.bitsandbytes_files import from_tensors, part_names, weight_names
from lojax.cli.main import main
from lojax.cli.model_directory import INDEX
from lojax.cli.quantize_files import quantize
from lojax.files import safetensors

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


TENSORS = {
    "model.embed_tokens.weight": normal(96, 64),
    "model.layers.0.q_proj.weight": normal(64, 64),
    "model.layers.0.up_proj.weight": normal(128, 48, dtype=ml_dtypes.bfloat16),
    "model.layers.1.q_proj.weight": normal(7, 5, dtype=np.float16),
    "model.layers.1.conv.weight": normal(4, 4, 3, 3),
    "model.norm.weight": normal(64),
    "model.ids.weight": np.arange(12).reshape(3, 4),
    "model.wide.weight": normal(4, 4).astype(np.float64),
    "model.table": normal(32, 32),
    "lm_head.weight": normal(96, 64),
}
QUANTIZED = ["model.layers.0.q_proj.weight", "model.layers.0.up_proj.weight", "model.layers.1.q_proj.weight"]


def written(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    safetensors.write(path, shapes, tensors.__getitem__, metadata={"format": "pt"})
    return path


def model(path: Path, tensors: dict[str, np.ndarray] = TENSORS, config: str = '{"hidden_size": 64}') -> Path:
    names = list(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in parts.items():
        written(path / file, {name: tensors[name] for name in held})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1, "mine": 2}, "weight_map": weight_map}))
    (path / "config.json").write_text(config)
    (path / "tokenizer.json").write_text("words")
    (path / "pytorch_model.bin").write_bytes(b"stale")
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file or a directory."""
    files = map(safetensors.open_file, [path] if path.is_file() else sorted(path.glob("*.safetensors")))
    return {name: file.read(name) for file in files for name in file.entries}


def check(tensors, quantized, **settings):
    """The quantized weights are those that `lojax.quantize` gives; the others are as they were."""
    assert sorted(weight_names(tensors)) == sorted(quantized)
    parts = {part for name in quantized for part in part_names(name, tensors)}
    assert set(tensors) - parts == set(TENSORS) - set(quantized)
    for name, w in TENSORS.items():
        if name not in quantized:
            assert (tensors[name].dtype, tensors[name].tobytes()) == (w.dtype, w.tobytes())
            continue
        expected = lojax.quantize({"w": jnp.asarray(w)}, "nf4", **settings)["w"]
        actual = from_tensors(name, tensors)
        assert actual.format == expected.format
        for key, array in expected.arrays.items():
            np.testing.assert_array_equal(actual.arrays[key], array)
        np.testing.assert_array_equal(actual.dense(), expected.dense())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 32])
def test_one_file(double, block, tmp_path, capsys):
    source = written(tmp_path / "model.safetensors", TENSORS)
    flags = ["--block", str(block), *([] if double else ["--no-double"])]
    assert main(["quantize", str(source), str(tmp_path / "out"), "--kind", "nf4", *flags]) == 0
    assert "3 weights in nf4" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    check(read(tmp_path / "out"), QUANTIZED, double=double, block=block)
    assert safetensors.open_file(tmp_path / "out" / "model.safetensors").metadata["format"] == "pt"


def test_another_reader_reads_it(tmp_path):
    """The header, which is written again once all lengths are known, is one for the safetensors library too."""
    reader = pytest.importorskip("safetensors.numpy")
    quantize(written(tmp_path / "model.safetensors", {"w.weight": normal(64, 64), "b": normal(3)}), tmp_path / "out")
    expected, actual = read(tmp_path / "out"), reader.load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)


def linked(source: Path) -> Path:
    """A model as it lies in the cache of the Hugging Face hub, where every file is a link."""
    snapshot = source.parent / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path.resolve())
    (snapshot / "gone.txt").symlink_to("nowhere")
    return snapshot


@pytest.mark.parametrize("is_linked", [False, True])
def test_shards_index_config_and_tokenizer(is_linked, tmp_path):
    source, out = model(tmp_path / "base"), tmp_path / "out"
    source = linked(source) if is_linked else source
    quantize(source, out)
    names = ["config.json", INDEX, "one.safetensors", "tokenizer.json", "two.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    check(read(out), QUANTIZED)
    index = json.loads((out / INDEX).read_text())
    assert set(index["weight_map"]) == set(read(out))
    assert all(name in safetensors.open_file(out / file).entries for name, file in index["weight_map"].items())
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in read(out).values()), "mine": 2}
    assert (out / "tokenizer.json").read_text() == "words"
    assert not any(path.is_symlink() for path in out.iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 64
    told = config["quantization_config"]
    assert (told["quant_method"], told["load_in_4bit"], told["bnb_4bit_quant_type"]) == ("bitsandbytes", True, "nf4")
    skipped = ["lm_head", "model.embed_tokens", "model.ids", "model.table", "model.wide"]
    assert told["llm_int8_skip_modules"] == skipped


@pytest.mark.parametrize(
    ("globs", "quantized"),
    [
        (["*q_proj.weight"], [QUANTIZED[0], QUANTIZED[2]]),
        (["*.0.up_proj.weight", "lm_head.*"], [QUANTIZED[1], "lm_head.weight"]),
        (["*"], [*QUANTIZED, "model.embed_tokens.weight", "lm_head.weight", "model.table"]),
    ],
)
def test_targets(globs, quantized, tmp_path):
    source = model(tmp_path / "base")
    assert (
        main(["quantize", str(source), str(tmp_path / "out"), *(x for glob in globs for x in ("--targets", glob))]) == 0
    )
    check(read(tmp_path / "out"), quantized)
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert ("lm_head" in skipped) == ("lm_head.weight" not in quantized)


# --- refusals ---


def refusal(source, target, kind=ValueError, **settings):
    """The error; nothing is left behind."""
    text = message(kind, quantize, source, target, **settings)
    assert not target.exists() and not [*target.parent.glob(".*")]
    return text


@pytest.mark.parametrize("kind", ["int8", "int4", "float8_e4m3fn"])
def test_kinds_that_bitsandbytes_files_do_not_know(kind, tmp_path, capsys):
    assert main(["quantize", str(model(tmp_path / "base")), str(tmp_path / "out"), "--kind", kind]) == 1
    assert f"kind='{kind}' is one that files of bitsandbytes do not hold; they hold 'nf4'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_and_sources_that_do_not_fit(tmp_path):
    source, out = model(tmp_path / "base"), tmp_path / "out"
    assert "block=48 is one that bitsandbytes does not know; it knows 32, 64" in refusal(source, out, block=48)
    text = refusal(source, out, targets=["*_proj.weight", "*qproj*"])
    assert "--targets '*qproj*' matches no 2-D floating-point weight; the files hold model." in text
    empty = written(tmp_path / "x" / "model.safetensors", {"norm.weight": normal(3)})
    assert "holds no 2-D floating-point '*.weight'" in refusal(empty, out)
    refusal(tmp_path / "nowhere", out, FileNotFoundError)
    clash = written(tmp_path / "y.safetensors", {"w.weight": normal(4, 4), "w.weight.absmax": normal(1)})
    assert "w.weight.absmax has the name of a part of a 4-bit weight" in refusal(clash, out)
    twice = model(tmp_path / "twice")
    written((twice / "two.safetensors").rename(twice / "old.bin") and twice / "two.safetensors", TENSORS)
    assert "two of its files hold a tensor of the same name" in refusal(twice, out)


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    quantize(model(tmp_path / "base"), tmp_path / "out")
    text = refusal(tmp_path / "out", tmp_path / "again")
    assert "holds 4-bit weights already, such as model.layers.0" in text
    source = model(tmp_path / "gptq", config='{"quantization_config": {"quant_method": "gptq"}}')
    assert "config.json has a quantization_config" in refusal(source, tmp_path / "again")


@pytest.mark.parametrize(("config", "part"), [("{", "is not JSON"), ("[1]", "is not a JSON object")])
def test_a_config_that_is_none(config, part, tmp_path):
    text = refusal(model(tmp_path / "base", config=config), tmp_path / "out")
    assert f"config.json {part}" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("double", [True, False])
def test_numbers_that_are_none(value, double, tmp_path):
    w = normal(64, 64)
    w[3, 4] = value
    source = written(tmp_path / "model.safetensors", {"a.weight": normal(4, 4), "w.weight": w})
    text = refusal(source, tmp_path / "out", double=double)
    assert f"{source}: tensor 'w.weight' holds NaN or infinity" in text


def test_a_file_that_was_cut(tmp_path):
    source = model(tmp_path / "base")
    data = (source / "two.safetensors").read_bytes()
    (source / "two.safetensors").write_bytes(data[:-1])
    assert "two.safetensors is not a whole safetensors file" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("target", [".", "base", "base/..", "base/one.safetensors"])
def test_a_target_that_is_or_holds_the_source(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model(Path("base"))
    before = sorted(map(str, tmp_path.rglob("*")))
    assert main(["quantize", "base", target, "--overwrite"]) == 1
    assert "which is an input. Choose another directory." in capsys.readouterr().err
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_overwrite_replaces_only_what_lojax_wrote(tmp_path, capsys):
    arguments = ["quantize", str(model(tmp_path / "base")), str(tmp_path / "out")]
    assert main(arguments) == 0 and main(arguments) == 1
    assert "exists. Choose another directory, or pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    (tmp_path / "out" / "notes.txt").write_text("precious")
    assert main([*arguments, "--overwrite"]) == 1
    assert "holds notes.txt, which lojax did not write" in capsys.readouterr().err


def test_merging_into_a_quantized_model_gives_plain_weights(tmp_path):
    """Those of the quantized model with and without an adapter; a shard may end between the parts of a weight."""
    tensors = {name: TENSORS[name] for name in ("model.layers.0.q_proj.weight", "lm_head.weight")}
    model(tmp_path / "base", tensors)
    adapter = tmp_path / "adapter"
    a, b = normal(2, 64), normal(64, 2)
    key = "base_model.model.model.layers.0.q_proj"
    written(adapter / "adapter_model.safetensors", {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    targets = ["*q_proj.weight", "lm_head.weight"]
    quantize(tmp_path / "base", tmp_path / "nf4", targets=targets)
    model(tmp_path / "other", read(tmp_path / "nf4"), (tmp_path / "nf4" / "config.json").read_text())  # other shards
    assert main(["merge", str(tmp_path / "other"), str(adapter), str(tmp_path / "out")]) == 0
    merged, base = read(tmp_path / "out"), read(tmp_path / "nf4")
    assert set(merged) == set(tensors) == set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    q, head = (np.asarray(from_tensors(name, base).dense()) for name in tensors)
    np.testing.assert_allclose(merged["model.layers.0.q_proj.weight"], q + 2 * b @ a, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged["lm_head.weight"], head)


SCRIPT = """
import resource, sys
from pathlib import Path
from lojax.cli.quantize_files import quantize
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small, large, out = map(Path, sys.argv[1:])
quantize(small, out / "small")  # what Python, JAX and a compiler take anyway
before = peak()
quantize(large, out / "large")
print(peak() - before)
"""


@pytest.mark.optimized
def test_peak_memory_is_a_few_times_the_largest_tensor(tmp_path):
    large = normal(1024, 1024)  # 4 MiB
    small = written(tmp_path / "small.safetensors", {"w.weight": large[:8]})
    base = written(tmp_path / "large.safetensors", {f"layers.{i}.weight": large for i in range(48)})
    assert base.stat().st_size > 200e6
    # A process starts with the peak of what it was forked from. Between this one and the measured one is a small shell.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", SCRIPT]
    arguments = map(str, (small, base, tmp_path / "out"))
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout)
    assert 4 < peak < 80, f"{peak:.0f} MiB more for a checkpoint of 192 MiB whose tensors have 4 MiB"
    assert (tmp_path / "out" / "large" / base.name).stat().st_size < 0.52 * 48 * 1024**2 + 100_000
