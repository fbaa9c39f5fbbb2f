"""Fine-tunes a pretrained BERT on labelled text with LoRA, on two CPU cores in minutes.

    python examples/finetune_text.py                                   # docstrings, no download
    python examples/finetune_text.py --data mail.csv --text body --label folder
    python examples/finetune_text.py --predict "Draws a bar chart."
    python examples/finetune_text.py --quantize nf4                    # the base in 4 bits (QLoRA)
    python examples/finetune_text.py --compare --seeds 0,1,2           # head only, LoRA, full
    python examples/finetune_text.py --tune --seeds 0,1,2              # choose their learning rates

It trains low-rank adapters on the query and value kernels of every layer, and the classifier in full. The same command
resumes an interrupted run. At the end it checks that the adapter works in a new process, and that merged weights
predict the same as adapted ones. With --quantize the kernels and embeddings of the base are stored in few bits; the
head stays in float32.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bert
import docstring_data
import jax
import jax.numpy as jnp
import model_files
import numpy as np
import table_data
import text_data
import text_report
import text_training as training

import lojax

TARGETS = {
    "head": (),
    "lora": ("**/query/kernel", "**/value/kernel"),
    "lora-all": ("**/layer_*/**/kernel",),  # every linear map of every layer
}
HEAD = "**/classifier/**"
BASE = ("**/embeddings/*/embedding", "**/encoder/**/kernel")  # what --quantize quantizes; the head trains in full

# Full fine-tuning moves every weight and needs small steps; a head alone needs large ones. `--tune` tries these rates
# on rows held out of the training rows. LEARNING_RATES is what it chose for the default task; lora-all shares lora's.
GRID = {
    "head": (3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 2e-3, 4e-3),
    "lora-all": (5e-4, 1e-3, 2e-3),
    "full": (5e-5, 1e-4, 2e-4),
}
LEARNING_RATES = {"head": 1e-2, "lora": 1e-3, "lora-all": 1e-3, "full": 5e-5}

# The rows of `--compare`: the method, and the kind of its quantized base. A quantized base takes the float base's rate.
COMPARED = {
    "head": ("head", None),
    "lora": ("lora", None),
    "lora-nf4": ("lora", "nf4"),
    "lora-int8": ("lora", "int8"),
    "lora-all": ("lora-all", None),
    "full": ("full", None),
}


class Task(NamedTuple):
    """The model's directory, the rows, the classes, and the encoded ``(train, test)``."""

    directory: Path
    rows: tuple[list, list]
    classes: tuple[str, ...]
    data: tuple[text_data.Split, text_data.Split]


def make_task(args: argparse.Namespace, *, fold: int | None = None) -> Task:
    """Finds the model and the data; with a fold, its held-out rows replace the test rows."""
    directory = model_files.find(args.model)
    rows = docstring_data.load() if args.data is None else table_data.load(args.data, text=args.text, label=args.label)
    if fold is not None:
        rows = text_data.hold_out(rows[0], fold)
    classes = tuple(sorted({row.label for row in rows[0]}))
    tokenizer = directory / "tokenizer.json"
    data = tuple(text_data.encode_rows(part, classes, tokenizer, args.length) for part in rows)
    kind = "test" if fold is None else "held-out"
    print(f"{len(rows[0])} training and {len(rows[1])} {kind} rows; classes: {', '.join(classes)}.")
    return Task(directory, rows, classes, data)


def make_settings(name: str, seed: int, task: Task, args: argparse.Namespace) -> training.Settings:
    """The settings of one run."""
    return training.Settings(
        method=name,
        learning_rate=args.learning_rate or LEARNING_RATES[name],
        quantize=args.quantize,
        seed=seed,
        epochs=args.epochs,
        batch=args.batch,
        accumulate=args.accumulate,
        length=args.length,
        dropout=args.dropout,
        rank=args.rank,
        alpha=args.alpha,
        max_steps=args.steps,
        model=args.model,
        data=text_data.fingerprint(*task.data),
        classes=task.classes,
    )


def load(directory: Path, settings: training.Settings) -> tuple[bert.BertClassifier, Any]:
    """The net and its variables, quantized but for the head where settings say so; the seed initializes the head."""
    key = jax.random.key(settings.seed)
    net, variables = bert.load(directory, len(settings.classes), key=key, dropout=settings.dropout)
    if settings.quantize is None:
        return net, variables
    return net, lojax.quantize(variables, settings.quantize, BASE)


