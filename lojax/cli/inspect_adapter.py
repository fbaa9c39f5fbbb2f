"""What is this adapter? Its weights, ranks, scales, sizes, base, and how much of each rank is used."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import positions
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.checkpoint.adapter_directory import MANIFEST
from lojax.checkpoint.save_restore import read_manifest, restore
from lojax.files import safetensors
from lojax.peft.config import read_config
from lojax.peft.read_adapter import weights_file
from lojax.peft.tensor_keys import Extra, Factor, read_key
from lojax.report.table import table

SUMMARY = "show what an adapter directory holds"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("directory", type=Path, help="a PEFT adapter, or one that lojax.save wrote")


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    print(describe(args.directory))


def describe(directory: Path) -> str:
    """The table of an adapter directory.

    Raises:
        FileNotFoundError: It holds no adapter.
        ValueError: It is damaged, or of a kind that lojax does not know.
    """
    is_ours = (directory / MANIFEST).is_file()
    rows, facts = _ours(directory) if is_ours else _peft(directory)
    header = ("weight", "in -> out", "rank", "scale", "parameters", "norm", "effective rank")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    total = sum(row.parameters for row in rows)
    facts |= {"parameters": f"{total:,} in {len(rows)} weights", "size": f"{size:,} bytes"}
    lines = [f"{name + ':':12} {value}" for name, value in facts.items()]
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
        norm = effective = ""
        if self.values is not None:
            norm = f"{np.sqrt((self.values**2).sum()):.4g}"
            effective = f"{np.mean([effective_rank(v) for v in self.values]):.2f}"
        rank, scale = (
            ("full", "") if self.rank is None else (str(self.rank), "" if self.scale is None else f"{self.scale:.4g}")
        )
        return self.name, self.shape, rank, scale, f"{self.parameters:,}", norm, effective


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
    """Those of ``scale * a @ b`` for ``a`` ``[..., m, r]`` and ``b`` ``[..., r, n]``, the product never formed."""
    left = np.linalg.qr(a.astype(np.float64), mode="r")
    right = np.linalg.qr(np.swapaxes(b, -1, -2).astype(np.float64), mode="r")
    values = np.linalg.svd(left @ np.swapaxes(right, -1, -2), compute_uv=False)
    return np.atleast_2d(abs(scale) * values).reshape(-1, values.shape[-1])


def _ours(directory: Path) -> tuple[list[Row], dict[str, str]]:
    manifest = read_manifest(directory)
    rows = []
    for path, leaf in flatten(restore(directory)).items():
        if is_adapter(leaf):
            rows.append(_row(path, leaf))
        elif leaf is not None:
            rows.append(Row(path, str(leaf.shape), None, None, math.prod(leaf.shape), None))
    base = "known by its fingerprint" if manifest.base is not None else "not recorded"
    return rows, {"kind": "lojax adapter", "base": base, "metadata": str(dict(manifest.metadata) or "none")}


def _row(path: str, adapter: Adapter) -> Row:
    if adapter.a is None:
        return Row(path, str(unbox(adapter.rows).shape), None, None, adapter.parameters, None)
    a, b = np.asarray(unbox(adapter.a)), np.asarray(unbox(adapter.b))
    stack = len(positions(adapter.axes, "stack"))
    ins, outs = a.shape[stack:-1], b.shape[stack + 1 :]
    r = adapter.rank
    flat = a.reshape(-1, math.prod(ins), r), b.reshape(-1, r, math.prod(outs))
    return Row(
        path,
        _shape(a.shape[:stack], ins, outs),
        r,
        None if isinstance(adapter.scale, tuple) else adapter.scale,
        adapter.parameters,
        singular_values(flat[0], flat[1] * np.reshape(adapter.scale, (-1, 1, 1)), 1.0),
    )


def _shape(stack: Any, ins: Any, outs: Any) -> str:
    times = "".join(f"{n} x " for n in stack)
    return f"{times}{'*'.join(map(str, ins))} -> {'*'.join(map(str, outs))}"


def _peft(directory: Path) -> tuple[list[Row], dict[str, str]]:
    config = read_config(directory)
    file = safetensors.open_file(weights_file(directory))
    read = {key: read_key(key, str(file.path)) for key in file.entries}
    sides = {(k.module, k.nested, k.side): k for k in read.values() if isinstance(k, Factor)}
    rows = []
    for (module, nested, side), factor in sides.items():
        partner = sides.get((module, nested, "B"))
        if side == "B":
            continue
        if partner is None:
            raise ValueError(f"{file.path}: {factor.key} has no lora_B beside it.")
        a, b = file.read(factor.key), file.read(partner.key)
        rank = config.rank(module) if config["target_parameters"] else a.shape[0]
        experts = max(a.shape[0] // rank, 1)
        scale = config.scale(module, rank)
        ins, outs = a.shape[1:], b.shape[:1]
        flat_a = a.reshape(experts, rank, -1).swapaxes(1, 2)
        flat_b = b.reshape(b.shape[0], rank, experts).transpose(2, 1, 0)
        values = singular_values(flat_a, flat_b, scale)
        name = module + ".base_layer" * nested
        rows.append(
            Row(name, _shape([experts] if experts > 1 else [], ins, outs), rank, scale, a.size + b.size, values)
        )
    for key, name in read.items():
        if isinstance(name, str):
            shape = file.entries[key].shape
            rows.append(Row(name, str(shape), None, None, math.prod(shape), None))
        elif isinstance(name, Extra):
            shape = file.entries[key].shape
            rows.append(Row(f"{name.module} {name.kind}", str(shape), None, None, math.prod(shape), None))
        elif name is None:
            raise ValueError(f"{file.path}: {key} is no key of PEFT.")
    facts = {"kind": f"PEFT adapter (peft {config['peft_version'] or 'of unknown version'})"}
    facts |= {
        "base": str(config["base_model_name_or_path"] or "not recorded"),
        "task": str(config["task_type"] or "none"),
    }
    return rows, facts
