"""One line of configuration: which weights, and how they are adapted."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

Target = str | re.Pattern[str] | Callable[[str, Any], bool]
"""A glob (``**/`` crosses levels), a compiled regex (full match), or a predicate (path, leaf)."""

SCALINGS = {"standard": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / math.sqrt(rank)}
"""How alpha and rank give the scale: Hu et al. 2021 §4.1, and rsLoRA, Kalajdzievski 2023, eq. 2."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the weights that ``targets`` match are adapted. ``None`` takes the default of `lojax.wrap`.

    Attributes:
        targets: A glob, a compiled regex, a predicate ``(path, leaf) -> bool``, or several of them.
        rank: The rank ``r`` of the update, from 1 to min(m, n).
        alpha: The numerator of the scale; ``None`` everywhere means ``alpha = rank``.
        scaling: ``"standard"`` (``alpha / r``) or ``"rslora"`` (``alpha / sqrt(r)``).
        init: How ``a`` starts: ``"kaiming"`` (uniform, PEFT's default), ``"gaussian"`` (std ``1/r``),
            or a function ``(key, shape, dtype, *, fan_in, rank) -> array``. ``b`` starts at zero.
        dropout: The rate of dropout on the adapter's input, in ``[0, 1)``.
        variant: The member of the LoRA family; ``"lora"``.
        train: ``"lora"`` trains an adapter, ``"full"`` the parameter itself, ``"none"`` freezes it.
        axes: The role of each axis, where inference from use is not wanted.
        dtype: The dtype of the adapter; ``None`` means float32.

    >>> Rule("**/query/kernel", rank=4)
    Rule('**/query/kernel', rank=4)
    """

    targets: Target | Sequence[Target]
    rank: int | None = None
    alpha: float | None = None
    scaling: str | None = None
    init: str | Callable[..., Any] | None = None
    dropout: float | None = None
    variant: str | None = None
    train: Literal["lora", "full", "none"] = "lora"
    axes: Sequence[str] | None = None
    dtype: Any = None

    def __repr__(self) -> str:
        changed = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)[1:]
            if getattr(self, f.name) != f.default
        )
        return f"Rule({', '.join([repr(self.targets), *changed])})"

    def filled(self, defaults: Rule) -> Rule:
        """This rule with every ``None`` replaced by the value in ``defaults``."""
        fields = [f.name for f in dataclasses.fields(self) if f.name not in ("targets", "train")]
        missing = {name: getattr(defaults, name) for name in fields if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    @property
    def scale(self) -> float:
        """The factor on the update."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(SCALINGS[self.scaling or "standard"](alpha, self.rank))


def as_rules(targets: Any, defaults: Rule) -> list[Rule]:
    """The rules that ``targets`` (a target, a `Rule`, or a sequence of these) spell."""
    if targets is None:
        return []
    single = isinstance(targets, (str, re.Pattern, Rule)) or callable(targets)
    entries = [targets] if single else list(targets)
    rules = [entry if isinstance(entry, Rule) else dataclasses.replace(defaults, targets=entry) for entry in entries]
    return [_checked(rule.filled(defaults)) for rule in rules]


def _checked(rule: Rule) -> Rule:
    if rule.train not in ("lora", "full", "none"):
        raise ValueError(f"{rule}: train={rule.train!r}; expected 'lora', 'full' or 'none'.")
    if rule.train != "lora":
        return rule
    if not isinstance(rule.rank, int) or isinstance(rule.rank, bool) or rule.rank < 1:
        raise ValueError(f"{rule}: rank={rule.rank!r}; expected an integer of at least 1.")
    if rule.scaling not in SCALINGS:
        raise ValueError(f"{rule}: scaling={rule.scaling!r}; expected one of {sorted(SCALINGS)}.")
    if rule.variant != "lora":
        raise ValueError(f"{rule}: variant={rule.variant!r}; expected 'lora'.")
    if not 0 <= (rule.dropout or 0.0) < 1:
        raise ValueError(f"{rule}: dropout={rule.dropout!r}; expected a rate in [0, 1).")
    return rule
