"""Two checkpoints of one model in, what changed between them out as a PEFT adapter, one tensor at a time."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import Axes
from lojax.adapters.paths import unflatten
from lojax.adapters.truncation import Truncation
from lojax.cli.base_weights import BaseWeights, open_weights
from lojax.cli.convert import Stored
from lojax.cli.model_directory import weight_files
from lojax.cli.paths import check_target, user_path
from lojax.cli.progress import watcher
from lojax.cli.quantize_files import KEPT
from lojax.peft.name_map import NameMap
from lojax.peft.write_adapter import foreign_entry, save
from lojax.text import printable
from lojax.types import Leaf

SUMMARY = "extract a PEFT adapter from a model and its fully fine-tuned copy"
EXAMPLE = "lojax extract ~/models/base ~/models/tuned ~/adapters/extracted --rank 32"
EMBEDDINGS = ("*embed*", "*wte.weight", "*wpe.weight", "*shared.weight")
"""What torch looks up and does not multiply, by name."""
KINDS: dict[str, tuple[Axes, str]] = {
    "linear": (("out", "in"), "[out, in]"),
    "conv1d": (("in", "out"), "[in, out]"),
    "embedding": (("in", "out"), "[in, out]"),
    "conv": (("in", "in", "in", "out"), ""),
}
"""The axes of the weights of each kind, and how a name rule spells them. A convolution is taken as JAX has it."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("base", type=user_path, help="the model before: a .safetensors file, or its directory")
    parser.add_argument("tuned", type=user_path, help="the model after, likewise")
    parser.add_argument("target", type=user_path, help="the directory to make")
    parser.add_argument("--rank", type=int, help="the rank of the adapters")
    parser.add_argument(
        "--energy",
        type=float,
        help="in place of a rank, or up to it: the least rank of each weight that keeps this share of its change, "
        "such as 0.9",
    )
    parser.add_argument(
        "--targets",
        metavar="GLOB",
        action="append",
        help="names of tensors to adapt, such as '*_proj.weight'; may be repeated. The default is every '*.weight' of "
        "two axes or four but embeddings and the head",
    )
    parser.add_argument("--full", action="store_true", help="store whatever else changed whole (norms, biases, heads)")
    parser.add_argument(
        "--steps",
        type=int,
        help="randomized decompositions with so many steps (such as 4), for large weights; the default is exact",
    )
    parser.add_argument("--fan-in-fan-out", action="store_true", help="the weights are [in, out], as GPT-2 has them")
    parser.add_argument("--task", help="task_type for PEFT, such as CAUSAL_LM")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that lojax wrote")


