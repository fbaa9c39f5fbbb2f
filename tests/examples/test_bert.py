"""The compact BERT is the real BERT, and a broken model directory is named."""

import json
from pathlib import Path

import bert
import jax
import model_files
import numpy as np
import pytest
import text_data
from conftest import CONFIG, tensors, write_bert

GOLDEN = json.loads((Path(__file__).parent / "minilm_golden.json").read_text())


def minilm() -> Path:
    try:
        return model_files.find()
    except FileNotFoundError:
        pytest.skip(f"{model_files.DEFAULT} is not installed")


def hidden(directory: Path, tokens, mask) -> np.ndarray:
    net, variables = bert.load(directory, 3, key=jax.random.key(0))
    return np.asarray(net.apply(variables, np.asarray(tokens), np.asarray(mask), method="hidden"))


def test_minilm_gives_the_numbers_that_torch_gave():
    directory = minilm()
    tokens, mask = text_data.encode(GOLDEN["texts"], directory / "tokenizer.json", GOLDEN["length"])
    assert tokens.tolist() == GOLDEN["tokens"]
    assert mask.tolist() == GOLDEN["mask"]
    net, variables = bert.load(directory, 3, key=jax.random.key(0))
    first = net.apply(variables, tokens, mask, method="hidden")[:, 0, :8]
    np.testing.assert_allclose(first, GOLDEN["hidden_of_first_token"], atol=1e-4)
    pooled = net.apply(variables, tokens, mask, method="pooled")[:, :8]
    np.testing.assert_allclose(pooled, GOLDEN["pooled"], atol=1e-4)


@pytest.mark.peer
@pytest.mark.filterwarnings("default")
def test_minilm_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = minilm()
    texts = ["Returns the sorted keys.", "low-rank " * 40, "é ? 42"]
    tokens, mask = text_data.encode(texts, directory / "tokenizer.json", 64)
    peer = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = peer(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    distance = np.abs(expected.last_hidden_state.numpy() - hidden(directory, tokens, mask))
    assert distance.max() < 1e-4


@pytest.mark.peer
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_tiny_equals_transformers(tmp_path, activation):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = write_bert(tmp_path, tensors(), {**CONFIG, "hidden_act": activation})
    tokens = np.array([[2, 4, 7, 3, 0, 0], [2, 5, 8, 10, 9, 3]])
    mask = (tokens > 0).astype(np.int32)
    config = transformers.BertConfig.from_pretrained(directory)
    peer = transformers.BertModel(config, add_pooling_layer=False).eval()
    weights = {name: torch.tensor(value) for name, value in tensors().items()}
    weights.pop("pooler.dense.weight")
    peer.load_state_dict(weights)
    with torch.no_grad():
        expected = peer(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    distance = np.abs(expected.last_hidden_state.numpy() - hidden(directory, tokens, mask))
    assert distance.max() < 1e-5


def test_tree_has_readable_paths_and_in_out_kernels(tiny_bert):
    _, variables = bert.load(tiny_bert, 3, key=jax.random.key(0))
    params = variables["params"]
    assert set(params) == {"embeddings", "encoder", "classifier"}
    layer = params["encoder"]["layer_1"]
    assert layer["intermediate"]["kernel"].shape == (8, 16)
    assert layer["output"]["kernel"].shape == (16, 8)
    assert params["classifier"]["kernel"].shape == (8, 3)
    stored = tensors()["encoder.layer.1.attention.self.query.weight"]
    np.testing.assert_array_equal(layer["attention"]["query"]["kernel"], stored.T)


def test_prefixes_and_old_norm_names_are_read(tmp_path, tiny_bert):
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors().items()
    }
    expected = bert.load(tiny_bert, 3, key=jax.random.key(0))[1]
    found = bert.load(write_bert(tmp_path, old), 3, key=jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_half_precision_files_are_read_as_float32(tmp_path):
    half = {name: value.astype(np.float16) for name, value in tensors().items()}
    _, variables = bert.load(write_bert(tmp_path, half), 3, key=jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}


def test_padding_changes_nothing(tiny_bert):
    net, variables = bert.load(tiny_bert, 3, key=jax.random.key(0))
    short = np.array([[2, 4, 7, 3]])
    long = np.array([[2, 4, 7, 3, 5, 6]])
    expected = net.apply(variables, short, np.ones_like(short))
    found = net.apply(variables, long, np.array([[1, 1, 1, 1, 0, 0]]))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dropout_needs_its_flag(tiny_bert):
    net, variables = bert.load(tiny_bert, 3, key=jax.random.key(0))
    tokens = np.array([[2, 4, 7, 3]])
    mask = np.ones_like(tokens)

    def logits(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return net.apply(variables, tokens, mask, deterministic=False, rngs=rngs)

    assert not np.allclose(logits(0), logits(1))
    np.testing.assert_array_equal(logits(0), logits(0))


def test_missing_tensor_is_named(tmp_path):
    weights = tensors()
    del weights["encoder.layer.1.attention.self.value.weight"]
    with pytest.raises(ValueError, match=r"no tensor 'encoder\.layer\.1\.attention\.self\.value"):
        bert.load(write_bert(tmp_path, weights), 3, key=jax.random.key(0))


def test_misshaped_tensor_is_named_with_both_shapes(tmp_path):
    weights = tensors()
    weights["encoder.layer.0.output.dense.weight"] = np.zeros((16, 8), np.float32)
    expected = r"'encoder\.layer\.0\.output\.dense\.weight' has shape \[16, 8\], expected \[8, 16\]"
    with pytest.raises(ValueError, match=expected):
        bert.load(write_bert(tmp_path, weights), 3, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "swoosh"}, "hidden_act is 'swoosh'; known: gelu"),
        ({"num_attention_heads": 3}, "hidden_size 8 is not a multiple"),
    ],
)
def test_other_nets_are_refused(tmp_path, change, message):
    directory = write_bert(tmp_path, tensors(), {**CONFIG, **change})
    with pytest.raises(ValueError, match=message):
        bert.load(directory, 3, key=jax.random.key(0))


def test_config_without_sizes_is_refused(tmp_path):
    directory = write_bert(tmp_path, tensors(), {"model_type": "bert", "vocab_size": 14})
    with pytest.raises(ValueError, match=r"config\.json: no hidden_size"):
        bert.load(directory, 3, key=jax.random.key(0))


def test_missing_file_is_named(tmp_path, tiny_bert):
    (tmp_path / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        bert.load(tmp_path, 3, key=jax.random.key(0))
