"""What will fine-tuning need on a TPU slice? Compiled ahead of time, with no TPU at hand."""

from __future__ import annotations

import argparse
import json

from lojax.cli.paths import user_path
from lojax.planner.decoder import TARGETS
from lojax.planner.plan import plan, search

SUMMARY = "tell what a fine-tuning run needs on a TPU slice, before renting it"
EXAMPLE = "lojax plan --preset 8B --topology v5e:4x4 --mesh fsdp=16 --estimate"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", type=user_path, help="a Hugging Face config.json, or the directory that holds it")
    model.add_argument("--preset", help="a model by name: 8B, 70B or 405B")
    parser.add_argument("--topology", help="the slice, such as v5e:16x16")
    parser.add_argument("--mesh", help="how its devices are arranged, such as fsdp=16,tensor=16")
    parser.add_argument("--search", metavar="CHIP", help="find the smallest slice of this chip, and its mesh")
    parser.add_argument("--seq", type=int, default=4096, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, over all devices (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (%(default)s)")
    parser.add_argument("--targets", default=TARGETS, help="which weights are adapted (%(default)s)")
    parser.add_argument("--quantize", metavar="KIND", help="the base of the blocks in nf4, int4, int8 or float8_e4m3fn")
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of peak FLOP/s for the time (%(default)s)")
    parser.add_argument("--estimate", action="store_true", help="formulas only, in seconds: compile nothing")
    parser.add_argument("--json", type=user_path, help="also write everything to this file")


def run(args: argparse.Namespace) -> None:
    """Prints the plan."""
    settings = {name: getattr(args, name) for name in ("seq", "batch", "rank", "targets", "mfu")}
    settings["quantized"] = args.quantize
    settings["compiled"] = False if args.estimate else None
    if args.search:
        if args.topology or args.mesh:
            raise ValueError("--search finds the slice and the mesh: leave out --topology and --mesh.")
        result = search(args.config or args.preset, chip=args.search, **settings)
    elif not args.topology or not args.mesh:
        raise ValueError("Give --topology and --mesh, such as --topology v5e:4x4 --mesh fsdp=16; or --search v5e.")
    else:
        result = plan(args.config or args.preset, topology=args.topology, mesh=args.mesh, **settings)
    print(result)
    if args.json:
        args.json.write_text(json.dumps(result.as_dict(), indent=2) + "\n")