def run(args: argparse.Namespace) -> None:
    """Extracts."""
    names = ("rank", "energy", "targets", "full", "steps", "fan_in_fan_out", "task", "overwrite")
    result = extract(args.base, args.tuned, args.target, **{name: getattr(args, name) for name in names})
    print("\n".join([f"{args.tuned} - {args.base} -> {args.target}", *result.lines()]))


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What was extracted.

    Attributes:
        ranks: The rank of each adapted tensor.
        kept: The share of the squared change of the adapted tensors that the adapter has.
        full: The tensors that are stored whole.
        left: The tensors that changed and are not in the adapter.
        alone: The tensors that only one of the two models has.
    """

    ranks: dict[str, int]
    kept: float
    full: list[str]
    left: list[str]
    alone: list[str]

    def lines(self) -> list[str]:
        """What to tell the user."""
        ranks = sorted(self.ranks.values())
        lines = [
            f"{len(ranks)} adapters of rank {ranks[0]}{f' to {ranks[-1]}' * (ranks[-1] > ranks[0])}, with "
            f"{self.kept:.1%} of the change of their weights (of its square)."
        ]
        if self.full:
            lines.append(f"Stored whole: {_some(self.full)}.")
        if self.left:
            lines.append(f"Changed too, and left out: {_some(self.left)}. --full stores them whole.")
        if self.alone:
            lines.append(f"In one of the models alone, and left out: {_some(self.alone)}.")
        return lines


def extract(
    base: Path,
    tuned: Path,
    target: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    full: bool = False,
    steps: int | None = None,
    fan_in_fan_out: bool = False,
    task: str | None = None,
    overwrite: bool = False,
) -> Extracted:
    """Writes the adapter. Memory stays at a few times the largest tensor, in float64, and the adapter.

    Args:
        base: The model before. 4-bit weights of bitsandbytes are dequantized.
        tuned: The model after.
        target: The directory to make.
        rank: As in `lojax.extract`.
        energy: As in `lojax.extract`.
        targets: Globs over the names of the tensors to adapt.
        full: Whether to store whatever else changed whole.
        steps: As in `lojax.extract`.
        fan_in_fan_out: Whether matrices are ``[in, out]``.
        task: PEFT's task.
        overwrite: Whether to replace a ``target`` that lojax wrote.

    Raises:
        FileExistsError: ``target`` exists, and must not be replaced.
        FileNotFoundError: A file is missing.
        ValueError: A setting is out of range, a file is damaged, a glob matches nothing, the models do not fit
            together, or no weight to adapt changed; nothing is written.
    """
    how = Truncation(rank, energy, steps)
    how.check()
    paths = weight_files(base), weight_files(tuned)
    check_target(target, [base, tuned, *paths[0], *paths[1]], overwrite=overwrite, foreign=foreign_entry)
    before, after = open_weights(base, paths[0]), open_weights(tuned, paths[1])
    kinds = _choose(base, tuned, before, after, targets, fan_in_fan_out)
    lora: dict[str, Leaf] = {}
    total = kept = 0.0
    left = []
    common = [name for name in before.specs if name in after.specs]
    for name in watcher("extract")(common):
        old, new = before.read(name), after.read(name)
        if name not in kinds:
            if old.shape != new.shape or not np.array_equal(old, new):
                whole = full and old.shape == new.shape
                lora |= {_path(name): new} if whole else {}
                left += [] if whole else [name]
            continue
        difference = _matrix(new, kinds[name]) - _matrix(old, kinds[name])
        a, b = how.factors(name, difference)
        if b.shape[0]:
            lora[_path(name)] = _adapter(a, b, kinds[name], old.shape)
            total += float(np.square(difference).sum())
            kept += float(np.square(np.linalg.norm(a, axis=0)) @ np.square(np.linalg.norm(b, axis=1)))
    ranks = {name: leaf.rank for name in kinds if isinstance(leaf := lora.get(_path(name)), Adapter)}
    if not ranks:
        raise ValueError(f"{tuned}: none of the {len(kinds)} weights to adapt differs from {base}.")
    frozen: dict[Any, Leaf] = {_path(name): _shape(before, name, kinds.get(name)) for name in common}
    trained: dict[Any, Leaf] = {path: lora.get(path) for path in frozen}
    frozen |= {path: None for path, leaf in trained.items() if leaf is not None and not isinstance(leaf, Adapter)}
    save(
        target,
        unflatten(trained),
        unflatten(frozen),
        _names(kinds),
        base_model_name_or_path=str(base),
        task_type=task,
        overwrite=overwrite,
    )
    whole = [name for name in common if _path(name) in lora and name not in kinds]
    alone = sorted({*before.specs} ^ {*after.specs})
    return Extracted(ranks, kept / total, whole, left, alone)


def _choose(
    base: Path,
    tuned: Path,
    before: BaseWeights,
    after: BaseWeights,
    targets: Sequence[str] | None,
    fan_in_fan_out: bool,
) -> dict[str, str]:
    """The tensors to adapt, each with its kind."""
    common = [name for name in before.specs if name in after.specs]
    weights = [
        name
        for name in common
        if len(before.specs[name][1]) in (2, 4)
        and before.specs[name][0].kind in "fV"
        and 0 not in before.specs[name][1]
    ]
    weights = [name for name in weights if name.endswith(".weight")]
    if targets:
        chosen = []
        for glob in targets:
            matches = fnmatch.filter(weights, glob)
            if not matches:
                examples = ", ".join(map(printable, weights[:3])) or "none"
                raise ValueError(f"--targets {glob!r} matches no weight that both models have, such as {examples}.")
            chosen += matches
    else:
        chosen = [name for name in weights if not any(fnmatch.fnmatchcase(name, glob) for glob in KEPT)]
    if not chosen:
        raise ValueError(f"{base} and {tuned} have no '*.weight' of two axes or four in common.")
    kinds = {}
    for name in dict.fromkeys(chosen):
        old, new = before.specs[name][1], after.specs[name][1]
        if old != new:
            raise ValueError(f"{printable(name)} is {old} in {base} and {new} in {tuned}. Leave it out with --targets.")
        is_embedding = any(fnmatch.fnmatchcase(name, glob) for glob in EMBEDDINGS)
        kinds[name] = "conv" if len(old) == 4 else "embedding" if is_embedding else "linear"
        if kinds[name] == "linear" and fan_in_fan_out:
            kinds[name] = "conv1d"
    return kinds


def _matrix(tensor: np.ndarray, kind: str) -> np.ndarray:
    """A tensor of torch as ``[in, out]``, in float64."""
    if kind == "conv":
        tensor = tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return (tensor.T if kind == "linear" else tensor).astype(np.float64)


def _adapter(a: np.ndarray, b: np.ndarray, kind: str, shape: tuple[int, ...]) -> Adapter:
    if kind == "conv":
        a = a.reshape(*shape[2:], shape[1], -1)
    return Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 1.0, KINDS[kind][0])


def _shape(weights: BaseWeights, name: str, kind: str | None) -> Stored:
    """A tensor of the base, of which the shape is known and the numbers are read where they are needed."""
    dtype, shape = weights.specs[name]
    if kind == "conv":
        shape = (*shape[2:], shape[1], shape[0])
    return Stored(shape, dtype, functools.partial(weights.read, name))


def _path(name: str) -> str:
    return name.replace(".", "/")


def _names(kinds: dict[str, str]) -> NameMap:
    """The map between the names and the same names as paths."""
    rules = [
        f"{_path(name)}{KINDS[kind][1]} <-> {name.removesuffix('.weight')} : {kind}"
        for name, kind in kinds.items()
        if kind != "linear"
    ]
    return NameMap.parse(
        "\n".join([*rules, "{m**}/weight[out, in] <-> {m}", "{m**}/* <-> {m}", "{m**} <-> {m} : param"])
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
