"""Finds the best learning rate and rank for the main job: every choice and seed trains at once, in one program.

    python examples/sweep.py                                        # docstrings, no download, minutes on two CPU cores
    python examples/sweep.py --rates 1e-3,2e-3 --ranks 4,8,16 --seeds 0,1,2 --steps 200
    python examples/sweep.py --data mail.csv --text body --label folder

The net, the data and the adapted weights are those of finetune_text.py. A run has its own learning rate, rank, alpha
(twice the rank), head, order of the rows, and optimizer; the base is there once. Settings are chosen on rows held out
of the training rows, and only the chosen run sees test rows. At the end it trains that run for some steps by itself,
and checks that it has the same losses.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune_text
import jax
import jax.numpy as jnp
import model_files
import numpy as np
import optax
import text_report
import text_training as training
from text_data import Split
from tqdm import tqdm

import lojax

TARGETS = finetune_text.TARGETS["lora"]
CHECKED = 10  # steps that the chosen run makes by itself, at the end
SMOKE = {"rates": (1e-3, 1e-2), "ranks": (1, 2), "seeds": (0, 1), "steps": 4, "rows": 16}


def make_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every choice of a learning rate, a rank and a seed."""
    choices = itertools.product(args.ranks, args.rates, args.seeds)
    return [{"rank": rank, "alpha": 2.0 * rank, "learning_rate": rate, "seed": seed} for rank, rate, seed in choices]


