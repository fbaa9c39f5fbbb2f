"""Claim: a LoRA step of the real MiniLM is no slower than with any other library, torch and PEFT included.

all-MiniLM-L6-v2 with a classifier of seven classes, rank 8 on query and value, the head trained in full, 16 rows of 64
tokens, float32, no dropout: loss, gradient and AdamW. lojax and qwix adapt the Linen BERT from examples/; PEFT adapts
transformers' BERT in torch, with one thread a core. All run in turn.

    python benchmarks/minilm_step.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Array, PyTree, alternated, cost, ratio, table, write
from nets import examples, minilm, minilm_by_hand, minilm_by_hand_variables

import lojax

ROWS, TOKENS, RANK, ALPHA = 16, 64, 8, 16
TARGETS = ["**/query/kernel", "**/value/kernel"]


def batch(seed: int = 0) -> tuple[Any, Any, Any]:
    """Random tokens, a full mask and labels."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1000, 20000, (ROWS, TOKENS))
    return tokens.astype(np.int32), np.ones((ROWS, TOKENS), np.int32), rng.integers(0, 7, ROWS).astype(np.int32)


class Stepper:
    """A jitted training step with its state; calling it runs one step."""

    def __init__(self, apply: Callable[..., Any], trained: PyTree, frozen: PyTree) -> None:
        tx = optax.adamw(1e-4)

        def loss(trained: PyTree, frozen: PyTree, tokens: Array, mask: Array, labels: Array) -> Any:
            logits = apply(trained, frozen, tokens, mask)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(trained: PyTree, state: PyTree, frozen: PyTree, *data: PyTree) -> Any:
            value, grads = jax.value_and_grad(loss)(trained, frozen, *data)
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

        trained = jax.tree.map(jnp.copy, trained)
        self.frozen, self.data = frozen, jax.device_put(batch())
        self.state = (trained, tx.init(trained))
        self.cost = cost(step, *self.state, frozen, *self.data)
        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        """One step; returns the loss."""
        *state, value = self.step(*self.state, self.frozen, *self.data)
        self.state = tuple(state)
        return value


def jax_steppers() -> dict[str, Stepper]:
    """lojax, LoRA by hand, full fine-tuning, and qwix where it is installed."""
    net, variables = minilm()
    shapes = (jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32),) * 2
    head = "**/classifier/*"

    def adapt(targets: Any) -> tuple[Any, Any, Any]:
        model = lojax.wrap(net, targets, rank=RANK, alpha=ALPHA, train=[head], strict=True)
        frozen, lora = model.init(jax.random.key(0), variables, *shapes)
        return (lambda trained, frozen, *x: model.apply(frozen, trained, *x)), lora, frozen

    _, lora, frozen = adapt(TARGETS)
    by_hand = minilm_by_hand()
    steppers = {
        "lojax": Stepper(*adapt(TARGETS)),
        "by hand": Stepper(lambda t, f, *x: by_hand(minilm_by_hand_variables(f, t), *x), lora, frozen),
        "full fine-tuning": Stepper(lambda trained, frozen, *x: net.apply(trained, *x), variables, ()),
    }
    try:
        steppers["qwix"] = qwix_stepper(net, variables, shapes)
    except ImportError:
        print("qwix is not installed")
    return steppers


def qwix_stepper(net: Any, variables: PyTree, shapes: PyTree) -> Stepper:
    """The same adapters through qwix."""
    import qwix
    from flax import traverse_util

    provider = qwix.LoraProvider(module_path=".*(query|value)", rank=RANK, alpha=ALPHA)
    module = qwix.apply_lora_to_model(net, provider)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
    fresh = traverse_util.flatten_dict(jax.jit(module.init)(jax.random.key(0), *zeros))
    base = traverse_util.flatten_dict(dict(variables))
    values = {path: base.get(path, leaf) for path, leaf in fresh.items()}
    trains = {path: "lora" in path[-1] or "classifier" in path for path in values}
    assert sum("lora" in path[-1] for path in values) == 24, "qwix adapts six queries and six values"
    trained = {path: leaf for path, leaf in values.items() if trains[path]}
    frozen = {path: leaf for path, leaf in values.items() if not trains[path]}

    def apply(trained: PyTree, frozen: PyTree, *x: Array) -> Any:
        return module.apply(traverse_util.unflatten_dict({**trained, **frozen}), *x)

    return Stepper(apply, trained, frozen)


def torch_steps(compiled: bool) -> dict[str, Callable[[], Any]]:
    """PEFT on torch: eager, and with ``compiled`` also compiled (which needs a C++ compiler)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    _, model_files = examples()
    torch.set_num_threads(os.cpu_count() or 1)
    tokens, mask, labels = (torch.from_numpy(np.asarray(x, np.int64)) for x in batch())

    def stepper(compiled: bool) -> Callable[[], Any]:
        settings = {"num_labels": 7, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = BertForSequenceClassification.from_pretrained(model_files.find(), **settings)
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["query", "value"], modules_to_save=["classifier"])
        model = get_peft_model(base, lora).train()
        run = torch.compile(model) if compiled else model
        tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> Any:
            tx.zero_grad(set_to_none=True)
            loss = run(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            tx.step()
            return loss.item()

        return step

    steppers = {"PEFT + torch": stepper(False)}
    if compiled:
        steppers["PEFT + torch.compile"] = stepper(True)
    return steppers


def main() -> None:
    """Measures every library that is installed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--compile", action="store_true", help="PEFT under torch.compile too (slow to start)")
    options = parser.parse_args()
    steppers = jax_steppers()
    programs: dict[str, Callable[[], Any]] = dict(steppers)
    if not options.no_torch:
        try:
            programs |= torch_steps(options.compile)
        except ImportError as error:
            print(f"No comparison with torch: {error.name} is not installed.")
    seconds = alternated(programs, rounds=options.rounds, warm=3)
    rows = []
    for name in programs:
        row: dict[str, Any] = {"method": name, "ms a step": 1e3 * statistics.median(seconds[name])}
        row["lojax / this"] = ratio(seconds, "lojax", name)
        if name in steppers:
            count = steppers[name].cost
            row |= {"GFLOP": count.flops / 1e9, "MiB accessed": count.bytes / 2**20}
            row["MiB temporaries"] = count.temporaries / 2**20
        rows.append(row)
    text = (
        f"{ROWS} rows of {TOKENS} tokens, rank {RANK} on query and value, head in full, AdamW, float32. Medians of "
        f"{options.rounds} alternated steps; the ratios are medians within a round. torch's BERT has the pooler that "
        "the Linen one replaces with a mean over tokens (0.1 % of the FLOPs)."
    )
    write("minilm_step", "A LoRA step of the real MiniLM", f"{text}\n\n{table(rows)}", seconds)


if __name__ == "__main__":
    main()
