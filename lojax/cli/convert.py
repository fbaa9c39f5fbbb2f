"""Between adapters that lojax.save wrote (orbax) and Hugging Face PEFT. The direction follows from SRC."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from lojax.store import safetensors
from lojax.store.checkpoint import read_record, restore, save
from lojax.store.directory import refuse_existing, whole_directory
from lojax.store.layout import POINTER
from lojax.store.peft.config import read_config
from lojax.store.peft.families import name_map, name_maps
from lojax.store.peft.load import freeze, load
from lojax.store.peft.namemap import NameMap
from lojax.store.peft.save import save as save_peft

SUMMARY = "turn a lojax adapter into a PEFT one, or the reverse"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("source", type=Path, help="the adapter directory")
    parser.add_argument("target", type=Path, help="the directory to make")
    parser.add_argument("--map", required=True, help=f"a file of name rules, or one of {', '.join(name_maps())}")
    parser.add_argument(
        "--params", type=Path, help="the JAX base, for its shapes: an orbax directory, .msgpack or .safetensors"
    )
    parser.add_argument("--base", help="base_model_name_or_path for PEFT")
    parser.add_argument("--task", help="task_type for PEFT, such as CAUSAL_LM")
    parser.add_argument("--overwrite", action="store_true", help="replace the target")


def run(args: argparse.Namespace) -> None:
    """Converts."""
    refuse_existing(args.target, overwrite=args.overwrite)
    names = (
        NameMap.parse(Path(args.map).read_text(encoding="utf-8")) if Path(args.map).is_file() else name_map(args.map)
    )
    if (args.source / POINTER).is_file():
        kept = read_record(args.source).metadata.get("peft_config")
        options: dict[str, Any] = {"base_model_name_or_path": args.base, "task_type": args.task}
        lora = restore(args.source)
        frozen = None if args.params is None else freeze(shapes_of(args.params), lora)
        save_peft(args.target, lora, frozen, names, config=kept, overwrite=args.overwrite, **options)
    else:
        config = read_config(args.source)
        if args.params is None:
            raise ValueError(
                "a PEFT adapter does not say how the JAX tree is laid out; pass --params with the JAX base."
            )
        lora = load(args.source, shapes_of(args.params), names)
        with whole_directory(args.target, overwrite=args.overwrite) as fresh:
            save(fresh, lora, metadata={"peft_config": dict(config.fields)})
    print(f"{args.source} -> {args.target}")


def shapes_of(path: Path) -> Any:
    """The shapes of a parameter tree in a file.

    Args:
        path: An orbax directory, a Flax ``.msgpack``, or a ``.safetensors`` whose names are JAX paths.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is of no kind that lojax reads.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir():
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _orbax_metadata(path))
    if path.suffix == ".msgpack":
        tree = serialization.msgpack_restore(path.read_bytes())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)
    if path.suffix == ".safetensors":
        return _nested(safetensors.open_file(path).entries)
    raise ValueError(f"{path} is no orbax directory, .msgpack or .safetensors.")


def _orbax_metadata(path: Path) -> Any:
    with ocp.StandardCheckpointer() as reader:
        found = reader.metadata(path.resolve())
    found = getattr(found, "item_metadata", found)
    return getattr(found, "tree", found)


def _nested(entries: Mapping[str, safetensors.Entry]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, entry in entries.items():
        *parents, last = name.replace(".", "/").split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
    return tree
