"""Regular expressions from a config, which may be hostile: those that could take hours to match are refused."""

from __future__ import annotations

import math
import re

from lojax.text import printable

UNBOUNDED = 6
"""log2 of the positions at which ``.*`` may end in the name of a module."""
MAX_BITS = 36
"""log2 of the most ways in which a pattern may be tried on one name; no real pattern comes near."""
MAX_PATTERNS = 50_000
"""In one field."""

_TOKEN = re.compile(
    r"""(?P<atom> \\. | \[\^?\]?(?:\\.|[^\]\\])*\] | \(\?\#[^)]*\) | \(\?P=\w+\) | \(\?[aiLmsu]+\) )
      | (?P<flags> \(\?[a-zA-Z]*x )
      | (?P<open> \((?:\?(?:P<\w+>|[:=!>]|<[=!]|[aiLmsu-]+:|\(\w+\)))? )
      | (?P<close> \) )
      | (?P<or> \| )
      | (?P<repeat> (?: [*+?] | \{(?P<low>\d+)?(?P<comma>,)?(?P<high>\d+)?\} ) [?+]? )
      | (?P<other> . )""",
    re.VERBOSE | re.DOTALL,
)


def compile_pattern(template: str, *patterns: str) -> re.Pattern[str]:
    """Compiles ``template``, with an alternation of ``patterns`` for its ``{}``.

    Raises:
        ValueError: One of the patterns is not a regular expression, or could take hours to match.

    >>> compile_pattern(r"(.*\\.)?({})$", "q", "k").pattern
    '(.*\\\\.)?(q|k)$'
    """
    for pattern in patterns:
        if _bits(pattern) > MAX_BITS:
            raise ValueError(
                f"{_quoted(pattern)} could take hours to match. Write it without a repeat around a group that repeats "
                "or chooses, such as (a+)+ or (a|b)*, and with few of .* and the like."
            )
        if ")" in pattern:
            _compile(pattern, pattern)  # "a)(b" is not a pattern, but becomes one inside the template
    joined = "|".join(patterns)
    return _compile(template.format(joined), joined)


def _compile(pattern: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{_quoted(text)} is not a regular expression ({printable(error)}).") from None


def _quoted(pattern: str) -> str:
    return printable(repr(pattern), 100)


class ModulePattern:
    """A key of ``rank_pattern`` or ``alpha_pattern``: PEFT matches it as ``(.*\\.)?({key})$``.

    >>> [ModulePattern(key).matches("layers.1.q") for key in ("q", "1.q", "layer", "^q", "(q|k)")]
    [True, True, False, False, True]
    """

    def __init__(self, key: str) -> None:
        self.key = key
        # most keys are plain names, of which there may be thousands: they need no compilation
        self.compiled = None if _PLAIN.fullmatch(key) else compile_pattern(r"(.*\.)?({})$", key)
        self.last = key.rpartition(".")[2]

    def matches(self, module: str) -> bool:
        """Whether the key is about a torch module."""
        if self.compiled:
            return self.compiled.match(module) is not None
        start = len(module) - len(self.key)
        if start < 0 or not module.endswith(self.last) or (start and module[start - 1] != "."):
            return False
        return all(k in (".", c) for k, c in zip(self.key, module[start:], strict=True))  # a dot matches anything


_PLAIN = re.compile(r"[\w.-]+")


def _bits(pattern: str) -> float:
    """log2 of the ways in which a backtracking matcher may try a pattern; infinite for a repeat within a repeat.

    >>> _bits("layers.[0-9]+.q"), _bits("(a+)+")
    (6, inf)
    """
    # for each open group: the bits of the alternative at hand, the most of those before, and whether there are several
    groups: list[tuple[float, float, bool]] = [(0, 0, False)]
    last, is_choice = 0.0, False  # the bits of what a quantifier would repeat
    for token in _TOKEN.finditer(pattern):
        bits, most, has_choice = groups[-1]
        kind = token.lastgroup if token.lastgroup not in ("low", "comma", "high") else "repeat"
        if kind == "flags":
            return math.inf  # in verbose mode a quantifier may stand apart from what it repeats
        if kind == "open":
            groups.append((0, 0, False))
        elif kind == "or":
            groups[-1] = (0, max(bits, most), True)
        elif kind == "close" and len(groups) > 1:
            groups.pop()
            last, is_choice = max(bits, most), has_choice
            outer, outer_most, outer_choice = groups[-1]
            groups[-1] = (outer + last, outer_most, outer_choice)
            continue
        elif kind == "repeat" and token.group() != "{}":
            low, high = _range(token)
            if high > 1 and (last or is_choice):
                return math.inf
            groups[-1] = (bits + min(UNBOUNDED, math.log2(high - low + 1)), most, has_choice)
        last, is_choice = 0.0, False
    return max(max(bits, most) for bits, most, _ in groups)


def _range(token: re.Match[str]) -> tuple[float, float]:
    """The least and the most times that a quantifier repeats."""
    simple = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}
    if token.group()[0] in simple:
        return simple[token.group()[0]]
    low = float(token["low"] or 0)
    high = low if token["comma"] is None else float(token["high"] or math.inf)
    return low, max(low, high)
