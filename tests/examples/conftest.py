"""A tiny random BERT on disk and a small labelled table, so that the examples run in seconds."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue"]
WORDS += ["cat", "dog", "bird", "sits", "runs", "a", "the"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def tensors(layers: int = 2) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face names, kernels ``[out, in]`` as torch keeps them."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    found = {
        "embeddings.word_embeddings.weight": draw(CONFIG["vocab_size"], width),
        "embeddings.position_embeddings.weight": 0.1 * draw(CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": draw(CONFIG["type_vocab_size"], width),
        "pooler.dense.weight": draw(width, width),
    }
    shapes = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
        "attention.output.LayerNorm": (width,),
        "output.LayerNorm": (width,),
    }
    named = {f"encoder.layer.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    for name, shape in {"embeddings.LayerNorm": (width,), **named}.items():
        found[f"{name}.weight"] = 0.2 * draw(*shape) + np.float32("Norm" in name)
        found[f"{name}.bias"] = 0.1 * draw(shape[0])
    return found


def write_bert(folder: Path, weights: dict[str, np.ndarray], config: dict | None = None) -> Path:
    """Writes a model directory as Hugging Face does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    save_file(
        {name: np.ascontiguousarray(value) for name, value in weights.items()},
        folder / "model.safetensors",
    )
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Optax's schedules mix integer counts with floats, as strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random BERT with two layers of width 8."""
    return write_bert(tmp_path_factory.mktemp("models") / "tiny", tensors())


@pytest.fixture(scope="session")
def one_layer_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer, which compiles faster."""
    folder = tmp_path_factory.mktemp("models") / "one_layer"
    return write_bert(folder, tensors(1), {**CONFIG, "num_hidden_layers": 1})


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 120 different texts; the label is the colour in the text."""
    file = tmp_path_factory.mktemp("data") / "colours.csv"
    rng = np.random.default_rng(1)
    texts: dict[str, str] = {}
    while len(texts) < 120:
        colour = str(rng.choice(["red", "green", "blue"]))
        words = [*rng.choice(WORDS[7:], size=5), colour, colour, colour]
        texts[" ".join(rng.permutation(words))] = colour
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["body", "folder"])
        writer.writerows(texts.items())
    return file
