"""Writes the golden adapters beside this file with real PEFT: ``python tests/peft/make_golden.py [case ...]``.

Each directory holds what `PeftModel.save_pretrained` wrote for a tiny torch net, and ``golden.safetensors``
with the base weights, an input ``x``, and the adapted output ``y``. Needs torch, transformers and peft.
"""

import shutil
import sys
from pathlib import Path

import torch
from nets_torch import CASES
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).parent / "golden"


def make(name: str) -> None:
    torch.manual_seed(sum(name.encode()))
    case = CASES[name]
    net = case.net().eval()
    base = {f"base.{key}": value.clone() for key, value in net.state_dict().items()}
    x = case.x()
    model = get_peft_model(net, LoraConfig(init_lora_weights=False, **case.config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        y = model(x)
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    save_file(base | {"x": x, "y": y.contiguous()}, path / "golden.safetensors")


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)
