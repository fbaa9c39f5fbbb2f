"""How a rule enters its table."""

from __future__ import annotations

from collections.abc import Callable

from lojax.rewrite.interpreter import EquationRule

Table = dict[str, EquationRule]
"""The rules of some primitives, by name."""


def registrar(table: Table) -> Callable[..., Callable[[EquationRule], EquationRule]]:
    """A decorator factory: ``@rule("name", ...)`` makes a function the rule of these primitives in ``table``."""

    def rule(*names: str) -> Callable[[EquationRule], EquationRule]:
        def register(f: EquationRule) -> EquationRule:
            table.update(dict.fromkeys(names, f))
            return f

        return register

    return rule
