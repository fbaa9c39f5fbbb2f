"""What is this adapter? Its weights, ranks, scales, sizes, base, and how much of each rank is used."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import positions
from lojax.adapters.matrices import factor_matrices, unify_scale_and_rank
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.checkpoint.adapter_directory import BANK, MANIFEST
from lojax.checkpoint.bank_manifest import read_bank_manifest
from lojax.checkpoint.save_restore import read_manifest, restore
from lojax.cli.paths import user_path
from lojax.files import safetensors
from lojax.peft.config import Config
from lojax.peft.read_adapter import open_adapter
from lojax.peft.tensor_keys import WRAPPER, FactorPair, read_keys
from lojax.report.table import table
from lojax.text import printable
from lojax.types import Params, Shape

SUMMARY = "show what an adapter directory holds"
EXAMPLE = "lojax inspect ~/adapters/my-adapter"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("directory", type=user_path, help="a PEFT adapter, or an adapter or bank that lojax.save wrote")


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    print(describe(args.directory))


def describe(directory: Path) -> str:
    """The table of an adapter directory.

    Raises:
        FileNotFoundError: It holds no adapter.
        ValueError: It is damaged, or of a kind that lojax does not know.
    """
    if (directory / BANK).is_file():
        return _describe_bank(directory)
    is_ours = (directory / MANIFEST).is_file()
    rows, facts = _ours(directory) if is_ours else _peft(directory)
    header = ("weight", "in -> out", "rank", "scale", "parameters", "norm", "effective rank")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    total = sum(row.parameters for row in rows)
    facts |= {"parameters": f"{total:,} in {len(rows)} weights", "size": f"{size:,} bytes"}
    lines = [f"{name + ':':12} {printable(value)}" for name, value in facts.items()]
    return "\n".join([table(header, [row.cells() for row in rows]), "", *lines])


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight. ``values`` are the singular values of its scaled update, per entry of a stack."""

    name: str
    shape: str
    rank: int | None
    scale: float | None
    parameters: int
    values: np.ndarray | None

    def cells(self) -> tuple[str, ...]:
        """As shown."""
        rank = "full" if self.rank is None else str(self.rank)
        scale = "" if self.scale is None else f"{self.scale:.4g}"
        norm = effective = ""
        if self.values is not None:
            norm = f"{np.sqrt((self.values**2).sum()):.4g}"
            effective = f"{np.mean([effective_rank(values) for values in self.values]):.2f}"
        return printable(self.name), self.shape, rank, scale, f"{self.parameters:,}", norm, effective


def effective_rank(values: np.ndarray) -> float:
    """``exp`` of the entropy of the normalized singular values (Roy and Vetterli 2007).

    >>> round(effective_rank(np.array([1.0, 1.0, 0.0])), 6)
    2.0
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def singular_values(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Those of ``scale * a @ b`` for ``a`` ``[..., m, r]`` and ``b`` ``[..., r, n]``, the product never materialized.

    They are NaN if a factor holds NaN or infinity.
    """
    if not (np.isfinite(a.astype(np.float32)).all() and np.isfinite(b.astype(np.float32)).all()):
        return np.full((1, 1), np.nan)
    r_a = np.linalg.qr(a.astype(np.float64), mode="r")
    r_b = np.linalg.qr(np.swapaxes(b, -1, -2).astype(np.float64), mode="r")
    values = np.linalg.svd(r_a @ np.swapaxes(r_b, -1, -2), compute_uv=False)
    return np.atleast_2d(abs(scale) * values).reshape(-1, values.shape[-1])


def _describe_bank(directory: Path) -> str:
    """A table with a row for each adapter of a bank; `describe` of one of its folders tells more."""
    manifest = read_bank_manifest(directory)
    cells, total, base = [], 0, "not recorded"
    for i, entry in enumerate(manifest.entries):
        folder = directory / manifest.folder / entry.folder
        rows = _rows(restore(directory, entry=i))
        ranks, scales = ({getattr(row, name) for row in rows} - {None} for name in ("rank", "scale"))
        norm = np.sqrt(sum((row.values**2).sum() for row in rows if row.values is not None))
        parameters = sum(row.parameters for row in rows)
        texts = (_range_text(ranks), _range_text(scales), f"{parameters:,}", f"{norm:.4g}")
        cells.append((printable(entry.name or str(i)), f"{len(rows)}", *texts, str(folder.relative_to(directory))))
        total, base = total + parameters, _base_text(folder)
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


