"""Writes ``golden/bitsandbytes.safetensors`` with bitsandbytes: ``python tests/base/make_golden.py``.

For each weight, the tensors that it stores, and ``NAME.dense``: what it dequantizes them to. Needs torch and
bitsandbytes.
"""

from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file

CASES = {  # shape, dtype, block, double quantization
    "double.weight": ((257, 32), torch.bfloat16, 32, True),  # 257 blocks: two groups of scales
    "single.weight": ((40, 24), torch.float32, 64, False),
    "odd.weight": ((7, 5), torch.float16, 64, True),
}


def store(name: str, w: torch.Tensor, block: int, double: bool) -> dict[str, torch.Tensor]:
    codes, state = functional.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type="nf4")
    tensors = {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return tensors | {f"{name}.dense": functional.dequantize_4bit(codes, state)}


if __name__ == "__main__":
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (shape, dtype, block, double) in CASES.items():
        tensors |= store(name, torch.randn(shape).to(dtype), block, double)
    path = Path(__file__).parent / "golden" / "bitsandbytes.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
