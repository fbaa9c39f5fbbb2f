"""`tame` and the count of intruders against PEFT's ``reduce_intruder_dimension`` on torch."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

import lojax

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SIZES = {"up": (24, 40), "square": (32, 32), "down": (40, 24), "quiet": (24, 24)}


def build(seed: int, strength: float):
    """A torch model with a LoRA adapter on each layer, and the same as ``(frozen, lora)``."""
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.ModuleDict({name: torch.nn.Linear(m, n) for name, (m, n) in SIZES.items()})
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*SIZES], rank_pattern={"down": 2})
    model = peft.get_peft_model(net, config)
    frozen, lora = {}, {}
    for name in SIZES:
        layer = model.base_model.model[name]
        weight = layer.get_base_layer().weight.data
        weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
        b = layer.lora_B["default"].weight.data
        b.copy_(torch.randn(b.shape, generator=generator) * (1e-3 if name == "quiet" else strength))
        frozen[name] = jnp.asarray(weight.numpy().T.copy())
        a = layer.lora_A["default"].weight.data
        factors = (jnp.asarray(x.numpy().T.copy()) for x in (a, b))
        lora[name] = lojax.Adapter(*factors, scale=layer.scaling["default"], axes=("in", "out"))
    return model, frozen, lora


# torch and PEFT warn of things of their own.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "ours"), [({}, {}), ({"mitigation_lambda": 0.2, "top_k": 3}, {"keep": 0.2, "top": 3})]
)
def test_tame_is_what_peft_does(settings, ours):
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    found = 0
    for seed, strength in ((0, 1.0), (1, 3.0)):
        model, frozen, lora = build(seed, strength)
        log: list[str] = []
        reduce_intruder_dimension(model, logging_sink=log.append, **settings)
        top = {"top": ours["top"]} if "top" in ours else {}
        counts = {row.path: row.intruders for row in lojax.analyze(frozen, lora, **top).rows}
        tamed = lojax.tame(frozen, lora, **ours)
        for name in SIZES:
            (line,) = (text for text in log if text.startswith(f"base_model.model.{name}:"))
            theirs = int(number[1]) if (number := re.search(r"Intruders: (\d+)", line)) else 0
            assert counts[name] == theirs
            found += theirs
            layer = model.base_model.model[name]
            expected = layer.get_delta_weight("intruder_reduced").detach().numpy().T
            adapter = tamed[name]
            np.testing.assert_allclose(
                adapter.scale * np.asarray(adapter.a @ adapter.b), expected, atol=1e-5, rtol=1e-5
            )
        assert counts["quiet"] == 0 and tamed["quiet"] is lora["quiet"]
    assert found > 5
