"""The tiny torch nets of the golden adapters. Needs torch and transformers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Layer(nn.Module):
    """``x + o(q(x) * v(x))``."""

    def __init__(self, width: int, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.q, self.v, self.o = (linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(self.q(x) * self.v(x))


class Net(nn.Module):
    """Two layers and a head, on vectors or on tokens."""

    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear, vocabulary: int = 0) -> None:
        super().__init__()
        if vocabulary:
            self.embed = nn.Embedding(vocabulary, 6)
        self.layers = nn.ModuleList(Layer(6, linear) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) if hasattr(self, "embed") else x
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ConvNet(nn.Module):
    """A 3x3 convolution with stride 2, then a 1x1 one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(self.wide(x))


class Experts(nn.Module):
    """``[expert, out, in]`` parameters, as most mixture models of transformers have them."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / 2)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("ti,eoi->teo", x, self.up)
        return torch.einsum("teo,eio->ti", hidden.tanh(), self.down)


class MoeNet(nn.Module):
    """One layer of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts(3, 4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.experts(x)


def conv1d(m: int, n: int) -> Conv1D:
    """GPT-2's layer: its weight is ``(in, out)``."""
    layer = Conv1D(n, m)
    nn.init.normal_(layer.weight, std=0.4)
    return layer


@dataclasses.dataclass(frozen=True)
class Case:
    net: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    config: dict[str, Any]


def vectors() -> torch.Tensor:
    return torch.randn(3, 6)


CASES = {
    "linear": Case(Net, vectors, {"r": 2, "lora_alpha": 3, "target_modules": ["q", "v", "o"]}),
    "patterns": Case(
        Net,
        vectors,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": r"layers\.\d\.(q|v)",
            "rank_pattern": {"layers.1.q": 3, "^layers.0.v": 1},
            "alpha_pattern": {"v": 5},
            "use_rslora": True,
            "bias": "lora_only",
            "modules_to_save": ["head"],
        },
    ),
    "some_layers": Case(
        Net,
        vectors,
        {"r": 2, "lora_alpha": 2, "target_modules": ["q", "o"], "exclude_modules": ["layers.0.o"], "bias": "all"},
    ),
    "dora": Case(
        Net,
        vectors,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q", "v", "o"],
            "exclude_modules": ["layers.0.v", "layers.1.o"],
            "rank_pattern": {"layers.1.q": 3},
            "alpha_pattern": {"layers.1.q": 5},
            "use_dora": True,
        },
    ),
    "conv1d": Case(
        lambda: Net(conv1d), vectors, {"r": 2, "lora_alpha": 3, "target_modules": ["q", "v"], "fan_in_fan_out": True}
    ),
    "embedding": Case(
        lambda: Net(vocabulary=9), lambda: torch.randint(0, 9, (2, 4)), {"r": 2, "target_modules": ["embed", "q"]}
    ),
    "conv2d": Case(
        ConvNet, lambda: torch.randn(2, 2, 9, 9), {"r": 2, "lora_alpha": 3, "target_modules": ["wide", "point"]}
    ),
    "dora_conv1d": Case(
        lambda: Net(conv1d),
        vectors,
        {"r": 2, "lora_alpha": 3, "target_modules": ["q", "v"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "dora_embedding": Case(
        lambda: Net(vocabulary=9),
        lambda: torch.randint(0, 9, (2, 4)),
        {"r": 2, "target_modules": ["embed", "q"], "use_dora": True},
    ),
    "dora_conv2d": Case(
        ConvNet,
        lambda: torch.randn(2, 2, 9, 9),
        {"r": 2, "lora_alpha": 3, "target_modules": ["wide", "point"], "use_dora": True},
    ),
    "tokens": Case(
        lambda: Net(vocabulary=9),
        lambda: torch.arange(8).reshape(2, 4),
        {"r": 2, "target_modules": ["q"], "trainable_token_indices": {"embed": [7, 2]}},
    ),
    "experts": Case(
        MoeNet,
        lambda: torch.randn(5, 4),
        {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
    ),
}
