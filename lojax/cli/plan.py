"""What will fine-tuning need on a TPU slice, or on GPUs? Compiled ahead of time, with neither at hand."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lojax.cli.paths import user_path
from lojax.planner.decoder import TARGETS
from lojax.planner.gpu_plan import GpuPlan, plan_gpus
from lojax.planner.plan import Plan, plan, search

SUMMARY = "tell what a fine-tuning run needs on a TPU slice or on GPUs, before renting them"
EXAMPLE = "lojax plan --preset 8B --topology v5e:4x4 --mesh fsdp=16 --estimate"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", type=user_path, help="a Hugging Face config.json, or the directory that holds it")
    model.add_argument("--preset", help="a model by name: 8B, 70B or 405B")
    parser.add_argument("--topology", help="the slice, such as v5e:16x16")
    parser.add_argument("--mesh", help="how its devices are arranged, such as fsdp=16,tensor=16")
    parser.add_argument("--search", metavar="CHIP", help="find the smallest slice of this chip, and its mesh")
    parser.add_argument("--gpu", metavar="CARD", help="plan for GPUs instead: h100, a100, l4, rtx4090 and others")
    parser.add_argument("--count", type=int, help="GPUs in a host, 1 to 8 (1)")
    parser.add_argument("--hosts", type=int, help="hosts (1)")
    parser.add_argument("--seq", type=int, default=4096, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, help="sequences in a step, over all devices (16; for GPUs, one each)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (%(default)s)")
    parser.add_argument("--targets", default=TARGETS, help="which weights are adapted (%(default)s)")
    parser.add_argument(
        "--quantize",
        metavar="KIND",
        help="the base of the blocks in nf4, int4, int8 or float8_e4m3fn; for GPUs, of the QLoRA column (nf4)",
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of peak FLOP/s for the time (%(default)s)")
    parser.add_argument("--estimate", action="store_true", help="formulas only, in seconds: compile nothing")
    parser.add_argument("--json", type=user_path, help="also write everything to this file")


def run(args: argparse.Namespace) -> None:
    """Prints the plan."""
    settings = {name: getattr(args, name) for name in ("seq", "rank", "targets", "mfu")}
    settings["compiled"] = False if args.estimate else None
    result = _plan_gpus(args, settings) if args.gpu else _plan_slice(args, settings)
    print(result)
    if args.json:
        args.json.write_text(json.dumps(result.as_dict(), indent=2) + "\n")


def _plan_gpus(args: argparse.Namespace, settings: dict[str, Any]) -> GpuPlan:
    if args.topology or args.search:
        raise ValueError("--gpu plans for GPUs: leave out --topology and --search, which are for TPUs.")
    settings |= {"batch": args.batch, "quantized": args.quantize or "nf4"}
    count, hosts = (1 if number is None else number for number in (args.count, args.hosts))
    return plan_gpus(args.config or args.preset, gpu=args.gpu, count=count, hosts=hosts, mesh=args.mesh, **settings)


def _plan_slice(args: argparse.Namespace, settings: dict[str, Any]) -> Plan:
    if args.count is not None or args.hosts is not None:
        raise ValueError("--count and --hosts are for GPUs: give --gpu, such as --gpu h100 --count 8.")
    settings |= {"batch": 16 if args.batch is None else args.batch, "quantized": args.quantize}
    if args.search:
        if args.topology or args.mesh:
            raise ValueError("--search finds the slice and the mesh: leave out --topology and --mesh.")
        return search(args.config or args.preset, chip=args.search, **settings)
    if not args.topology or not args.mesh:
        raise ValueError(
            "Give --topology and --mesh, such as --topology v5e:4x4 --mesh fsdp=16; or --search v5e; or --gpu h100."
        )
    return plan(args.config or args.preset, topology=args.topology, mesh=args.mesh, **settings)
