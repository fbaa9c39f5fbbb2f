"""Training here is training in PEFT: the same losses step by step, the same weights at the end. Needs torch, peft."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import lojax
import lojax.peft
from lojax import Rule
from lojax.adapters.adapter import is_adapter
from lojax.adapters.paths import flatten
from lojax.peft.full_parameters import full_to_torch

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[1]
TOKENS = [5, 39, 7]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train, as `lojax.wrap` and as PEFT's ``LoraConfig`` spell it.

    ``decay``: PEFT's token rows are absolute, ours are what is added: weight decay pulls them to other places, so it
    is left out there.
    """

    ours: dict[str, Any]
    theirs: dict[str, Any]
    rules: tuple[Rule, ...] = ()
    decay: float = 0.01
    optimizer: str = "adamw"


METHODS = {
    "lora": Method({}, {}),
    "lora with sgd": Method({}, {}, optimizer="sgd"),
    "rslora": Method({"scaling": "rslora"}, {"use_rslora": True}),
    "dora": Method({"variant": "dora"}, {"use_dora": True}),
    "patterns": Method(
        {},
        {
            "rank_pattern": {"layer.0.attention.self.query": 5, "layer.1.attention.output.dense": 1},
            "alpha_pattern": {"layer.0.attention.self.query": 9},
        },
        (Rule("**/0/**/query/kernel", rank=5, alpha=9), Rule("**/1/attention/output/dense/kernel", rank=1)),
    ),
    "pissa": Method({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": Method({"init": "olora"}, {"init_lora_weights": "olora"}),
    "bias=all": Method({"train": "**/bias"}, {"bias": "all"}),
    "modules_to_save": Method({"train": "classifier/**"}, {"modules_to_save": ["classifier"]}),
    "tokens": Method(
        {"train": Rule("**/word_embeddings/embedding", train="tokens", tokens=TOKENS)},
        {"trainable_token_indices": TOKENS},
        decay=0.0,
    ),
}
# adamw: at the usual eps of 1e-8 the gradients of key biases, which are zero but for rounding, would make steps
OPTIMIZERS = {
    "sgd": (lambda torch, p, decay: torch.optim.SGD(p, lr=0.2, momentum=0.5), lambda decay: optax.sgd(0.2, 0.5)),
    "adamw": (
        lambda torch, p, decay: torch.optim.AdamW(p, lr=5e-3, eps=1e-5, weight_decay=decay),
        lambda decay: optax.adamw(5e-3, eps=1e-5, weight_decay=decay),
    ),
}


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch", "transformers", "peft"):
            pytest.importorskip(name)
        yield importlib.import_module("torch")


@pytest.fixture(autouse=True)
def as_transformers_and_optax_expect(monkeypatch):
    """They were written for implicit promotion, and transformers looks for no network."""
    for folder in (ROOT / "tests" / "peft", ROOT / "examples"):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with jax.numpy_dtype_promotion("standard"):
        yield


def batches(count: int, size: int, length: int, vocabulary: int) -> list[tuple[np.ndarray, ...]]:
    """Token ids with every one of `TOKENS`, masks that end early, and as many labels 0 as 1, by the first token."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        ids = rng.integers(3, vocabulary, (size, length))
        ids[:, 0] = 3 + 2 * rng.integers(0, vocabulary // 2 - 2, size) + np.arange(size) % 2
        ids[:, 1 : 1 + len(TOKENS)] = TOKENS
        mask = (np.arange(length) < rng.integers(length // 2, length + 1, (size, 1))).astype(np.int64)
        found.append((ids, mask, ids[:, 0] % 2))
    return found


def torch_losses(model: Any, tx: Any, steps: int, data: Any, logits: Callable[..., Any], torch: Any) -> list[float]:
    losses = []
    for step in range(steps):
        ids, mask, labels = (torch.tensor(x) for x in data[step % len(data)])
        loss = torch.nn.functional.cross_entropy(logits(model, ids, mask), labels)
        tx.zero_grad()
        loss.backward()
        tx.step()
        losses.append(loss.item())
    return losses


def jax_losses(model: Any, frozen: Any, lora: Any, tx: Any, steps: int, data: Any) -> tuple[list[float], Any]:
    def loss(lora: Any, frozen: Any, ids: Any, mask: Any, labels: Any) -> Any:
        logits = model.apply(frozen, lora, (ids, mask))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(frozen: Any, lora: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(lora, frozen, *batch)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    state, losses = tx.init(lora), []
    for i in range(steps):
        lora, state, value = step(frozen, lora, state, data[i % len(data)])
        losses.append(float(value))
    return losses, lora


def with_their_start(lora: Any, start: Any) -> Any:
    """``lora`` with the random ``a`` of PEFT's adapter; all else must already be the same."""
    assert jax.tree.structure(lora) == jax.tree.structure(start), "another scale, rank, or choice of weights"
    copied = jax.tree.map(
        lambda ours, theirs: dataclasses.replace(ours, a=theirs.a) if is_adapter(ours) and ours.a is not None else ours,
        lora,
        start,
        is_leaf=is_adapter,
    )
    for ours, theirs in zip(jax.tree.leaves(copied), jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    return copied


def distance(params: Any, names: Any, state: dict[str, Any]) -> float:
    """The largest difference of a parameter from PEFT's merged one, over its largest entry or 1."""
    leaves, worst = flatten(params), 0.0
    for name, parameter in names.table(params).parameters.items():
        theirs = state[name].detach().numpy()
        ours = full_to_torch(parameter, np.asarray(leaves[parameter.path]))
        worst = max(worst, float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())))
    return worst


def compared(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two runs that did train."""
    assert np.mean(theirs[-4:]) < 0.9 * np.mean(theirs[:4]), "nothing was learned: this would prove nothing"
    return float(np.max(np.abs(np.array(ours) / np.array(theirs) - 1)))


@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_agree(method, torch, tmp_path):
    import peft

    chosen = METHODS[method]
    case = importlib.import_module("families_torch").FAMILIES["bert"]
    torch.manual_seed(0)
    plain = case.torch_model()
    with torch.no_grad():  # the usual start of 0.02 gives a net so small that nothing is learned
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    flax, params = case.flax_model(plain)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "output.dense"]} | chosen.theirs
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**settings)).eval()

    targets = (*chosen.rules, "**/query/kernel", "**/output/dense/kernel")
    run = lambda params, x: flax(x[0], x[1], params=params).logits
    model = lojax.wrap(run, targets, rank=2, alpha=4, strict=True, **chosen.ours)
    data = batches(2, 8, 8, 40)
    frozen, lora = model.init(jax.random.key(0), params, data[0][:2])
    if "init_lora_weights" not in chosen.theirs:  # else both starts are read off the weight, and need no copy
        theirs.save_pretrained(tmp_path / "start")
        lora = with_their_start(lora, lojax.peft.load(tmp_path / "start", params, "bert"))

    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == lojax.summary(frozen, lora).trainable
    torch_tx, tx = OPTIMIZERS[chosen.optimizer]
    logits = lambda model, ids, mask: model(input_ids=ids, attention_mask=mask).logits
    expected = torch_losses(theirs, torch_tx(torch, trained, chosen.decay), 50, data, logits, torch)
    got, lora = jax_losses(model, frozen, lora, tx(chosen.decay), 50, data)
    names = lojax.peft.name_map("bert")
    apart = distance(model.merge(frozen, lora), names, theirs.merge_and_unload().state_dict())
    print(f"{method}: {expected[0]:.3f} to {expected[-1]:.3f}, {compared(got, expected):.1e}, {apart:.1e}")
    assert compared(got, expected) < 1e-4
    assert apart < 1e-4


MINILM = """
encoder/layer_{i}/attention/{m:query,key,value}/*      <-> bert.encoder.layer.{i}.attention.self.{m}
encoder/layer_{i}/attention/output/*                   <-> bert.encoder.layer.{i}.attention.output.dense
encoder/layer_{i}/attention_norm/*                     <-> bert.encoder.layer.{i}.attention.output.LayerNorm
encoder/layer_{i}/output_norm/*                        <-> bert.encoder.layer.{i}.output.LayerNorm
encoder/layer_{i}/{m:intermediate,output}/*            <-> bert.encoder.layer.{i}.{m}.dense
embeddings/{m:word,position,token_type}/embedding      <-> bert.embeddings.{m}_embeddings
embeddings/norm/*                                      <-> bert.embeddings.LayerNorm
classifier/*                                           <-> classifier
"""
STEPS = 12


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_minilm_trains_alike_and_its_files_go_both_ways(method, torch, tmp_path):
    import peft
    import transformers

    bert, model_files = (importlib.import_module(name) for name in ("bert", "model_files"))
    try:
        directory = model_files.find()
    except FileNotFoundError:
        pytest.skip(f"{model_files.DEFAULT} is not installed")
    net, variables = bert.load(directory, 3, key=jax.random.key(0))
    params = variables["params"]

    class Classifier(torch.nn.Module):
        """As the example has it: the mean over the real tokens, and one dense head."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False)
            self.classifier = torch.nn.Linear(self.bert.config.hidden_size, 3)

        def forward(self, ids: Any, mask: Any) -> Any:
            hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].to(hidden.dtype)
            return self.classifier((hidden * weights).sum(1) / weights.sum(1))

    def classifier() -> Any:
        plain = Classifier().eval()  # without dropout
        with torch.no_grad():
            plain.classifier.weight.copy_(torch.tensor(np.asarray(params["classifier"]["kernel"]).T))
            plain.classifier.bias.zero_()
        return plain

    chosen = METHODS[method]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    theirs = peft.get_peft_model(classifier(), peft.LoraConfig(**settings, **chosen.theirs)).eval()

    run = lambda params, x: net.apply({"params": params}, *x)
    targets = ("**/query/kernel", "**/value/kernel")
    model = lojax.wrap(run, targets, rank=4, alpha=8, train="classifier/*", strict=True, **chosen.ours)
    data = batches(2, 4, 16, net.config.vocab_size)
    frozen, lora = model.init(jax.random.key(0), params, data[0][:2])
    names = lojax.peft.NameMap.parse(MINILM)
    theirs.save_pretrained(tmp_path / "start")
    lora = with_their_start(lora, lojax.peft.load(tmp_path / "start", params, names))

    trained = [p for p in theirs.parameters() if p.requires_grad]
    torch_tx, tx = OPTIMIZERS["adamw"]
    logits = lambda model, ids, mask: model(ids, mask)
    expected = torch_losses(theirs, torch_tx(torch, trained, 0.01), STEPS, data, logits, torch)
    got, lora = jax_losses(model, frozen, lora, tx(0.01), STEPS, data)

    x = data[0][:2]
    there = lambda model: logits(model, *map(torch.tensor, x)).detach().numpy()
    lojax.peft.save(tmp_path / "ours", lora, frozen, names, task_type=None)
    returned = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    np.testing.assert_allclose(there(returned), model.apply(frozen, lora, x), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = lojax.peft.load(tmp_path / "theirs", params, names)
    np.testing.assert_allclose(
        model.apply(lojax.peft.freeze(params, read), read, x), there(theirs), rtol=1e-5, atol=1e-5
    )
    assert np.abs(there(theirs) - there(classifier())).max() > 0.1, "nothing was learned: this would prove nothing"

    apart = distance(model.merge(frozen, lora), names, theirs.merge_and_unload().state_dict())
    print(f"MiniLM {method}: {expected[0]:.3f} to {expected[-1]:.3f}, {compared(got, expected):.1e}, {apart:.1e}")
    assert compared(got, expected) < 1e-4
    assert apart < 1e-4
