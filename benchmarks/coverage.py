"""Every weight of every net stays factored: the zoo of ``tests/nets``, library by library.

Prints, and writes to ``results/coverage.{json,md}``, for each net how many weights were targeted and how many
of them have all their uses executed factored, without editing the net. Nets of libraries that are not
installed are left out, and named.

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
"""The package of each library whose name differs from the package's."""


def covered(case: Case) -> dict[str, Any]:
    """What the report says of one net."""
    with jax.numpy_dtype_promotion(case.promotion):
        example = case.build()
        model = lojax.wrap(example.net, case.targets, rank=case.rank)
        frozen, lora = jax.eval_shape(
            lambda key: model.init(key, example.params, *example.args, **example.kwargs), jax.random.key(0)
        )
        report = model.report(frozen, lora, *example.args, **example.kwargs)
    formed = {
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
        "formed": formed,
    }


def libraries(nets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, summed by library, and over all."""
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
    present = [case for case in CASES if importlib.util.find_spec(case.requires)]
    nets = [covered(case) for case in present]
    absent = sorted({case.library for case in CASES} - {case.library for case in present})
    sums = libraries(nets)
    where = f"Python {platform.python_version()}, jax {jax.__version__}, CPU. Programs are traced, not run."
    rows = [
        (s["library"], s["version"], *(str(s[k]) for k in ("nets", "weights", "factored")), f"{s['share']}%")
        for s in sums
    ]
    print(table(("library", "version", "nets", "weights", "factored", "share"), rows))
    lines = ["# Coverage: adapted weights that stay factored", "", where]
    lines += [f"Not installed here, so left out: {', '.join(absent)}."] if absent else []
    lines += ["", "| library | version | nets | weights | factored | share |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "| library | net | weights | factored | uses | formed, and why |", "|---|---|---|---|---|---|"]
    for net in nets:
        why = "; ".join(f"`{path}`: {reason}" for path, reason in net["formed"].items())
        lines.append(
            f"| {net['library']} | {net['net']} | {net['weights']} | {net['factored']} | {net['uses']} | {why} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coverage.md").write_text("\n".join(lines) + "\n")
    record = {"where": where, "absent": absent, "libraries": sums, "nets": nets}
    (RESULTS / "coverage.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
