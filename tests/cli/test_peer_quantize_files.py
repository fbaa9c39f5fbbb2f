"""transformers loads what ``lojax quantize`` wrote, as a model in 4 bits."""

from __future__ import annotations

import numpy as np
import pytest

from lojax.base.bitsandbytes_files import from_tensors, weight_names
from lojax.cli.model_directory import weight_files
from lojax.cli.quantize_files import quantize
from lojax.files import safetensors

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


# torch 2.13 and accelerate warn of things of their own.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_model(tied, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)
    net = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    net.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    names = quantize(tmp_path / "base", tmp_path / "out")
    assert len(names) == 14
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    files = [safetensors.open_file(path) for path in weight_files(tmp_path / "out")]
    tensors = {name: file.read(name) for file in files for name in file.entries}
    assert sorted(weight_names(tensors)) == names
    with torch.no_grad():
        for name in names:
            weight = loaded.get_parameter(name)
            theirs = functional.dequantize_4bit(weight.data, weight.quant_state)
            expected = np.asarray(from_tensors(name, tensors).dense(), np.float32)
            np.testing.assert_array_equal(theirs.float().numpy(), expected)
            net.get_parameter(name).copy_(theirs)
        tokens = torch.arange(12)[None]
        torch.testing.assert_close(loaded(tokens).logits, net(tokens).logits, rtol=0.05, atol=0.05)
