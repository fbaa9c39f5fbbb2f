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
    text = capsys.readouterr().out
    assert module.__doc__.split()[0] in text
    assert f"example:\n  {module.EXAMPLE}\n" in text and module.EXAMPLE.startswith(f"lojax {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_every_subcommand_parses(name, monkeypatch):
    module = importlib.import_module(COMMANDS[name])
    taken = []
    monkeypatch.setattr(module, "run", taken.append)
    assert main(module.EXAMPLE.split()[1:]) == 0
    assert taken


def test_errors_hold_no_terminal_escapes(capsys):
    assert main(["inspect", "\x1b[31mnowhere"]) == 1
    assert "\\x1b[31mnowhere is not a directory" in capsys.readouterr().err


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "lojax", "--help"], check=True, capture_output=True, text=True)
    assert all(name in done.stdout for name in COMMANDS)
