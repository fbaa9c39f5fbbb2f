"""``lojax SUBCOMMAND``, or ``python -m lojax SUBCOMMAND``, for people who only have files."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from lojax.text import printable

COMMANDS = {
    "inspect": "lojax.cli.inspect_adapter",
    "convert": "lojax.cli.convert",
    "merge": "lojax.cli.merge_files",
    "extract": "lojax.cli.extract_adapter",
    "quantize": "lojax.cli.quantize_files",
    "plan": "lojax.cli.plan",
}
"""Each subcommand's module. It offers ``SUMMARY``, ``EXAMPLE``, ``configure(parser)`` and ``run(args)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        0, or 1 where the input is at fault: then the reason is on standard error.
    """
    parser = argparse.ArgumentParser(prog="lojax", description="Low-rank adapters as files.")
    choices = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    modules = {name: importlib.import_module(path) for name, path in COMMANDS.items()}
    for name, module in modules.items():
        example = f"example:\n  {module.EXAMPLE}"
        module.configure(
            choices.add_parser(
                name,
                help=module.SUMMARY,
                description=module.__doc__,
                epilog=example,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    args = parser.parse_args(argv)
    try:
        modules[args.command].run(args)
    except (OSError, ValueError) as error:
        text = "\n".join(printable(line, 2000) for line in str(error).split("\n"))
        print(f"lojax {args.command}: {text}", file=sys.stderr)
        return 1
    return 0
