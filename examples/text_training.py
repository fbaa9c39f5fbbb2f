"""The training loop: one jitted step with donated state, and a run that survives being killed.

Everything that a step depends on is in `State`, in `Settings` or in the number of the step. So an interrupted and
resumed run ends with the same bits as one that was not interrupted.

B rows a batch, T tokens a row, C classes.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from text_data import Split
from tqdm import tqdm

import lojax

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; a run resumes only with the same settings.

    `quantize` is the kind of the quantized base, as `lojax.quantize` takes it; None keeps it in float32.
    """

    method: str
    learning_rate: float
    quantize: str | None = None
    seed: int = 0
    epochs: int = 4
    batch: int = 8
    accumulate: int = 2
    length: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.0
    rank: int = 8
    alpha: float = 16.0
    max_steps: int | None = None
    model: str = ""
    data: str = ""
    classes: tuple[str, ...] = ()


class Method(NamedTuple):
    """How variables are split into ``(frozen, trained)``, and how the net runs on them."""

    init: Callable[..., tuple[Tree, Tree]]
    apply: Callable[..., Array]
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation]


class Program(NamedTuple):
    """The compiled functions of a method, for every seed: see `build`."""

    init: Callable[..., tuple[Tree, Tree]]
    optimizer: optax.GradientTransformation
    step: Callable[..., tuple[Any, Array]]
    predict: Callable[..., np.ndarray]


class State(NamedTuple):
    """Everything that changes from step to step."""

    trained: Tree
    optimizer: Tree
    step: Array


class History(NamedTuple):
    """Loss and accuracy of every step, and one record for each epoch."""

    losses: list[float]
    accuracies: list[float]
    epochs: list[dict[str, float]]


class Run(NamedTuple):
    """A finished run."""

    frozen: Tree
    state: State
    history: History
    step_seconds: float


def adapted(model: Any) -> Method:
    """The method that trains what a `lojax` model trains: adapters and the head, or only the head."""
    return Method(model.init, model.apply, lojax.optimizer)


def full(net: Any) -> Method:
    """The method that trains every parameter of a Linen module."""

    def apply(frozen: Tree, trained: Tree, *args: Any, **kwargs: Any) -> Array:
        del frozen
        return net.apply(trained, *args, **kwargs)

    return Method(lambda key, variables, *example: ({}, variables), apply, lambda tx: tx)


