"""What is this adapter? Its weights, ranks, scales and sizes, what it does to its base, and a picture of that."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lojax.adapters.intruders import TOP
from lojax.analysis.analyze import analyze, analyze_leaves
from lojax.analysis.text import range_text
from lojax.checkpoint.adapter_directory import BANK
from lojax.checkpoint.bank_manifest import read_bank_manifest
from lojax.checkpoint.save_restore import restore
from lojax.cli.adapter_leaves import adapter_leaves, base_text
from lojax.cli.paths import user_path
from lojax.report.table import table
from lojax.text import printable

SUMMARY = "show what an adapter directory holds, and what it does to its base"
EXAMPLE = "lojax inspect ~/adapters/my-adapter --base ~/models/base --plot adapter.png"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("directory", type=user_path, help="a PEFT adapter, or an adapter or bank that lojax.save wrote")
    parser.add_argument(
        "--base",
        type=user_path,
        help="the base, to compare with: for a PEFT adapter a .safetensors file or the directory of a model; for one "
        "of lojax the JAX parameters, an orbax directory, .msgpack or .safetensors",
    )
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw it: a .png, .pdf or .svg (matplotlib)")
    parser.add_argument(
        "--top",
        type=int,
        default=TOP,
        help="with --base, how many directions of each weight are searched for intruders; 0 for none, which is much "
        "faster where weights are large (%(default)s)",
    )
    parser.add_argument(
        "--experts", choices=("out_in", "in_out"), help="how the base has its experts, if shapes do not tell"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    print(describe(args.directory, base=args.base, plot=args.plot, top=args.top, experts=args.experts))


def describe(
    directory: Path,
    *,
    base: Path | None = None,
    plot: Path | None = None,
    top: int = TOP,
    experts: str | None = None,
) -> str:
    """The table of an adapter directory.

    Args:
        directory: The directory.
        base: The base, to compare with.
        plot: The picture to draw.
        top: How many directions are searched for intruders.
        experts: How a base of torch has its experts: ``"out_in"``, ``"in_out"``, or None where the shapes tell.

    Raises:
        FileNotFoundError: It holds no adapter.
        ValueError: It is damaged, of a kind that lojax does not know, or does not fit the base; or there is nothing to
            draw with.
    """
    if top < 0:
        raise ValueError(f"--top {top}: expected a number of at least 0.")
    if (directory / BANK).is_file():
        if base is not None or plot is not None:
            raise ValueError(
                f"{directory} holds a bank; --base and --plot are for one adapter. Inspect one of its folders, which "
                "the table without them names."
            )
        return _describe_bank(directory)
    leaves, facts = adapter_leaves(directory, base, experts=experts)
    analysis = analyze_leaves(leaves, top=top)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    total, weights = sum(row.parameters for row in analysis.rows), len({row.path for row in analysis.rows})
    facts |= {"parameters": f"{total:,} in {weights} weights", "size": f"{size:,} bytes"}
    if plot is not None:
        try:
            analysis.plot(plot)
        except ModuleNotFoundError as error:
            raise ValueError(f"--plot needs matplotlib: pip install matplotlib ({error}).") from None
        facts["picture"] = str(plot)
    lines = [f"{name + ':':12} {printable(value)}" for name, value in facts.items()]
    return "\n".join([analysis.text, "", *lines])


def _describe_bank(directory: Path) -> str:
    """A table with a row for each adapter of a bank; `describe` of one of its folders tells more."""
    manifest = read_bank_manifest(directory)
    cells, total, base = [], 0, "not recorded"
    for i, entry in enumerate(manifest.entries):
        folder = directory / manifest.folder / entry.folder
        rows = analyze(None, restore(directory, entry=i)).rows
        ranks, scales = ({getattr(row, name) for row in rows} - {None} for name in ("rank", "scale"))
        norm = np.sqrt(sum(row.norm**2 for row in rows if row.norm is not None))
        parameters = sum(row.parameters for row in rows)
        texts = (range_text(ranks), range_text(scales), f"{parameters:,}", f"{norm:.4g}")
        weights = f"{len({row.path for row in rows})}"
        cells.append((printable(entry.name or str(i)), weights, *texts, str(folder.relative_to(directory))))
        total, base = total + parameters, base_text(folder)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    facts = {
        "kind": f"lojax bank of {len(cells)} adapters",
        "base": base,
        "metadata": str(dict(manifest.metadata) or "none"),
        "parameters": f"{total:,}",
        "size": f"{size:,} bytes",
    }
    header = ("adapter", "weights", "rank", "scale", "parameters", "norm", "folder")
    lines = [f"{name + ':':12} {printable(value)}" for name, value in facts.items()]
    return "\n".join([table(header, cells), "", *lines])