def make_model(net: bert.BertClassifier, settings: training.Settings) -> Any:
    """The adapted net. Without targets only the head trains."""
    return lojax.wrap(net, targets=TARGETS[settings.method], rank=settings.rank, alpha=settings.alpha, train=HEAD)


def finetune(args: argparse.Namespace) -> None:
    """The main job: train, save, restore in a new process, merge, and check."""
    task = make_task(args)
    settings = make_settings("lora", args.seeds[0], task, args)
    net, variables = load(task.directory, settings)
    if settings.quantize is not None:
        print(text_report.base_size(variables, settings.quantize))
    model = make_model(net, settings)
    program = training.build(training.adapted(model), settings, len(task.rows[0]))

    training.prepare(args.out, settings, fresh=args.fresh)
    run = training.train(program, variables, task.data, settings, folder=args.out, save_every=args.save_every)
    frozen, lora = run.frozen, run.state.trained
    lojax.save(args.out / "adapter", lora, frozen=frozen)
    text_report.write_json(args.out / "settings.json", dataclasses.asdict(settings))
    text_report.write_json(args.out / "history.json", run.history._asdict())
    text_report.draw_curves(args.out / "curves.png", run.history, chance=1 / len(task.classes))
    training.finish(args.out)
    print(lojax.summary(frozen, lora).text(frozen=False))

    tokens, mask, labels = task.data[1]
    adapted = program.predict(frozen, lora, tokens, mask)
    merged = training.make_predictor(net.apply)(model.merge(frozen, lora), tokens, mask)
    check_merged(adapted, merged)
    check_new_process(args.out, task.rows[1][0].text, adapted[0], task.classes)
    score = training.accuracy(adapted, labels)
    print(f"Test accuracy {score:.2%} on {len(labels)} rows. Everything is in {args.out}.")


def predict(folder: Path, text: str) -> str:
    """Classifies one text with the adapter of a finished run.

    Args:
        folder: The folder of the run.
        text: The text to classify.

    Returns:
        One line a class, the most likely first.

    Raises:
        FileNotFoundError: The folder holds no finished run.
    """
    file = folder / "settings.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no finished run (no settings.json). Train first, or pass its --out.")
    settings = training.Settings(**json.loads(file.read_text(encoding="utf-8")))
    directory = model_files.find(settings.model)
    key = jax.random.key(settings.seed)
    net, variables = load(directory, settings)
    model = make_model(net, settings)
    example = jax.ShapeDtypeStruct((1, settings.length), jnp.int32)
    frozen, _ = model.init(key, variables, example, example)
    lora = lojax.restore(folder / "adapter", frozen=frozen)
    inputs = text_data.encode([text], directory / "tokenizer.json", settings.length)
    logits = training.make_predictor(model.apply)(frozen, lora, *inputs)
    return text_report.prediction(logits[0], settings.classes)


def check_merged(adapted: np.ndarray, merged: np.ndarray) -> None:
    """Raises unless merged and adapted weights give the same predictions, ``[N, C]`` both."""
    distance = float(np.max(np.abs(adapted - merged)))
    agree = np.argmax(adapted, -1) == np.argmax(merged, -1)
    print(
        f"Merged against adapted on {len(agree)} test rows: {np.mean(agree):.2%} the same "
        f"prediction, largest difference between logits {distance:.1e}."
    )
    if not agree.all() or distance > 1e-3:
        raise AssertionError("merged and adapted weights disagree; this is a bug, please report it")


