"""Counts that do not depend on the machine, as JSON: run it on two checkouts and compare the outputs with diff.

FLOPs, bytes accessed, temporaries and kernels of the layers of layer_cost.py and the nets of net_cost.py, and the
numbers of equations and of HLO lines of the programs of trace_compile.py. Only lojax, its hand-written equivalents and
the frozen floor are counted: other libraries change with their releases.

    python benchmarks/counts.py > here.json
    PYTHONPATH=/path/to/another/checkout python benchmarks/counts.py > there.json
    diff here.json there.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import layer_cost
import net_cost
import trace_compile
from layer_methods import METHODS, PEERS
from measure import cost


def layers() -> dict[str, Any]:
    """What XLA counts in every layer, by layer, differentiated arguments and method."""
    methods = {name: make for name, make in METHODS.items() if name not in PEERS}
    rows = layer_cost.count(methods, layer_cost.COUNTED, jnp.float32, None)
    counts = ("flops", "bytes", "temporaries", "outputs", "kernels")
    return {f"{row['layer']}; {row['wrt']}; {row['method']}": {name: row[name] for name in counts} for row in rows}


def nets() -> dict[str, Any]:
    """What XLA counts in a step of every net."""
    counts = {}
    for title, net in net_cost.NETS.items():
        for method, (f, args) in net_cost.programs(net, *net_cost.inputs(net)).items():
            counts[f"{title}; {method}"] = dataclasses.asdict(cost(f, *args))
    return counts


def traces() -> dict[str, Any]:
    """How many equations and HLO lines every program of trace_compile.py has. Nothing is compiled."""
    programs = {
        "12 layers unrolled": trace_compile.stack_programs(False),
        "12 layers scanned": trace_compile.stack_programs(True),
    }
    try:
        programs["BERT (MiniLM)"] = trace_compile.bert_programs()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
    return {
        f"{title}; {name}": trace_compile.sizes(*program)
        for title, group in programs.items()
        for name, program in group.items()
    }


def main() -> None:
    """Prints the counts; says on stderr which lojax they are of."""
    import lojax

    print(f"lojax in {lojax.__path__[0]}", file=sys.stderr)
    # An executable read from a compilation cache has lost part of its analysis.
    jax.config.update("jax_enable_compilation_cache", False)
    with contextlib.redirect_stdout(sys.stderr):  # progress; stdout is for the JSON alone
        counts = {"jax": jax.__version__, "layers": layers(), "nets": nets(), "traces": traces()}
    json.dump(counts, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
