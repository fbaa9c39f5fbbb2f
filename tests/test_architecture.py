"""The walls of the house: who may import whom, how long things may be, and what must be documented."""

from __future__ import annotations

import ast
import doctest
import graphlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import lojax

ROOT = Path(lojax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(("lojax", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file for file in FILES
}
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}

GROUND = {"compat", "text", "types"}
"""What every part may know: it knows no part."""
ENGINE = {"adapters", "lowrank", "quantized", "rewrite"}
MAY_IMPORT = {
    **{part: set() for part in GROUND},
    "files": set(),
    "quantized": set(),
    "kernels": {"quantized"},
    "adapters": {"quantized"},
    "base": {"adapters", "files", "quantized"},
    "lowrank": {"adapters", "kernels", "quantized"},
    "rewrite": {"adapters", "lowrank", "quantized"},
    "nets": ENGINE,
    "training": ENGINE | {"report"},
    "report": ENGINE,
    "analysis": {"adapters", "lowrank", "quantized", "report"},
    "sharding": {"adapters", "quantized"},
    "checkpoint": {"adapters", "files"},
    "peft": {"adapters", "files"},
}
"""The parts of the package that each part may know, besides the ground."""

FRONT = {"__init__", "__main__", "cli", "planner", "wrap"}
"""The front doors: they may know all, and no other part may know them."""

OPTIONAL = {"equinox", "haiku", "transformers", "torch", "safetensors", "tokenizers", "peft", "matplotlib", "tqdm"}
LATE = OPTIONAL | {"orbax", "jax.experimental.pallas"}
"""What ``import lojax`` does not import."""


def imports(node: ast.AST, package: str) -> set[str]:
    """The absolute names of all modules imported anywhere under ``node``, also inside functions."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            base = package.split(".")[: -child.level + 1 or None] if child.level else []
            module = ".".join([*base, *([child.module] if child.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in child.names}
    return found


def part_of(module: str) -> str:
    """``adapters`` of ``lojax.adapters.trees``; the name of the module itself for one at the top."""
    return module.split(".")[1] if "." in module else "__init__"


def lojax_modules(names: set[str]) -> set[str]:
    """Those of ``names`` that are modules of ours."""
    return names & MODULES.keys()


def test_the_walk_sees_the_package():
    assert {"adapters", "lowrank", "rewrite", "nets", "training", "report", "wrap", "__init__"} <= {
        part_of(name) for name in MODULES
    }
    seen = lojax_modules(imports(TREES["lojax.wrap"], "lojax"))
    assert {"lojax.adapters.rule", "lojax.lowrank.merge", "lojax.rewrite.transform"} <= seen


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    part = part_of(module)
    if part in FRONT:
        return
    assert part in MAY_IMPORT, f"{module} is in no known part: say in MAY_IMPORT what it stands on"
    parts = {part_of(name) for name in lojax_modules(imports(TREES[module], module.rpartition(".")[0])) - {"lojax"}}
    allowed = MAY_IMPORT[part] | {part} | GROUND
    assert parts <= allowed, f"{module} imports {sorted(parts - allowed)}; {part} may know {sorted(allowed)} only"


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions and for the type checker count as well."""
    graph = {}
    for name, tree in TREES.items():
        # `from lojax.room import module` names the room as well: its door is no dependency of those who live in it
        graph[name] = lojax_modules(imports(tree, name.rpartition(".")[0])) - {name, "lojax", name.rpartition(".")[0]}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("lojax.adapters.axes") < order.index("lojax.lowrank.value") < order.index("lojax.wrap")


PROGRAM_WORDS = {"Jaxpr", "JaxprEqn", "ClosedJaxpr", "Eqn", "Var", "make_jaxpr", "eqns", "invars", "outvars", "eqn"}
"""What only the rewriting of programs speaks of."""
MATHS = {"dot_general", "matmul", "einsum", "dot", "tensordot", "conv_general_dilated", "ragged_dot_general"}
"""What only the maths of a low-rank weight calls, as an attribute of `jnp` or `lax`."""


def words(tree):
    """Every name, attribute and imported name in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.name


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) == "lowrank"])
def test_the_maths_knows_no_programs(module):
    assert not PROGRAM_WORDS & set(words(TREES[module]))


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) == "kernels"])
def test_the_kernels_know_neither_programs_nor_adapters(module):
    assert not (PROGRAM_WORDS | {"Adapter", "LowRank", "NamedArray"}) & set(words(TREES[module]))


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) == "rewrite"])
def test_the_rewriting_knows_no_maths(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("jnp", "lax"):
            assert node.attr not in MATHS, f"{module} calls {node.value.id}.{node.attr}"
        assert not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult))


@pytest.mark.parametrize("module", MODULES)
def test_only_public_jax(module):
    private = {name for name in imports(TREES[module], module) if any(part == "_src" for part in name.split("."))}
    assert not private
    attributes = {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    assert "_src" not in attributes


@pytest.mark.parametrize("module", MODULES)
def test_no_file_above_450_lines_and_no_function_body_above_60(module):
    assert len(MODULES[module].read_text().splitlines()) <= 450
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"the body of {node.name} has {length} lines"


MOST_ANY = 0.10
"""The largest share of the arguments of functions that may be annotated with a bare `Any`."""
LEAST_COMMENTS = dict.fromkeys(("kernels", "lowrank", "rewrite", "checkpoint", "files", "sharding"), 0.05)
"""The least share of lines with a comment in the rooms whose code is full of tricks."""


def argument_annotations(tree: ast.Module) -> list[str]:
    """The annotations of the arguments of all functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            args = node.args
            every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            found += [ast.unparse(arg.annotation) for arg in every if arg is not None and arg.annotation is not None]
    return found


def test_types_say_something():
    annotations = [annotation for tree in TREES.values() for annotation in argument_annotations(tree)]
    share = annotations.count("Any") / len(annotations)
    assert share <= MOST_ANY, f"{share:.1%} of the arguments are Any: see lojax/types.py for better names"


def comment_and_code_lines(file: Path) -> tuple[int, int]:
    """How many lines hold a comment (orders to tools aside), and how many hold code (docstrings aside)."""
    text = file.read_text()
    comments, code, docstrings = set(), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    for token in tokenize.tokenize(io.BytesIO(text.encode()).readline):
        if token.type == tokenize.COMMENT:
            if not token.string.startswith(("# type:", "# noqa", "# pyright:")):
                comments.add(token.start[0])
        elif token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(comments), len(code - docstrings)


@pytest.mark.parametrize("part", LEAST_COMMENTS)
def test_tricks_have_comments_beside_them(part):
    counts = [comment_and_code_lines(file) for name, file in MODULES.items() if part_of(name) == part]
    comments, code = map(sum, zip(*counts, strict=True))
    assert comments >= LEAST_COMMENTS[part] * code, f"{part}: {comments} comments on {code} lines of code"


def test_importing_lojax_loads_no_optional_dependency():
    script = f"import sys, lojax; print(sorted({LATE!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if part_of(m) in ("adapters", "lowrank", "rewrite", "wrap", "__init__")]
)
def test_the_core_names_no_optional_dependency_at_all(module):
    assert not {name.split(".")[0] for name in imports(TREES[module], module)} & OPTIONAL