def make_optimizer(method: Method, settings: Settings, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, clipped, over accumulated gradients."""
    updates = max(1, steps // settings.accumulate)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, round(settings.warmup * updates)), updates + 1
    )
    adamw = optax.adamw(rate, weight_decay=settings.weight_decay)
    tx = method.optimizer(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    return optax.MultiSteps(tx, settings.accumulate).gradient_transformation()


def build(method: Method, settings: Settings, rows: int) -> Program:
    """The program for runs of `settings`, with any seed, over this number of training rows."""
    tx = make_optimizer(method, settings, plan(settings, rows)[1])
    return Program(method.init, tx, make_step(method, tx), make_predictor(method.apply))


def make_step(
    method: Method, tx: optax.GradientTransformation
) -> Callable[[State, Tree, Split, Array], tuple[State, Array]]:
    """Builds ``step(state, frozen, batch, key) -> (state, [loss, accuracy])``.

    It is jitted and donates the state. Only `state.trained` is differentiated. The key is that of the run; a step folds
    its own number into it. `frozen` is an argument: captured, it would become constants of the compiled program.
    """

    def loss_fn(trained: Tree, frozen: Tree, batch: Split, key: Array) -> tuple[Array, Array]:
        logits = method.apply(
            frozen,
            trained,
            batch.tokens,
            batch.mask,
            deterministic=False,
            rngs={"dropout": key},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return loss, jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)

    def step(state: State, frozen: Tree, batch: Split, key: Array) -> tuple[State, Array]:
        key = jax.random.fold_in(key, state.step)
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, accuracy), grads = gradient(state.trained, frozen, batch, key)
        updates, optimizer = tx.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return State(trained, optimizer, state.step + 1), jnp.stack([loss, accuracy])

    return jax.jit(step, donate_argnums=0)


def make_predictor(apply: Callable[..., Array]) -> Callable[..., np.ndarray]:
    """Builds ``predict(*trees, tokens, mask) -> logits``, ``[N, T]`` -> ``[N, C]``, in batches."""
    apply = jax.jit(apply)

    def predict(*args: Any, batch: int = 32) -> np.ndarray:
        *trees, tokens, mask = args
        count = len(tokens)
        padding = ((0, -count % batch), (0, 0))
        tokens, mask = np.pad(tokens, padding), np.pad(mask, padding)
        starts = range(0, len(tokens), batch)
        logits = [apply(*trees, tokens[i : i + batch], mask[i : i + batch]) for i in starts]
        return np.concatenate(logits)[:count]

    return predict


def train(
    program: Program,
    variables: Tree,
    data: tuple[Split, Split],
    settings: Settings,
    *,
    folder: Path | None = None,
    save_every: int = 100,
) -> Run:
    """Trains, and evaluates after every epoch.

    Args:
        program: The program of the method, from `build`.
        variables: The net's variables; they are not donated.
        data: ``(train, test)``.
        settings: The settings of the run.
        folder: Where the state is saved until the run has finished, so that it can resume; None saves nothing.
        save_every: Steps between saved states.

    Returns:
        The finished run.
    """
    rows, test = data
    per_epoch, steps = plan(settings, len(rows.labels))
    key = jax.random.key(settings.seed)
    example = jax.ShapeDtypeStruct((settings.batch, settings.length), jnp.int32)
    frozen, trained = program.init(key, variables, example, example)
    trained = jax.tree.map(jnp.copy, trained)  # the step donates its state
    state = State(trained, program.optimizer.init(trained), jnp.zeros((), jnp.int32))
    state, history = (state, History([], [], [])) if folder is None else _resume(folder, state)

    progress = Progress(f"{settings.method}, seed {settings.seed}", int(state.step), steps)
    for index in range(int(state.step), steps):
        batch = batch_at(rows, settings, index)
        before = time.perf_counter()
        state, metrics = program.step(state, frozen, batch, key)
        loss, correct = np.asarray(metrics).tolist()
        progress.advance(history, loss, correct, batch, time.perf_counter() - before)
        ends_epoch = (index + 1) % per_epoch == 0 or index + 1 == steps
        if ends_epoch:
            logits = program.predict(frozen, state.trained, test.tokens, test.mask)
            progress.say(end_epoch(history, index // per_epoch, index % per_epoch + 1, logits, test))
        if folder is not None and (ends_epoch or (index + 1) % save_every == 0):
            _save(folder, state, history)
    progress.bar.close()
    return Run(frozen, state, history, float(np.median(progress.seconds[1:] or [0.0])))


def plan(settings: Settings, rows: int) -> tuple[int, int]:
    """Steps an epoch and steps in total. Too few rows for a batch are an error."""
    per_epoch = rows // settings.batch
    if per_epoch == 0:
        raise ValueError(
            f"{rows} training rows do not fill a batch of {settings.batch}; pass a smaller --batch or more data."
        )
    steps = per_epoch * settings.epochs
    return per_epoch, min(steps, settings.max_steps or steps)


def batch_at(rows: Split, settings: Settings, index: int) -> Split:
    """The batch of a step. Seed and epoch determine the order of the rows."""
    count = len(rows.labels)
    epoch, position = divmod(index, count // settings.batch)
    order = np.random.default_rng([settings.seed, epoch]).permutation(count)
    selected = order[position * settings.batch : (position + 1) * settings.batch]
    return Split(*(array[selected] for array in rows))


class Progress:
    """The progress bar: loss and accuracy of the last 20 steps, and real tokens a second."""

    def __init__(self, title: str, first: int, steps: int) -> None:
        self.bar = tqdm(total=steps, initial=first, desc=title)
        self.seconds: list[float] = []
        self.tokens = 0

    def advance(self, history: History, loss: float, correct: float, batch: Split, seconds: float) -> None:
        """Adds a step to the history and shows it."""
        history.losses.append(loss)
        history.accuracies.append(correct)
        self.seconds.append(seconds)
        self.tokens += int(batch.mask.sum())
        self.bar.set_postfix_str(
            f"loss {np.mean(history.losses[-20:]):.3f}, "
            f"accuracy {np.mean(history.accuracies[-20:]):.1%}, "
            f"{self.tokens / sum(self.seconds):,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update()

    def say(self, record: dict[str, float]) -> None:
        """Prints an epoch's record above the bar."""
        self.bar.write(
            "epoch {epoch}: training loss {loss:.4f}, training accuracy {accuracy:.1%}, "
            "test loss {test_loss:.4f}, test accuracy {test_accuracy:.2%}".format(**record)
        )


def end_epoch(history: History, epoch: int, count: int, logits: np.ndarray, test: Split) -> dict[str, float]:
    """Adds the record of an epoch of `count` steps, with test logits ``[N, C]``, and returns it."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels)
    record = {
        "epoch": epoch + 1,
        "step": len(history.losses),
        "loss": float(np.mean(history.losses[-count:])),
        "accuracy": float(np.mean(history.accuracies[-count:])),
        "test_loss": float(jnp.mean(losses)),
        "test_accuracy": accuracy(logits, test.labels),
    }
    history.epochs.append(record)
    return record


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of rows whose largest logit is that of the label: ``[N, C]``, ``[N]`` -> a number."""
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def prepare(folder: Path, settings: Settings, *, fresh: bool = False) -> bool:
    """Prepares the folder for a new run, or for resuming an unfinished one.

    Args:
        folder: The folder of the run.
        settings: The settings of the run.
        fresh: Whether to discard an unfinished run.

    Returns:
        Whether there is an unfinished run with these settings to resume.

    Raises:
        ValueError: The unfinished run has other settings.
    """
    expected = json.loads(json.dumps(dataclasses.asdict(settings)))
    file = folder / "unfinished" / "settings.json"
    if file.exists() and not fresh:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if differing := [name for name in expected if expected[name] != saved.get(name)]:
            lines = [f"{name}: {saved.get(name)!r} there, {expected[name]!r} now" for name in differing]
            raise ValueError(
                f"{folder} holds an unfinished run with other settings ({'; '.join(lines)}). "
                "Use its settings to resume it, --fresh to discard it, or another --out."
            )
        return True
    shutil.rmtree(folder / "unfinished", ignore_errors=True)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
    return False


def finish(folder: Path) -> None:
    """Deletes the state that `train` saved in the folder of a run."""
    shutil.rmtree(folder / "unfinished", ignore_errors=True)


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "unfinished" / "state").resolve(), options=options)


def _save(folder: Path, state: State, history: History) -> None:
    """Writes state and history as one checkpoint, atomically."""
    leaves = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    items = ocp.args.Composite(state=ocp.args.StandardSave(leaves), history=ocp.args.JsonSave(history._asdict()))
    with _manager(folder) as manager:
        manager.save(int(state.step), args=items)


def _resume(folder: Path, state: State) -> tuple[State, History]:
    """The last saved state, or `state` and an empty history."""
    with _manager(folder) as manager:
        if (step := manager.latest_step()) is None:
            return state, History([], [], [])
        leaves, structure = jax.tree.flatten(state)
        targets = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(targets), history=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
    print(f"Resuming the run in {folder} after step {step}.")
    leaves = [restored.state[name] for name in sorted(restored.state)]
    return jax.tree.unflatten(structure, leaves), History(**restored.history)
