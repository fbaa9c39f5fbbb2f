"""Pieces of text that errors and tables share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np


def suggest(name: object, known: Iterable[str]) -> str:
    """A hint with the name closest to a misspelled one, or nothing where none is close.

    >>> suggest("kaimin", ["gaussian", "kaiming"])
    " Did you mean 'kaiming'?"
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_flags(**flags: object) -> None:
    """Raises unless every value is True or False: any other is most likely an argument in the wrong place.

    >>> check_flags(donate="no")
    Traceback (most recent call last):
        ...
    TypeError: donate='no'; expected True or False.
    """
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name}={value!r}; expected True or False.")


def spec(x: Any) -> str:
    """The dtype and shape of an array, as JAX prints them.

    >>> import numpy as np
    >>> spec(np.zeros((2, 3), np.float32))
    'float32[2,3]'
    """
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def printable(text: object, limit: int = 200) -> str:
    """Text out of a file, safe to print: control characters are escaped, and the end of a long one is left out.

    >>> printable("layer\\x1b[31m")
    'layer\\\\x1b[31m'
    """
    whole = str(text)
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole[:limit])
    return safe if len(whole) <= limit else f"{safe}... ({len(whole):,} characters)"