class Job:
    """The main job, as functions of one run: `start`, `loss`, `optimizer`; and the batches of all runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.task = args, finetune_text.make_task(args, fold=0)
        self.net, self.variables = self.load(0)
        self.model = lojax.wrap(self.net, TARGETS, train=finetune_text.HEAD)

    def settings(self, seed: int) -> training.Settings:
        """The settings of the run's data and head."""
        settings = finetune_text.make_settings("lora", seed, self.task, self.args)
        return dataclasses.replace(settings, max_steps=self.args.steps)

    def load(self, seed: int) -> tuple[Any, Any]:
        """The net and its variables, the head as the seed draws it."""
        return finetune_text.load(self.task.directory, self.settings(seed))

    def start(self, run: dict[str, Any]) -> tuple[Any, Any]:
        """``(frozen, lora)`` of one run: the same base for all, another head for each seed."""
        head = self.load(run["seed"])[1]["params"]["classifier"]
        variables = {"params": {**self.variables["params"], "classifier": head}}
        rank, alpha = run["rank"], run["alpha"]
        key = jax.random.key(run["seed"])
        return lojax.init(key, variables, TARGETS, rank=rank, alpha=alpha, train=finetune_text.HEAD)

    def loss(self, frozen: Any, lora: Any, batch: Split) -> jax.Array:
        """The mean cross-entropy of one run."""
        logits = self.model.apply(frozen, lora, batch.tokens, batch.mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def correct(self, frozen: Any, lora: Any, batch: Split) -> jax.Array:
        """Which rows one run classifies correctly."""
        return jnp.argmax(self.model.apply(frozen, lora, batch.tokens, batch.mask), -1) == batch.labels

    def optimizer(self, run: dict[str, Any]) -> optax.GradientTransformation:
        """AdamW with warm-up and cosine decay, clipped. The schedule has a peak of 1, which the rate multiplies."""
        warmup = max(1, self.args.steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.args.steps + 1)
        adamw = optax.adamw(lambda count: run["learning_rate"] * schedule(count), weight_decay=0.01)
        return lojax.optimizer(optax.chain(optax.clip_by_global_norm(1.0), adamw))

    def batches(self, runs: list[dict[str, Any]]) -> Iterator[Split]:
        """For each step a batch for every run, ``[N, B, T]``: runs of one seed see the same rows."""
        settings = {run["seed"]: self.settings(run["seed"]) for run in runs}
        for index in range(self.args.steps):
            own = {seed: training.batch_at(self.task.data[0], each, index) for seed, each in settings.items()}
            yield Split(*(np.stack(arrays) for arrays in zip(*(own[run["seed"]] for run in runs), strict=True)))


def train(job: Job, sweep: lojax.Sweep) -> tuple[Any, lojax.SweepState, np.ndarray]:
    """Trains all runs at once: the base, the state, and the losses ``[steps, N]``."""
    frozen, state = sweep.init(job.start)
    losses = []
    progress = tqdm(job.batches(list(sweep.runs)), total=job.args.steps, desc=f"{len(sweep)} runs at once")
    for batch in progress:
        state, values = sweep.step(frozen, state, batch)
        losses.append(np.asarray(values))
        progress.set_postfix_str(f"loss {losses[-1].min():.3f} to {losses[-1].max():.3f}", refresh=False)
    return frozen, state, np.array(losses)


def accuracies(job: Job, sweep: lojax.Sweep, frozen: Any, state: lojax.SweepState, rows: Split) -> np.ndarray:
    """The share of rows that each run classifies correctly, ``[N]``."""
    evaluate, size = sweep.map(job.correct), min(32, len(rows.labels))
    usable = range(0, len(rows.labels) - size + 1, size)
    found = [evaluate(frozen, state, Split(*(x[i : i + size] for x in rows))) for i in usable]
    return np.mean(np.concatenate(found, axis=1), axis=1)


def check_alone(job: Job, run: dict[str, Any], expected: np.ndarray) -> float:
    """Trains one run by itself for some steps, and raises unless its losses are the expected ones.

    Returns:
        The largest difference.
    """
    frozen, lora = job.start(run)
    tx = job.optimizer(run)
    state = tx.init(lora)

    @jax.jit
    def step(frozen: Any, lora: Any, state: Any, batch: Split) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(job.loss, argnums=1)(frozen, lora, batch)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    losses = []
    for batch in itertools.islice(job.batches([run]), len(expected)):
        lora, state, loss = step(frozen, lora, state, Split(*(x[0] for x in batch)))
        losses.append(float(loss))
    distance = float(np.max(np.abs(np.array(losses) - expected)))
    if not distance < 1e-3:
        raise AssertionError(f"trained alone, {run} has the losses {losses}, and in the sweep {expected.tolist()}")
    return distance


def take_rows(rows: Split, count: int) -> Split:
    """Some of the rows, evenly spread over all of them."""
    chosen = np.linspace(0, len(rows.labels) - 1, min(count, len(rows.labels))).astype(int)
    return Split(*(x[chosen] for x in rows))


def run_sweep(args: argparse.Namespace) -> None:
    """Trains, evaluates, prints the table, draws the plot, saves the best adapter, and checks it."""
    job, runs = Job(args), make_runs(args)
    per_epoch = len(job.task.data[0].labels) // args.batch
    if not per_epoch:
        raise ValueError(f"{len(job.task.rows[0])} training rows do not fill a batch of {args.batch}: pass --batch.")
    sweep = lojax.sweep(runs, job.loss, job.optimizer, in_axes=0)
    frozen, state, losses = train(job, sweep)
    scores = accuracies(job, sweep, frozen, state, take_rows(job.task.data[1], args.rows))
    ends = losses[-max(1, args.steps // 4) :].mean(0)
    table = sweep.table(held_out_accuracy=scores, training_loss=ends)
    best = sweep.best(scores, maximize=True)

    args.out.mkdir(parents=True, exist_ok=True)
    sweep.plot(scores, label="accuracy on held-out rows").savefig(args.out / "sweep.png", dpi=120)
    (args.out / "table.txt").write_text(table + "\n", encoding="utf-8")
    record = {"steps": args.steps, "batch": args.batch, "length": args.length, "runs": runs, "best": best}
    record |= {"held_out_accuracy": scores.tolist(), "losses": losses.tolist()}
    text_report.write_json(args.out / "sweep.json", record)
    lojax.save(args.out / "adapter", state.bank[best], frozen=frozen)

    distance = check_alone(job, runs[best], losses[:CHECKED, best])
    test = finetune_text.make_task(args).data[1]
    logits = training.make_predictor(job.model.apply)(frozen, state.bank[best], test.tokens, test.mask)
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in runs[best].items())
    print(f"\n{table}\n\nBest: {settings}; test accuracy {training.accuracy(logits, test.labels):.2%}.")
    print(f"Trained by itself for {min(CHECKED, args.steps)} steps, its losses differ by at most {distance:.0e}.")
    print(f"The plot, the table and the adapter are in {args.out}.")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/sweep"), help="the folder of the results")
    add("--rates", type=_list_of(float), default=(5e-4, 2e-3, 8e-3), help="learning rates")
    add("--ranks", type=_list_of(int), default=(2, 8))
    add("--seeds", type=_list_of(int), default=(0, 1))
    add("--steps", type=int, default=60)
    add("--batch", type=int, default=8, help="rows a step, of each run")
    add("--length", type=int, default=24, help="tokens a row; longer texts are truncated")
    add("--rows", type=int, default=192, help="held-out rows that the settings are chosen on")
    add("--model", default=model_files.DEFAULT, help="directory, installed package, or hub id")
    add("--data", type=Path, help=".csv or .jsonl; default: docstrings of installed packages")
    add("--text", default="text", metavar="COLUMN", help="the column of texts in --data")
    add("--label", default="label", metavar="COLUMN", help="the column of labels in --data")
    add("--smoke", action="store_true", help="a few steps of small runs, to see that it works")
    args = parser.parse_args(argv)
    for name, value in SMOKE.items() if args.smoke else ():
        setattr(args, name, value)
    # What finetune_text.make_settings reads besides; the sweep has its own rates and ranks.
    fixed = {"learning_rate": None, "quantize": None, "epochs": 1, "accumulate": 1, "dropout": 0.0, "rank": 8}
    return argparse.Namespace(**vars(args), **fixed, alpha=16.0)


def _list_of(kind: type) -> Any:
    def read(string: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in string.split(","))

    read.__name__ = f"comma-separated {kind.__name__}"  # argparse shows it in its errors
    return read


def main(argv: list[str] | None = None) -> None:
    """The command. Bad input ends it with one line that says what to do."""
    args = parse(argv)
    try:
        run_sweep(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
