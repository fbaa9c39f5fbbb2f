"""The pod example: weights, data, checkpoints, and the run itself on eight virtual devices."""

import dataclasses
import gc
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lojax
from lojax.adapters.paths import unflatten
from lojax.files.safetensors import NAMES as DTYPES
from lojax.files.safetensors import write_all
from lojax.planner.decoder import Decoder, parameter_specs
from lojax.planner.decoder_config import PRESETS, from_fields, read_config

grain = pytest.importorskip("grain")
import pod  # noqa: E402
import pod_data  # noqa: E402
import pod_weights  # noqa: E402
from pod_checkpoint import Checkpoints  # noqa: E402

AXES = ("data", "fsdp", "tensor")


def mesh_of(*shape):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


FIELDS = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def saved(folder, fields=FIELDS):
    """A random model as Hugging Face saves it, and its parameters as the decoder has them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    config = from_fields(fields)
    params, tensors = {}, {}
    for i, (path, (shape, _)) in enumerate(parameter_specs(config).items()):
        params[path] = np.random.default_rng(i).normal(size=shape).astype(np.float32)
        layers = range(shape[0]) if path.startswith("layers/") else [None]
        for layer in layers:
            one = params[path] if layer is None else params[path][layer]
            tensors[pod_weights.torch_name(path).format(layer)] = one.T if path.endswith("/kernel") else one
    write_all(folder / "model.safetensors", tensors, {"format": "pt"})
    return unflatten(params)


def test_weights_are_read_as_they_lie(tmp_path):
    want = saved(tmp_path / "m")
    for shape in ((1, 1, 1), (1, 4, 2), (2, 2, 2)):
        mesh = mesh_of(*shape) if np.prod(shape) == 8 else jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1])
        decoder = Decoder(read_config(tmp_path / "m"), mesh)
        got = pod_weights.load(tmp_path / "m", decoder, jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert got["layers"]["mlp"]["up_proj"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")


def test_a_slice_reads_only_its_bytes(tmp_path, monkeypatch):
    saved(tmp_path / "m")
    asked = []

    class Watched(np.memmap):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            asked.append(found.size)
            return found

    monkeypatch.setattr(pod_weights.np, "memmap", Watched)
    tensors = pod_weights.open_files(tmp_path / "m")
    read = pod_weights.slice_reader("layers/mlp/up_proj/kernel", (3, 32, 64), tensors, tmp_path)
    part = read((slice(1, 2), slice(0, 8), slice(32, 48)))
    assert part.shape == (1, 8, 16) and max(asked) <= 8 * 16


def test_a_damaged_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors"):
        pod_weights.open_files(tmp_path)
    saved(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(FIELDS | {"intermediate_size": 48}))
    decoder = Decoder(read_config(tmp_path / "m"), mesh_of(2, 2, 2))
    with pytest.raises(ValueError, match=r"has shape \(64, 32\); config.json says \(48, 32\)"):
        pod_weights.load(tmp_path / "m", decoder)
    (tmp_path / "m" / "config.json").write_text(json.dumps(FIELDS | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks the tensor 'model.layers.3.input_layernorm.weight'"):
        pod_weights.load(tmp_path / "m", Decoder(read_config(tmp_path / "m"), mesh_of(2, 2, 2)))
    assert DTYPES


MODELS = {
    "llama": {},
    "llama 3.1": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma": {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = FIELDS | MODELS[name] | {"attn_implementation": "eager"}
    kind = fields.pop("model_type", "llama")
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # norms and biases too must count
            parameter.add_(0.05 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path / "m")
    tokens = np.random.default_rng(1).integers(0, 96, (2, 16))
    with torch.no_grad():
        want = net(torch.from_numpy(tokens)).logits.numpy()
    decoder = Decoder(
        read_config(tmp_path / "m"),
        mesh_of(2, 1, 4) if name == "llama" else mesh_of(2, 2, 2),
        chunk=4,
    )
    params = pod_weights.load(tmp_path / "m", decoder, jnp.float32)
    got = jax.jit(decoder.logits)(params, jnp.asarray(tokens))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_packed_documents_do_not_see_each_other():
    decoder = Decoder(dataclasses.replace(PRESETS["tiny"], layers=2), chunk=8)
    params = decoder.init(jax.random.key(0))
    one, two = [5, 9, 2, 7, 1], [3, 3, 8, 4]
    row = {k: jnp.asarray(v)[None] for k, v in pod_data.pack([one, two], 16)[0].items()}
    packed = decoder.logits(params, row["tokens"], row["segments"], row["positions"])
    for document, start in ((one, 0), (two, 4)):
        alone = decoder.logits(params, jnp.asarray([document[:-1]]))
        np.testing.assert_allclose(packed[0, start : start + len(document) - 1], alone[0], rtol=1e-4, atol=1e-4)
    assert row["weights"].sum() == 4 + 3 and row["targets"][0, :7].tolist() == [*one[1:], *two[1:]]


def test_grouped_loss_is_the_mean_cross_entropy():
    decoder = Decoder(PRESETS["tiny"], chunk=4)
    params = decoder.init(jax.random.key(0))
    batch = {k: jnp.asarray(v)[None] for k, v in pod_data.pack([list(range(1, 12))], 16)[0].items()}
    logits = decoder.logits(params, batch["tokens"], batch["segments"], batch["positions"])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    want = (losses * batch["weights"]).sum() / batch["weights"].sum()
    np.testing.assert_allclose(decoder.loss(params, batch), want, rtol=1e-5)


def test_packing_keeps_every_next_token_once():
    documents = pod_data.documents(None, None, 256)
    packed = pod_data.pack(documents, 64)
    pairs = sorted((a, b) for d in documents for a, b in itertools.pairwise(d))
    found = []
    for i in range(len(packed)):
        row = packed[i]
        here = row["weights"] > 0
        found += list(zip(row["tokens"][here].tolist(), row["targets"][here].tolist(), strict=True))
    assert sorted(found) == pairs
    with pytest.raises(ValueError, match="no document of two or more tokens"):
        pod_data.pack([[1]], 8)


def test_a_step_has_the_same_batch_on_every_mesh_and_after_a_stop():
    source = pod_data.pack(pod_data.documents(None, None, 256), 32)

    def of(spec, start, accumulation_steps):
        sharding = NamedSharding(mesh_of(2, 2, 2), spec)
        return list(
            pod_data.batches(
                source, sharding, batch=8, accumulation_steps=accumulation_steps, seed=3, start=start, stop=4
            )
        )

    whole = of(PartitionSpec(), 0, 1)
    cut = of(PartitionSpec(None, ("data", "fsdp")), 2, 2)
    assert len(whole) == 4 and len(cut) == 2
    for name in pod_data.NAMES:
        np.testing.assert_array_equal(np.asarray(cut[0][name]).reshape(8, 32), whole[2][name])
    assert not np.array_equal(whole[0]["tokens"], whole[1]["tokens"])


def test_texts(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo words\n\n\n")
    assert pod_data.documents(tmp_path / "t.txt", None, 256) == [list(b"one"), list(b"two words")]


def run(tmp_path, *extra, steps=4):
    common = [
        "--mesh",
        "data=2,fsdp=2,tensor=2",
        "--batch",
        "8",
        "--seq",
        "32",
        "--steps",
        str(steps),
    ]
    common += ["--dtype", "float32", "--save-every", "2", "--rate", "1e-3"]
    args = pod.arguments([*common, "--out", str(tmp_path), *extra])
    args.out.mkdir(parents=True, exist_ok=True)
    return pod.run(args)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_run_goes_on_where_it_stopped(tmp_path, capsys):
    want = run(tmp_path / "whole", steps=4)
    first = run(tmp_path / "cut", steps=2)
    rest = run(
        tmp_path / "cut", "--mesh", "fsdp=4,tensor=2", "--accumulation-steps", "1", steps=4
    )  # another mesh, uncut batches
    assert len(first) == len(rest) == 2 and "from step 2" in capsys.readouterr().out
    np.testing.assert_allclose([*first, *rest], want, rtol=1e-5)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "cut" / "losses.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(logged, want, rtol=1e-5)


def test_bad_arguments(tmp_path):
    for extra, message in (
        (["--mesh", "fsdp=4"], "needs 4 devices, but there are 8"),
        (["--batch", "9"], "is not a multiple of accumulation_steps=2"),
        (["--batch", "4"], "is not a multiple of data × fsdp"),
        (["--seq", "31"], "is not a multiple of tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, *extra)


def state_on(mesh, rank):
    lora = lojax.init(jax.random.key(0), {"w": jnp.ones((64, 32))}, "w", rank=rank)[1]
    specs = jax.tree.map(lambda x: PartitionSpec("fsdp" if x.shape[0] == 64 else None), lora)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(lora, placed), placed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax drops its loop when a read fails
def test_a_checkpoint_changes_mesh_and_refuses_what_does_not_fit(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1)
    state, _ = state_on(mesh_of(1, 8, 1), 4)
    checkpoints.save(3, state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, every=1)
    fresh, placed = state_on(mesh_of(2, 2, 2), 4)
    step, found = checkpoints.latest(jax.tree.map(jnp.zeros_like, fresh), placed)
    assert step == 3 and found["w"].a.sharding == placed["w"].a and found["w"].axes == ("in", "out")
    jax.tree.map(np.testing.assert_array_equal, found, state)
    with pytest.raises(ValueError, match=r"holds .*a as \(64, 4\); this run has \(64, 2\)"):
        checkpoints.latest(*state_on(mesh_of(2, 2, 2), 2))
    gone = [file for file in (tmp_path / "3").rglob("*") if file.is_file() and file.parent.name == "d"]
    assert gone
    for file in gone:
        file.unlink()
    with pytest.raises(ValueError, match="cannot be read: files are missing or damaged"):
        checkpoints.latest(fresh, placed)
    checkpoints.close()
    gc.collect()  # what orbax left is thrown away here, not in another test


def spoil_metadata(folder):
    (folder / "3" / "default" / "_METADATA").write_text("{")


def drop_metadata(folder):
    (folder / "3" / "default" / "_METADATA").unlink()


@pytest.mark.parametrize(
    ("spoil", "why"), [(spoil_metadata, "Expecting property name"), (drop_metadata, "its _METADATA is missing")]
)
def test_a_checkpoint_that_does_not_say_what_it_holds(tmp_path, spoil, why):
    checkpoints = Checkpoints(tmp_path, every=1)
    state, placed = state_on(mesh_of(1, 8, 1), 4)
    checkpoints.save(3, state)
    checkpoints.close()
    spoil(tmp_path)
    checkpoints = Checkpoints(tmp_path, every=1)
    with pytest.raises(ValueError, match=rf"of step 3 in .* cannot be read: files are missing or damaged \({why}"):
        checkpoints.latest(state, placed)
    checkpoints.close()


def test_a_checkpoint_that_holds_more(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1)
    state, placed = state_on(mesh_of(1, 8, 1), 4)
    checkpoints.save(1, {**state, "x": jnp.ones(3)})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, every=1)
    with pytest.raises(ValueError, match=r"holds .*x as \(3,\); this run has None"):
        checkpoints.latest(state, placed)
    checkpoints.close()


def test_no_checkpoint_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", every=1)
    assert checkpoints.latest({"a": 1}, None) == (0, {"a": 1})
    assert checkpoints.is_preempted(1, True) and not checkpoints.is_preempted(1, False)
    checkpoints.close()
    assert sys.modules["pod"]
