"""Safetensors in, 4-bit safetensors as bitsandbytes writes them out, one tensor at a time."""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lojax.base.bitsandbytes_files import (
    BLOCKS,
    DTYPES,
    check_kind,
    largest_specs,
    part_names,
    to_tensors,
    weight_names,
)
from lojax.cli.model_directory import (
    CONFIG,
    INDEX,
    foreign_entry,
    read_object,
    side_files,
    update_index,
    weight_files,
)
from lojax.cli.paths import check_target, user_path
from lojax.cli.progress import watcher
from lojax.files import safetensors
from lojax.files.atomic_directory import atomic_directory
from lojax.quantized.formats import KINDS, BlockFormat
from lojax.quantized.quantized import quantize_weight
from lojax.text import printable

SUMMARY = "quantize the safetensors of a model to 4 bits, as bitsandbytes does"
EXAMPLE = "lojax quantize ~/models/base ~/models/base-nf4 --targets '*_proj.weight'"
KEPT = ("*embed*", "*wte.*", "*wpe.*", "*shared.weight", "*relative_attention_bias*", "*lm_head*")
"""What keeps its dtype unless ``--targets`` says otherwise: embeddings, which are looked up, and the head."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("source", type=user_path, help="a .safetensors file, or the directory of a model")
    parser.add_argument("target", type=user_path, help="the directory to make")
    parser.add_argument("--kind", choices=KINDS, default="nf4", help="files of bitsandbytes hold nf4 (%(default)s)")
    parser.add_argument(
        "--targets",
        metavar="GLOB",
        action="append",
        help="names of tensors, such as '*_proj.weight'; may be repeated. Of these, 2-D floating-point weights are "
        "quantized. The default is every '*.weight' but embeddings and the head",
    )
    parser.add_argument("--block", type=int, default=64, help="entries that share a scale (%(default)s)")
    parser.add_argument("--no-double", action="store_true", help="keep the scales in float32: 4.5 bits, not 4.13")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that lojax wrote")


def run(args: argparse.Namespace) -> None:
    """Quantizes."""
    settings = {"kind": args.kind, "targets": args.targets, "block": args.block, "double": not args.no_double}
    names = quantize(args.source, args.target, overwrite=args.overwrite, **settings)
    print(f"{args.source} -> {args.target}: {len(names)} weights in {args.kind}")


def quantize(
    source: Path,
    target: Path,
    *,
    kind: str = "nf4",
    targets: Sequence[str] | None = None,
    block: int = 64,
    double: bool = True,
    overwrite: bool = False,
) -> list[str]:
    """Writes the quantized model: files of the same names, and ``quantization_config`` in its ``config.json``.

    Memory stays at a few times the largest tensor.

    Returns:
        The names of the weights that were quantized.

    Raises:
        FileExistsError: ``target`` exists, and ``overwrite`` is False or it holds what lojax did not write.
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, holds 4-bit weights or NaN, a glob matches no weight, or ``target`` is or holds
            the source; nothing is written.
    """
    check_kind(kind)
    if block not in BLOCKS:
        raise ValueError(
            f"block={block} is one that bitsandbytes does not know; it knows {', '.join(map(str, BLOCKS))}."
        )
    paths = weight_files(source)
    beside = [*side_files(source, {path.name for path in paths})]
    foreign = lambda directory: foreign_entry(directory, {path.name for path in beside})
    check_target(target, [source, *paths], overwrite=overwrite, foreign=foreign)
    files = [safetensors.open_file(path) for path in paths]
    chosen = _choose(files, targets)
    format = BlockFormat(kind, block, double)
    names = {path.name: path for path in beside}
    config = _config(names[CONFIG], files, chosen, format) if CONFIG in names else None
    with atomic_directory(target, overwrite=overwrite) as fresh:
        for file in files:
            _quantize_file(file, chosen, format, fresh / file.path.name)
        for name, path in names.items():
            if name == CONFIG:
                (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            elif name == INDEX:
                index = update_index(path, [safetensors.open_file(fresh / file.path.name) for file in files])
                (fresh / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(path, fresh / name)
    return sorted(chosen)


def _choose(files: Sequence[safetensors.File], targets: Sequence[str] | None) -> set[str]:
    """The names of the weights to quantize."""
    names = [name for file in files for name in file.entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{files[0].path.parent}: two of its files hold a tensor of the same name.")
    if ready := weight_names(names):
        raise ValueError(
            f"{files[0].path.parent} holds 4-bit weights already, such as {printable(ready[0])}. Quantize the original."
        )
    weights = [
        name
        for file in files
        for name, entry in file.entries.items()
        if entry.dtype in DTYPES.values() and len(entry.shape) == 2 and entry.nbytes
    ]
    if not targets:
        chosen = set(_match(weights, "*.weight")).difference(*(_match(weights, glob) for glob in KEPT))
        if not chosen:
            raise ValueError(f"{files[0].path.parent} holds no 2-D floating-point '*.weight' but embeddings and heads.")
    else:
        chosen = set()
        for glob in targets:
            matches = _match(weights, glob)
            if not matches:
                examples = ", ".join(printable(name) for name in weights[:3]) or "none"
                raise ValueError(f"--targets {glob!r} matches no 2-D floating-point weight; the files hold {examples}.")
            chosen |= set(matches)
    for name in sorted(chosen):
        if taken := [part for part in part_names(name, names) if part != name]:
            raise ValueError(f"{files[0].path.parent}: {printable(taken[0])} has the name of a part of a 4-bit weight.")
    return chosen


def _match(names: Sequence[str], glob: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, glob)]


def _quantize_file(file: safetensors.File, chosen: Collection[str], format: BlockFormat, target: Path) -> None:
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, entry in file.entries.items():
        specs |= largest_specs(name, entry.shape, format) if name in chosen else {name: (entry.dtype, entry.shape)}
    parts: dict[str, np.ndarray] = {}

    def produce(name: str) -> np.ndarray:
        if name in chosen:
            tensor = file.read(name)
            # Of the weight and not of its scales: XLA's largest value of a block on a CPU passes over NaN.
            if not np.isfinite(tensor).all():
                raise ValueError(f"{file.path}: tensor {name!r} holds NaN or infinity. Fetch or save it again.")
            weight = jnp.asarray(tensor)
            del tensor  # JAX may have copied it
            parts.update(to_tensors(name, quantize_weight(weight, format)))
        return parts.pop(name) if name in parts else file.read(name)

    variable = {name for name in specs if weight_names([name])}
    watch = watcher(file.path.name)
    safetensors.write(target, specs, produce, metadata=file.metadata, watch=watch, at_most=variable)


def _config(
    path: Path, files: Sequence[safetensors.File], chosen: Collection[str], format: BlockFormat
) -> Mapping[str, object]:
    """``config.json`` with what transformers needs to know to load the files."""
    config = read_object(path)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path} has a quantization_config: the model is quantized already. Quantize the original.")
    entries = {name: entry for file in files for name, entry in file.entries.items()}
    kept = {name.removesuffix(".weight") for name, entry in entries.items() if len(entry.shape) == 2} - {
        name.removesuffix(".weight") for name in chosen
    }
    # A head that is tied to the embedding is in no file, and transformers would make it one of 4 bits.
    kept |= {"lm_head"} if "lm_head.weight" not in chosen else set()
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": format.kind,
        "bnb_4bit_use_double_quant": format.double,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": entries[min(chosen)].dtype.name,
        "llm_int8_skip_modules": sorted(kept),
    }
    return config
