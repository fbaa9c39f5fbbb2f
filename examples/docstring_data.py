"""The default task, without a download: which package is this docstring from?

Every machine that can run the examples has thousands of labelled texts on its disk. Sources are parsed, never imported,
so the rows depend only on the installed versions. Three rules keep the task honest:

* the packages' names (``scipy``, ``plt``, ``np``, ...) are removed from the text;
* training and test rows come from different modules (files), by a hash of the module's name;
* repeated texts count once, texts of two packages and test rows that share most of their wording with training rows not
  at all.
"""

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# Label: the names that would reveal it. "python" is the standard library.
PACKAGES = {
    "jax": ("jax", "jaxlib", "jnp"),
    "matplotlib": ("matplotlib", "mpl", "pyplot", "plt", "pylab"),
    "orbax": ("orbax", "ocp"),
    "python": ("python", "cpython"),
    "scipy": ("scipy", "sp"),
}
_RELATED = ("flax", "linen", "nnx", "numpy", "np", "optax")  # not labels, but hints

_REMOVED = [*(name for names in PACKAGES.values() for name in names), *_RELATED]
_LONG = "|".join(name for name in _REMOVED if len(name) > 3)
_SHORT = "|".join(name for name in _REMOVED if len(name) <= 3)
_NAMES = re.compile(rf"\w*(?:{_LONG})\w*|\b(?:{_SHORT})\b", re.IGNORECASE)
_SKIPPED = {"test", "tests", "testing", "_vendor", "site-packages", "dist-packages", "lib2to3"}
_RUN = 5  # this many equal words in a row count as the same wording


class Row(NamedTuple):
    """One text, its label, and the module it was read from."""

    text: str
    label: str
    module: str


def clean(text: str) -> str:
    """Removes the packages' names from a text and collapses its white space.

    Args:
        text: A docstring.

    Returns:
        The text on one line.

    Example:
        >>> clean("Like numpy.add,\\n but for `jnp` arrays.")
        'Like .add, but for `` arrays.'
    """
    return " ".join(_NAMES.sub("", text).split())


def rows_of(label: str, file: Path, module: str, *, min_words: int = 20) -> Iterator[Row]:
    """Yields the docstrings of a file's classes and functions, outermost first.

    Args:
        label: The package.
        file: A Python source; one that cannot be read or parsed yields nothing.
        module: Its dotted name.
        min_words: Shorter texts are skipped.

    Yields:
        Rows with cleaned text.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = clean(ast.get_docstring(node) or "")
            if len(text.split()) >= min_words:
                yield Row(text, label, module)


def load(*, train_per_class: int = 800, test_per_class: int = 300, per_module: int = 20) -> tuple[list[Row], list[Row]]:
    """The docstrings of the installed packages, split by module.

    Args:
        train_per_class: The most training rows of a package.
        test_per_class: The most test rows of a package.
        per_module: The most rows of a module, so that no large file dominates its package.

    Returns:
        ``(train, test)``, in an order that depends only on the installed versions.

    Raises:
        ValueError: Fewer than two of the packages are installed.
    """
    folders = {label: folder for label in PACKAGES if (folder := _folder(label))}
    if len(folders) < 2:
        raise ValueError(
            f"The docstring task needs two or more of {', '.join(PACKAGES)}; "
            f"found {', '.join(folders) or 'none'}. Install them, or pass --data FILE."
        )
    train, test = [], []
    for label, folder in folders.items():
        modules = _modules(label, folder)
        for split, size, for_test in ((train, train_per_class, False), (test, test_per_class, True)):
            split_modules = [item for item in modules if in_test(item[0]) is for_test]
            rows = (row for module, file in split_modules for row in islice(rows_of(label, file, module), per_module))
            split += islice(rows, size + size // 4)  # some are dropped below
    rows = _deduplicate(train + test)
    train = _at_most(train_per_class, [row for row in rows if not in_test(row.module)])
    test = [row for row in rows if in_test(row.module)]
    return train, _at_most(test_per_class, without_near_copies(test, train))


def in_test(module: str) -> bool:
    """Whether a module is one of the test modules: about one in three, by a hash of its name."""
    return _digest(module)[0] < 85


def without_near_copies(test: list[Row], train: list[Row]) -> list[Row]:
    """Drops the test rows that share at least half of their wording with training rows.

    Args:
        test: The candidates.
        train: The training rows.

    Returns:
        The rows of `test` with fewer than half of their five-word runs anywhere in `train`.
    """
    train_runs = {run for row in train for run in _runs(row.text)}

    def is_new(row: Row) -> bool:
        runs = _runs(row.text)
        return 2 * sum(run in train_runs for run in runs) < len(runs)

    return [row for row in test if is_new(row)]


def _modules(label: str, root: Path) -> list[tuple[str, Path]]:
    """``(module, file)`` of a package without its tests, in a fixed pseudo-random order."""
    modules = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED]
        parts = (label, *Path(folder).relative_to(root).parts)
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and not (stem.startswith("test_") or stem.endswith("_test")):
                modules.append((".".join((*parts, stem)), Path(folder, name)))
    return sorted(modules, key=lambda item: _digest(item[0])[1:])


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _at_most(count: int, rows: list[Row]) -> list[Row]:
    """The first `count` rows of each label."""
    counts = Counter()
    first = []
    for row in rows:
        counts[row.label] += 1
        if counts[row.label] <= count:
            first.append(row)
    return first


def _runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))]


def _deduplicate(rows: list[Row]) -> list[Row]:
    """The rows without repeated texts, and without texts that have two labels."""
    labels = defaultdict(set)
    for row in rows:
        labels[row.text.lower()].add(row.label)
    first_rows: dict[str, Row] = {}
    for row in rows:
        first_rows.setdefault(row.text.lower(), row)
    return [row for text, row in first_rows.items() if len(labels[text]) == 1]


def _folder(label: str) -> Path | None:
    """The folder where a package is installed. Nothing is imported."""
    if label == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(label)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None
