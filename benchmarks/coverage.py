"""Claim: every weight of every net in ``tests/nets/zoo`` stays factored.

Prints and writes to ``results/coverage.{json,md}``, for each net, how many weights were targeted and how many of them
are factored in all their uses, without editing the net. Libraries that are not installed are skipped and listed.

    python benchmarks/coverage.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax

import lojax
from lojax.report.table import table

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.nets.zoo import CASES, Case  # noqa: E402

PACKAGES = {"functions": "jax", "flax.linen": "flax", "flax.nnx": "flax", "haiku": "dm-haiku"}
"""The package of each library that has another name."""


def report_coverage(case: Case) -> dict[str, Any]:
    """What the report says about one net."""
    with jax.numpy_dtype_promotion(case.promotion):
        example = case.build()
        model = lojax.wrap(example.net, case.targets, rank=case.rank)
        frozen, lora = jax.eval_shape(
            lambda key: model.init(key, example.params, *example.args, **example.kwargs), jax.random.key(0)
        )
        report = model.report(frozen, lora, *example.args, **example.kwargs)
    materialized = {
        weight.path: next(use.reason for use in weight.uses if use.how == "materialized")
        for weight in report.weights
        if weight.how in ("materialized", "both")
    }
    package = PACKAGES.get(case.library, case.library)
    return {
        "library": case.library,
        "version": f"{package} {importlib.metadata.version(package)}",
        "net": case.name,
        "weights": len(report.weights),
        "factored": report.factored,
        "uses": sum(len(weight.uses) for weight in report.weights),
        "materialized": materialized,
    }


def sum_by_library(nets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers summed by library, and over all."""
    names = dict.fromkeys(net["library"] for net in nets)
    groups = {name: [net for net in nets if net["library"] == name] for name in names} | {"all": nets}
    return [
        {
            "library": name,
            "version": group[0]["version"] if name != "all" else "",
            "nets": len(group),
            "weights": (weights := sum(net["weights"] for net in group)),
            "factored": (factored := sum(net["factored"] for net in group)),
            "share": round(100 * factored / weights, 1),
        }
        for name, group in groups.items()
    ]


def main() -> None:
    """Measures, prints and writes."""
    installed = [case for case in CASES if importlib.util.find_spec(case.requires)]
    nets = [report_coverage(case) for case in installed]
    missing = sorted({case.library for case in CASES} - {case.library for case in installed})
    sums = sum_by_library(nets)
    setup = f"Python {platform.python_version()}, jax {jax.__version__}, CPU. Programs are traced, not run."
    rows = [
        (s["library"], s["version"], *(str(s[k]) for k in ("nets", "weights", "factored")), f"{s['share']}%")
        for s in sums
    ]
    print(table(("library", "version", "nets", "weights", "factored", "share"), rows))
    lines = ["# Coverage: adapted weights that stay factored", "", setup]
    lines += [f"Skipped, because not installed: {', '.join(missing)}."] if missing else []
    lines += ["", "| library | version | nets | weights | factored | share |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "| library | net | weights | factored | uses | materialized, and why |", "|---|---|---|---|---|---|"]
    for net in nets:
        why = "; ".join(f"`{path}`: {reason}" for path, reason in net["materialized"].items())
        lines.append(
            f"| {net['library']} | {net['net']} | {net['weights']} | {net['factored']} | {net['uses']} | {why} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coverage.md").write_text("\n".join(lines) + "\n")
    record = {"setup": setup, "missing": missing, "libraries": sums, "nets": nets}
    (RESULTS / "coverage.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