def _range_text(values: Collection[float]) -> str:
    """The smallest and the largest of some numbers.

    >>> _range_text({8, 2, 4}), _range_text({0.5}), _range_text(())
    ('2-8', '0.5', '')
    """
    return "-".join(f"{value:.4g}" for value in sorted({min(values), max(values)})) if values else ""


def _ours(directory: Path) -> tuple[list[Row], dict[str, str]]:
    facts = {"kind": "lojax adapter", "base": _base_text(directory)}
    return _rows(restore(directory)), facts | {"metadata": str(dict(read_manifest(directory).metadata) or "none")}


def _base_text(directory: Path) -> str:
    return "known by its fingerprint" if read_manifest(directory).base is not None else "not recorded"


def _rows(lora: Params) -> list[Row]:
    rows = []
    for path, leaf in flatten(lora).items():
        if is_adapter(leaf):
            rows.append(_row(path, leaf))
        elif leaf is not None:
            rows.append(Row(path, str(leaf.shape), None, None, math.prod(leaf.shape), None))
    return rows


def _row(path: str, adapter: Adapter) -> Row:
    if adapter.a is None:
        return Row(path, str(unbox(adapter.rows).shape), None, None, adapter.parameters, None)
    stack = len(positions(adapter.axes, "stack"))
    a_shape, b_shape = unbox(adapter.a).shape, unbox(adapter.b).shape
    shape = _shape_text(a_shape[:stack], a_shape[stack:-1], b_shape[stack + 1 :])
    scale = None if isinstance(adapter.scale, tuple) else adapter.scale
    plain = unify_scale_and_rank(adapter)
    a, b = factor_matrices(plain)
    values = singular_values(np.asarray(a), np.asarray(b), plain.one_scale)
    return Row(path, shape, adapter.rank, scale, adapter.parameters, values)


def _shape_text(stack: Sequence[int], ins: Shape, outs: Shape) -> str:
    times = "".join(f"{n} x " for n in stack)
    return f"{times}{'*'.join(map(str, ins))} -> {'*'.join(map(str, outs))}"


def _factor_row(file: safetensors.File, pair: FactorPair, config: Config) -> Row:
    a_shape, b_shape = file.entries[pair.a].shape, file.entries[pair.b].shape
    rank = config.rank(pair.module) if config["target_parameters"] else (a_shape or (0,))[0]
    experts = a_shape[0] // rank if a_shape and rank else 0
    if not experts or len(a_shape) < 2 or len(b_shape) < 2 or {a_shape[0], math.prod(b_shape[1:])} != {rank * experts}:
        raise ValueError(f"{file.path}: {pair.a} is {a_shape} and {pair.b} is {b_shape}: not factors of one rank.")
    scale = config.scale(pair.module, rank)
    a = file.read(pair.a).reshape(experts, rank, -1).swapaxes(1, 2)
    b = file.read(pair.b).reshape(b_shape[0], rank, experts).transpose(2, 1, 0)
    shape = _shape_text([experts] if experts > 1 else [], a_shape[1:], b_shape[:1])
    return Row(pair.module + WRAPPER * pair.depth, shape, rank, scale, a.size + b.size, singular_values(a, b, scale))


def _peft(directory: Path) -> tuple[list[Row], dict[str, str]]:
    config, file = open_adapter(directory)
    keys = read_keys(file)
    for key, reason in keys.unexpected.items():
        raise ValueError(f"{file.path}: {key} {reason}.")
    rows = [_factor_row(file, pair, config) for pair in keys.pairs]
    full = [*keys.full.items(), *((f"{key.module} {key.extra.field}", key.key) for key in keys.extras)]
    for name, key in full:
        shape = file.entries[key].shape
        rows.append(Row(name, str(shape), None, None, math.prod(shape), None))
    return rows, {
        "kind": f"PEFT adapter (peft {config['peft_version'] or 'of unknown version'})",
        "base": str(config["base_model_name_or_path"] or "not recorded"),
        "task": str(config["task_type"] or "none"),
    }
