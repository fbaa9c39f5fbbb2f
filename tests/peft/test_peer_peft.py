"""Real PEFT on real transformers: its files give its logits here, our files give our logits there."""

from __future__ import annotations

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lojax
import lojax.peft
from lojax.files import safetensors
from tests.peft.layouts import ROWS, golden

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
NAMES = ("bert", "roberta", "gpt2", "llama", "mistral", "gemma", "t5", "vit", "clip")
DORA = {"use_dora": True}
TOKENS = {"trainable_token_indices": [5, 39, 7]}
SETTINGS = [
    *((name, {}) for name in NAMES),
    *((name, DORA) for name in ("bert", "gpt2", "llama", "t5", "clip")),
    *((name, TOKENS) for name in ("bert", "gpt2", "llama", "t5")),  # bert and gpt2 by other names; gpt2 and t5 tied
    ("llama", DORA | TOKENS),
]
"""Every family as plain LoRA, and some with what else PEFT trains."""


@pytest.fixture(scope="module")
def peers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
        for name in ("torch", "transformers", "peft"):
            importlib.import_module(name)
        yield importlib.import_module("families_torch"), importlib.import_module("nets_torch")


@pytest.fixture(autouse=True)
def as_transformers_flax_expects(monkeypatch):
    """Its Flax models were written for implicit promotion, and T5 for the older spelling of `jnp.clip`."""
    clip = jnp.clip

    def older(x, *args, a_max=None, **kwargs):
        return clip(x, *args, **kwargs) if a_max is None else clip(x, *args, max=a_max, **kwargs)

    monkeypatch.setattr(jnp, "clip", older)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with jax.numpy_dtype_promotion("standard"):
        yield


def inputs(kinds):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 40, (2, 7))
    ids[:, 1:4] = [5, 39, 7]
    ids[:, -1] = 2
    every = {
        "ids": ("input_ids", ids),
        "mask": ("attention_mask", np.ones_like(ids)),
        "decoder": ("decoder_input_ids", ids),
        "pixels": ("pixel_values", rng.normal(size=(2, 3, 16, 16)).astype(np.float32)),
    }
    return dict(every[kind] for kind in kinds)


def logits(output):
    return output.logits_per_image if hasattr(output, "logits_per_image") else output.logits


def relative(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def shaken(model, torch):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=[" ".join([n, *s]) for n, s in SETTINGS])
def test_logits_agree_both_ways(family, settings, peers, tmp_path):
    import peft
    import torch

    families, _ = peers
    assert set(NAMES) == set(families.FAMILIES)
    case = families.FAMILIES[family]
    torch.manual_seed(0)
    model = shaken(case.torch_model(), torch)
    model.save_pretrained(tmp_path / "base")
    flax, params = case.flax_model(model)
    x = inputs(case.inputs)
    run = lambda model: logits(model(**{key: torch.tensor(value) for key, value in x.items()})).detach().numpy()
    plain = run(model)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=case.targets,
        modules_to_save=case.saved,
        init_lora_weights=False,
        rank_pattern={case.targets[0]: 4},
        alpha_pattern={case.targets[-1]: 2},
        use_rslora=True,
        bias="lora_only",
        **settings,
    )
    adapted = shaken(peft.get_peft_model(model, config), torch)
    adapted.save_pretrained(tmp_path / "theirs")
    expected = run(adapted)
    assert relative(plain, expected) > 0.05, "the adapter does nothing: this would prove nothing"

    lora = lojax.peft.load(tmp_path / "theirs", params, family)
    frozen = lojax.peft.freeze(params, lora)
    ours = jax.jit(lojax.transform(lambda params: logits(flax(**x, params=params)), strict=True))(frozen, lora)
    assert relative(ours, expected) < 1e-5

    lojax.peft.save(tmp_path / "ours", lora, frozen, family, task_type=None)
    base = type(model).from_pretrained(tmp_path / "base")
    returned = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert relative(run(returned), expected) < 1e-5
    print(f"{family}: {relative(ours, expected):.1e} here, {relative(run(returned), expected):.1e} there")


@pytest.mark.parametrize(("case", "name", "layout"), ROWS, ids=[f"{case}-{name}" for case, name, _ in ROWS])
def test_what_we_write_computes_the_same_in_peft(case, name, layout, peers, tmp_path):
    import peft
    import torch

    _, nets = peers
    path, tensors, x, y = golden(case)
    base = layout.base(tensors)
    lora = lojax.peft.load(path, base, layout.names)
    lojax.peft.save(tmp_path / "ours", lora, lojax.peft.freeze(base, lora), layout.names)
    net = nets.CASES[case].net()
    net.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    model = peft.PeftModel.from_pretrained(net, tmp_path / "ours").eval()
    np.testing.assert_allclose(model(torch.tensor(x)).detach().numpy(), y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_token_rows_that_peft_saved_twice_for_a_tied_head(peers, tmp_path):
    """As it does for an embedding that was resized: the whole of it, and the same again under the head's name."""
    import peft
    import torch

    case = peers[0].FAMILIES["gpt2"]
    torch.manual_seed(0)
    model = shaken(case.torch_model(), torch)
    flax, params = case.flax_model(model)
    del params["lm_head"]  # which is there, and not used
    x = inputs(case.inputs)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, **TOKENS)
    adapted = shaken(peft.get_peft_model(model, config), torch)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = safetensors.open_file(tmp_path / "adapter_model.safetensors").entries
    assert sum("trainable_tokens_delta" in key for key in tensors) == 2
    expected = logits(adapted(**{key: torch.tensor(value) for key, value in x.items()})).detach().numpy()
    lora = lojax.peft.load(tmp_path, params, "gpt2")
    ours = jax.jit(lojax.transform(lambda params: logits(flax(**x, params=params))))(params, lora)
    assert relative(ours, expected) < 1e-5
