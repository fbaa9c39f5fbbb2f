"""The README does what it says: its Python blocks run, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import jax

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """The Python blocks, each after as many blank lines as stand above it, so that tracebacks count right."""
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in BLOCK.finditer(text)]


def test_the_blocks_are_found_where_they_stand():
    text = "# t\n\n```python\na = 1\n```\n```bash\nrm\n```\n\n```python title\nb = a\nc = b\n```\n"
    assert blocks(text) == ["\n\n\na = 1\n", "\n" * 10 + "b = a\nc = b\n"]


def promised(block: str) -> list[str]:
    """The output that the comments right after a ``print`` promise."""
    lines, found = block.splitlines(), []
    for i, line in enumerate(lines):
        if line.startswith("print("):
            for below in lines[i + 1 :]:
                if not below.startswith("# "):
                    break
                found.append(below.removeprefix("# ").rstrip())
    return found


def test_every_python_block_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    found = blocks(README.read_text())
    assert found, "the README has no Python block"
    assert any(promised(block) for block in found)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"):  # as it is for a user
        for block in found:
            exec(compile(block, str(README), "exec"), namespace)
            assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == promised(block)
