"""A trainer of others that takes any NNX module with LoRA parameters (google-tunix), unchanged.

Not in the extra ``peer``, for it brings a hundred packages: ``pip install google-tunix``, then
``python -m pytest -m peer tests/nets/test_tunix.py``. Last seen to pass with google-tunix 0.1.7 on jax 0.12.0.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lojax
from tests.helpers import assert_same_bits

peft_trainer = pytest.importorskip("tunix.sft.peft_trainer", reason="google-tunix is not installed")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what it uses of JAX is its own affair
]
VOCABULARY, STEPS = 11, 5


class Decoder(nnx.Module):
    """The signature that google-tunix calls: tokens, positions, cache, attention mask."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, 8, rngs=rngs)
        self.mix = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Any, positions: Any, cache: Any, attention_mask: Any) -> Any:
        x = self.embed(tokens) + positions[..., None] / 10
        weights = attention_mask / attention_mask.sum(-1, keepdims=True)
        return self.head(jnp.tanh(self.mix(weights @ x))), cache


def batches() -> list[Any]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (STEPS, 2, 6)).astype(np.int32)
    return [peft_trainer.TrainingInput(input_tokens=t, input_mask=np.ones_like(t)) for t in tokens]


def model_input(batch: Any) -> dict[str, Any]:
    shape = batch.input_tokens.shape
    return {
        "input_tokens": jnp.asarray(batch.input_tokens),
        "input_mask": jnp.asarray(batch.input_mask),
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
        "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((shape[1], shape[1]))), (*shape, shape[1])),
    }


def trainer(module: Any, tx: Any, place: Path, **settings: Any) -> Any:
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=STEPS, checkpoint_root_directory=str(place), **settings
    )
    return peft_trainer.PeftTrainer(module, tx, config).with_gen_model_input_fn(model_input)


def test_its_peft_trainer_trains_and_restores_what_optax_would(tmp_path: Path) -> None:
    net, tx = Decoder(nnx.Rngs(0)), optax.adam(1e-2)
    model = lojax.wrap(net, ["mix/kernel", "embed/embedding"], rank=2, alpha=4, train="head/bias", strict=True)
    example = model_input(batches()[0])
    args = (example["input_tokens"], example["positions"], None, example["attention_mask"])
    frozen, lora = model.init(jax.random.key(0), model.params, *args)
    module = model.as_nnx(frozen, lora)
    trainer(module, tx, tmp_path).train(batches())
    trained = module.pair()

    @jax.jit
    def step(lora: Any, state: Any, batch: Any) -> Any:
        def loss(lora: Any) -> Any:
            logits, _ = model.apply(
                frozen, lora, batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["input_tokens"][:, 1:]).mean()

        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, updates), state

    expected, state = lora, tx.init(lora)
    for batch in batches():
        expected, state = step(expected, state, model_input(batch))
    assert_same_bits(trained[0], frozen)
    for found, right, start in zip(*map(jax.tree.leaves, (trained[1], expected, lora)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)
        assert not np.array_equal(found, start)

    fresh = model.as_nnx(frozen, lora)
    again = trainer(fresh, tx, tmp_path)  # finds the checkpoint of the first one
    assert again.train_steps == STEPS
    assert_same_bits(fresh.pair(), trained)