def check_new_process(folder: Path, text: str, logits: np.ndarray, classes: tuple[str, ...]) -> None:
    """Raises unless a new process, given the folder and a text, predicts the same as the logits ``[C]``."""
    command = [sys.executable, __file__, "--predict", text, "--out", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise AssertionError(f"prediction in a new process failed:\n{process.stderr}")
    probabilities = text_report.read_prediction(process.stdout, classes)
    if np.max(np.abs(probabilities - text_report.softmax(logits))) > 2e-4:
        raise AssertionError(
            f"the new process predicted something else:\n{process.stdout}\n"
            f"expected:\n{text_report.prediction(logits, classes)}"
        )
    print(f"The adapter, restored in a new process, says of {text[:60]!r}...:\n{process.stdout}")


def compare(args: argparse.Namespace) -> None:
    """Compares head only, LoRA on few and on all weights, and full fine-tuning, on the same data and epochs."""
    task = make_task(args)
    records = []
    for name in args.only or COMPARED:
        method, kind = COMPARED[name]
        settings = [make_settings(method, seed, task, args) for seed in args.seeds]
        settings = [dataclasses.replace(each, quantize=kind) for each in settings]
        for record in measure(task, settings, args.out / "compare" / name):
            records.append(record)
            text_report.write_json(args.out / "compare.json", records)
    print(text_report.comparison(records))
    print(f"The same budget for all, a learning rate for each. Written to {args.out}.")


def tune(args: argparse.Namespace) -> None:
    """Tries each method's learning rates on held-out training rows, which differ from seed to seed."""
    records = []
    for seed in args.seeds:
        task = make_task(args, fold=seed)
        for name, rates in GRID.items():
            for rate in rates:
                settings = dataclasses.replace(make_settings(name, seed, task, args), learning_rate=rate)
                records += measure(task, [settings], args.out / "tune" / name)
                text_report.write_json(args.out / "tune.json", records)
    print(text_report.tuning(records))


def measure(task: Task, settings: list[training.Settings], folder: Path) -> Iterator[dict[str, Any]]:
    """Trains one method, compiled once, with settings that differ only in their seed; yields their records."""
    net, _ = load(task.directory, settings[0])
    method = training.full(net) if settings[0].method == "full" else training.adapted(make_model(net, settings[0]))
    program = training.build(method, settings[0], len(task.rows[0]))
    for each in settings:
        _, variables = load(task.directory, each)
        yield text_report.record(each, training.train(program, variables, task.data, each), folder)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/finetune_text"), help="the folder of the run")
    add("--model", default=model_files.DEFAULT, help="directory, installed package, or hub id")
    add("--data", type=Path, help=".csv or .jsonl; default: docstrings of installed packages")
    add("--text", default="text", metavar="COLUMN", help="the column of texts in --data")
    add("--label", default="label", metavar="COLUMN", help="the column of labels in --data")
    add("--predict", metavar="TEXT", help="classify a text with the finished run in --out")
    add(
        "--compare", action="store_true", help="train head only, LoRA (also on quantized bases) and full; print a table"
    )
    add("--only", type=_rows, metavar="ROW,ROW", help=f"rows of --compare: {', '.join(COMPARED)}; default: all")
    add("--tune", action="store_true", help="choose the learning rates on held-out rows")
    add("--seeds", type=_integers, default=(0,), help="such as 0,1,2 (more than one: --compare, --tune)")
    add("--epochs", type=int, default=4)
    add("--batch", type=int, default=8, help="rows a step")
    add("--accumulate", type=int, default=2, help="steps an update")
    add("--steps", type=int, help="stop after this many steps")
    add("--length", type=int, default=32, help="tokens a row; longer texts are truncated")
    add("--dropout", type=float, default=0.0, help="inside the encoder, while training")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--quantize", metavar="KIND", help="quantize the frozen base: nf4, int4, int8 or float8_e4m3fn")
    add("--learning-rate", type=float, help=f"default: {LEARNING_RATES}")
    add("--save-every", type=int, default=100, help="steps between saved states")
    add("--fresh", action="store_true", help="discard an unfinished run in --out")
    return parser.parse_args(argv)


def _integers(string: str) -> tuple[int, ...]:
    return tuple(int(part) for part in string.split(","))


def _rows(string: str) -> tuple[str, ...]:
    names = tuple(string.split(","))
    if unknown := [name for name in names if name not in COMPARED]:
        raise argparse.ArgumentTypeError(f"no row {unknown[0]!r}; expected some of {', '.join(COMPARED)}")
    return names


def main(argv: list[str] | None = None) -> None:
    """The command. Bad input ends it with one line that says what to do."""
    args = parse(argv)
    try:
        if args.quantize is not None and (args.compare or args.tune):
            raise ValueError(
                "--quantize is for a single run; --compare has rows for quantized bases (--only lora-nf4)."
            )
        if args.predict is not None:
            print(predict(args.out, args.predict))
        elif args.compare:
            compare(args)
        elif args.tune:
            tune(args)
        else:
            finetune(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
