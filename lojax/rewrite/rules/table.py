"""Tables of rules, and the decorator that adds a rule to one."""

from __future__ import annotations

from collections.abc import Callable

from lojax.rewrite.interpreter import EquationRule

Table = dict[str, EquationRule]
"""The rules of some primitives, by name."""


def registrar(table: Table) -> Callable[..., Callable[[EquationRule], EquationRule]]:
    """A decorator ``@rule("name", ...)`` that adds a function to ``table`` as the rule of the named primitives."""

    def rule(*names: str) -> Callable[[EquationRule], EquationRule]:
        def register(f: EquationRule) -> EquationRule:
            table.update(dict.fromkeys(names, f))
            return f

        return register

    return rule
