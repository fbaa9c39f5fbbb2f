"""A progress bar where tqdm is installed and somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable


def watcher(label: str) -> Callable[[Iterable[str]], Iterable[str]]:
    """Wraps an iteration in a bar, or leaves it as it is."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter
    return lambda items: tqdm(items, desc=label, unit=" tensors", disable=not sys.stderr.isatty())
