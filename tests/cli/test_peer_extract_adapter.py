"""PEFT loads what ``lojax extract`` wrote, and the model computes what the tuned one does."""

from __future__ import annotations

import pytest

from lojax.cli.extract_adapter import extract

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


# torch and PEFT warn of things of their own.
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_the_adapter(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).eval()
    net.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path / "tuned")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = net(tokens).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        before = (base(tokens).logits - expected).abs().max()
        for settings, allowed in (
            ({"rank": 99, "full": True}, 1e-4),
            ({"energy": 0.99, "full": True}, 0.3 * float(before)),
        ):
            extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", overwrite=True, **settings)
            model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            assert (model(tokens).logits - expected).abs().max() < allowed
            base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
