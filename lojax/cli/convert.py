"""Between adapters that lojax.save wrote (orbax) and Hugging Face PEFT. The direction follows from SRC."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from lojax.adapters.adapter import is_adapter
from lojax.adapters.algebra import moved_paths
from lojax.adapters.paths import flatten, unflatten
from lojax.checkpoint.adapter_directory import MANIFEST
from lojax.checkpoint.save_restore import read_manifest, restore, save
from lojax.cli.paths import check_target, user_path
from lojax.files import safetensors
from lojax.peft.config import read_config
from lojax.peft.model_families import name_map, name_maps
from lojax.peft.name_map import NameMap
from lojax.peft.read_adapter import freeze, load
from lojax.peft.write_adapter import foreign_entry
from lojax.peft.write_adapter import save as save_peft
from lojax.text import printable
from lojax.types import ArrayLike, Params, Shape

SUMMARY = "turn a lojax adapter into a PEFT one, or the reverse"
EXAMPLE = "lojax convert ~/adapters/from-peft ~/adapters/for-jax --map llama --params ~/models/params.safetensors"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("source", type=user_path, help="the adapter directory")
    parser.add_argument("target", type=user_path, help="the directory to make")
    parser.add_argument("--map", required=True, help=f"a file of name rules, or one of {', '.join(name_maps())}")
    parser.add_argument(
        "--params",
        type=user_path,
        help="the JAX base, for its shapes (and its numbers where token rows or DoRA need them): an orbax directory, "
        ".msgpack or .safetensors",
    )
    parser.add_argument(
        "--start",
        type=user_path,
        help="the adapter as init returned it, saved by lojax, for one whose start was taken out of its weight (PiSSA, "
        "OLoRA, MiLoRA, LoftQ, LoRA-GA): what PEFT gets is the difference, of twice the rank",
    )
    parser.add_argument("--base", help="base_model_name_or_path for PEFT")
    parser.add_argument("--task", help="task_type for PEFT, such as CAUSAL_LM")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that lojax wrote")


def run(args: argparse.Namespace) -> None:
    """Converts."""
    is_ours = (args.source / MANIFEST).is_file()
    if args.start is not None and not is_ours:
        raise ValueError("--start is for an adapter that lojax.save wrote; one of PEFT has no start. Leave it out.")
    inputs = [args.source, *args.source.glob("*"), *(path for path in (args.params, args.start) if path)]
    foreign = foreign_entry if is_ours else _foreign_to_lojax
    check_target(args.target, inputs, overwrite=args.overwrite, foreign=foreign)
    names = read_map(args.map)
    params = None if args.params is None else read_params(args.params)
    if is_ours:
        _to_peft(args, names, params)
    else:
        _from_peft(args, names, params)
    print(f"{args.source} -> {args.target}")


def read_map(name: str) -> NameMap:
    """The name map in a file, or the ready one of this name.

    Raises:
        ValueError: There is neither; or the file holds something else than name rules.
    """
    path = user_path(name)
    if not path.is_file():
        return name_map(name)
    try:
        return NameMap.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _foreign_to_lojax(directory: Path) -> str | None:
    """The name of something in a directory that is not of an adapter which `lojax.save` wrote; None where all is."""
    names = sorted(entry.name for entry in directory.iterdir())
    if MANIFEST not in names:
        return names[0] if names else None
    return next((name for name in names if name != MANIFEST and not name.startswith("arrays-")), None)


def _to_peft(args: argparse.Namespace, names: NameMap, params: Params | None) -> None:
    lora = restore(args.source)
    moved = moved_paths(lora)
    if moved and args.start is None:
        raise ValueError(
            f"{moved[0]}: the start of this adapter was taken out of its weight, and PEFT would put it on the "
            "pretrained weight, where it is wrong. Pass --start with the adapter as init returned it, saved by "
            "lojax.save."
        )
    rows = [path for path, leaf in flatten(lora).items() if is_adapter(leaf) and leaf.tokens is not None]
    if rows and params is None:
        raise ValueError(
            f"{rows[0]} has token rows, what is added to some rows of the embedding, and PEFT stores whole rows; "
            "pass --params with the JAX base."
        )
    save_peft(
        args.target,
        lora,
        None if params is None else freeze(params, lora),
        names,
        start=None if args.start is None else restore(args.start),
        base_model_name_or_path=args.base,
        task_type=args.task,
        config=read_manifest(args.source).metadata.get("peft_config"),
        overwrite=args.overwrite,
    )


def _from_peft(args: argparse.Namespace, names: NameMap, params: Params | None) -> None:
    config = read_config(args.source)
    if params is None:
        raise ValueError("a PEFT adapter does not say what the JAX tree looks like; pass --params with the JAX base.")
    lora = load(args.source, params, names)
    save(args.target, lora, metadata={"peft_config": dict(config.fields)}, overwrite=args.overwrite)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in a file: its shape is known, and its numbers are read where they are needed.

    They are for few leaves: an embedding with token rows of its own, a weight under DoRA.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], ArrayLike]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def read_params(path: Path) -> Params:
    """A parameter tree in a file, its leaves `Stored`.

    Args:
        path: An orbax directory, a Flax ``.msgpack``, or a ``.safetensors`` whose names are JAX paths.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is not a file that lojax reads.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        if path.is_dir():
            return _orbax(path.resolve())
        if path.suffix == ".msgpack":
            return _msgpack(path)
        if path.suffix == ".safetensors":
            file = safetensors.open_file(path)
            return unflatten({name.replace(".", "/"): _stored(file, name) for name in file.entries})
    except Exception as error:  # msgpack and orbax raise errors of many kinds for a damaged file
        text = printable(f"{type(error).__name__}: {error}", 500)
        raise ValueError(f"{path} does not hold a parameter tree ({text}).") from error
    raise ValueError(f"{path} is not an orbax directory, .msgpack or .safetensors.")


def _msgpack(path: Path) -> Params:
    tree = serialization.msgpack_restore(path.read_bytes())
    leaves = flatten(tree)
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"{name or 'its root'} is a {type(leaf).__name__}, not an array")
    return jax.tree.map(lambda leaf: Stored(np.shape(leaf), leaf.dtype, lambda: leaf), tree)


def _stored(file: safetensors.File, name: str) -> Stored:
    entry = file.entries[name]
    return Stored(entry.shape, entry.dtype, lambda: file.read(name))


def _orbax(path: Path) -> Params:
    with ocp.StandardCheckpointer() as reader:
        metadata = reader.metadata(path)
    # orbax wraps the tree in one or two more layers, by version
    metadata = getattr(metadata, "item_metadata", metadata)
    tree = getattr(metadata, "tree", metadata)
    if not tree:
        raise ValueError("no arrays of orbax are in it")

    @functools.cache
    def restored() -> list[np.ndarray]:
        """All of it, read once and only if something is needed: on the host, whatever devices wrote it."""
        shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)
        with ocp.StandardCheckpointer() as reader:
            return jax.tree.leaves(reader.restore(path, shapes))

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        Stored(leaf.shape, leaf.dtype, lambda i=i: restored()[i]) for i, leaf in enumerate(leaves)
    )