# --- documentation ---


def doctest_examples(function):
    """The examples in the docstring of a function."""
    return doctest.DocTestFinder(recurse=False).find(function)[0].examples


def public():
    """Every public name with its object."""
    return {name: getattr(lojax, name) for name in lojax.__all__}


def test_the_public_names_are_sorted_and_exist():
    assert lojax.__all__ == sorted(set(lojax.__all__))
    assert all(hasattr(lojax, name) for name in lojax.__all__)
    assert {"wrap", "transform", "init", "merge", "unmerge", "optimizer", "summary", "Rule"} <= set(lojax.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_opens_with_its_idea(module):
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("name", [name for name, value in public().items() if inspect.isfunction(value)])
def test_a_public_function_documents_every_argument_its_result_and_an_example(name):
    function = getattr(lojax, name)
    text = inspect.getdoc(function)
    assert text
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in text, f"{name}: {parameter} is not under Args"
    assert "Returns:" in text
    examples = [e.source for f in public().values() if inspect.isfunction(f) for e in doctest_examples(f)]
    assert any(re.search(rf"\b{name}\(", example) for example in examples), f"no example shows {name}"


@pytest.mark.parametrize("name", [name for name, value in public().items() if inspect.isclass(value)])
def test_a_public_class_documents_every_public_member(name):
    cls = getattr(lojax, name)
    assert inspect.getdoc(cls)
    for member, value in vars(cls).items():
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize("name", [name for name, value in public().items() if callable(value)])
def test_every_public_signature_is_annotated(name):
    for parameter in inspect.signature(getattr(lojax, name)).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"
