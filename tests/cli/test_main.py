"""The registry of subcommands."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from lojax.cli.main import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_offers_what_main_needs(name, capsys):
    module = importlib.import_module(COMMANDS[name])
    assert module.SUMMARY and callable(module.configure) and callable(module.run)
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert module.__doc__.split()[0] in capsys.readouterr().out


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "lojax", "--help"], check=True, capture_output=True, text=True)
    assert all(name in done.stdout for name in COMMANDS)
