"""One line of configuration: which weights, and how they are adapted."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, ParamSpec, TypeGuard, TypeVar

import jax.numpy as jnp

from lojax.adapters.axes import check_roles
from lojax.adapters.initializers import DrawA, initializer
from lojax.quantized.formats import KINDS
from lojax.text import suggest
from lojax.types import Dtype, Leaf, Path

P = ParamSpec("P")
T = TypeVar("T")

Target = str | re.Pattern[str] | Callable[[Path, Leaf], bool]
"""A glob (``**/`` crosses levels, ``{a,b}`` is either), a compiled regex (full match), or a predicate (path, leaf)."""

VARIANTS = ("lora", "dora", "lora-fa")
"""The members of the family that a rule can ask for; see `lojax.Adapter` for what each one holds."""

SCALINGS = {"standard": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / math.sqrt(rank)}
"""How alpha and rank give the scale: Hu et al. 2021 §4.1, and rsLoRA, Kalajdzievski 2023, eq. 2."""


SYNONYMS = {
    "r": "rank=",
    "lora_alpha": "alpha=",
    "lora_dropout": "dropout=",
    "target_modules": "targets=",
    "modules_to_save": "train=",
    "exclude_modules": "exclude=",
    "init_lora_weights": "init=",
    "layers_to_transform": "layers=",
    "use_rslora": 'scaling="rslora"',
    "use_dora": 'variant="dora"',
    "loftq_config": 'init="loftq"',
}
"""What PEFT calls our settings."""


def explain_unknown_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, with an error for an unknown keyword that names the argument that was meant.

    Where it takes ``**settings``, those are the settings of a `Rule`.
    """
    parameters = inspect.signature(function).parameters
    known = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known |= {field.name for field in dataclasses.fields(Rule)}

    spellings = sorted(f"{name}=" for name in known if not name.startswith("_"))

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                ours = SYNONYMS.get(name, "").partition("=")[0] in known
                hint = f" Did you mean {SYNONYMS[name]!r}?" if ours else suggest(name, spellings) or _rule_hint(name)
                raise TypeError(f"{function.__qualname__.removesuffix('.__init__')} has no argument {name!r}.{hint}")
        return function(*args, **kwargs)

    return checked


def _rule_hint(name: str) -> str:
    settings = {field.name for field in dataclasses.fields(Rule) if field.repr}
    return f" It is a setting of a rule: targets=lojax.Rule(..., {name}=...)." if name in settings else ""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the weights that ``targets`` match are adapted. ``None`` takes the default of `lojax.wrap`.

    Attributes:
        targets: A glob, a compiled regex, a predicate ``(path, leaf) -> bool``, or several of them.
        rank: The rank ``r`` of the update, at least 1; or, for a weight with a stack axis (scanned layers, experts),
            one rank for each entry of the stack, 0 for none. Above min(m, n) it is lowered to that, with the scale as
            asked, unless the rule gives it to a single weight: that is an error.
        alpha: The numerator of the scale; ``None`` everywhere means ``alpha = rank``.
        scaling: ``"standard"`` (``alpha / r``) or ``"rslora"`` (``alpha / sqrt(r)``).
        init: How the adapter starts. ``"kaiming"`` (uniform, PEFT's default), ``"gaussian"`` (std ``1/r``), or a
            function ``(key, shape, dtype, *, fan_in, rank) -> array`` give ``a``, and ``b`` is zero.
            ``"orthogonal"``, ``"pissa"``, ``"pissa_niter_<steps>"``, ``"olora"`` and ``"milora"`` give both (see
            `lojax.adapters.initializers`); all but the first take ``scale * a @ b`` out of the frozen weight.
            ``"loftq"`` and ``"loftq_niter_<steps>"`` need ``base``: they choose the quantized weight and the update
            such that the sum is near to the weight (see `lojax.adapters.loftq`).
        dropout: The rate of dropout on the adapter's input, in ``[0, 1)``.
        variant: The member of the LoRA family: ``"lora"``, ``"dora"`` or ``"lora-fa"``.
        train: ``"lora"`` trains an adapter, ``"full"`` the parameter itself, ``"tokens"`` chosen rows of an
            embedding, ``"none"`` freezes it.
        axes: The role of each axis, where inference from use is not wanted.
        dtype: The dtype of the adapter; ``None`` means float32. A DoRA magnitude is float32 or wider.
        layers: Only these layers: the first number that a part of the path ends in (``layer_3``, ``h/3``), or the
            entries of the stack axis of a scanned weight.
        tokens: The rows of an embedding to train, alone (``train="tokens"``) or beside its adapter.
        base: A kind of `lojax.quantize`, such as ``"nf4"``: the frozen weight is quantized, after the start took its
            part out of it. ``None`` leaves it as it is.

    >>> Rule("**/query/kernel", rank=4)
    Rule('**/query/kernel', rank=4)
    """

    targets: Target | Sequence[Target]
    rank: int | Sequence[int] | None = None
    alpha: float | None = None
    scaling: str | None = None
    init: str | DrawA | None = None
    dropout: float | None = None
    variant: str | None = None
    train: Literal["lora", "full", "tokens", "none"] = "lora"
    axes: Sequence[str] | None = None
    dtype: Dtype | None = None
    layers: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    base: str | None = None
    _exact_rank: bool = dataclasses.field(default=False, repr=False, compare=False)  # no rank but this one will do

    def __post_init__(self) -> None:
        if isinstance(self.targets, Iterator):  # a generator can be read once, and `init` may be called twice
            object.__setattr__(self, "targets", tuple(self.targets))
        for target in as_targets(self.targets):
            if isinstance(target, Rule):
                raise TypeError(
                    f"{target} is a target of another Rule. Put the rules side by side: targets=[Rule(...), ...]."
                )

    def __repr__(self) -> str:
        changed = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)[1:]
            if f.repr and getattr(self, f.name) != f.default
        )
        return f"Rule({', '.join([repr(self.targets), *changed])})"

    def fill(self, defaults: Rule) -> Rule:
        """This rule with every ``None`` replaced by the value in ``defaults``."""
        fields = [f.name for f in dataclasses.fields(self) if f.name not in ("targets", "train")]
        missing = {name: getattr(defaults, name) for name in fields if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def scale(self, rank: int) -> float:
        """The factor on an update of this rank; 1 for rank 0."""
        alpha = rank if self.alpha is None else self.alpha
        return float(SCALINGS[str(self.scaling or DEFAULTS.scaling)](alpha, rank)) if rank else 1.0


Rule.__init__ = explain_unknown_arguments(Rule.__init__)


def as_targets(targets: object) -> list[Any]:
    """One target or `Rule`, or a sequence of them, as a list."""
    if _is_target(targets):
        return [targets]
    entries = list(targets) if isinstance(targets, Iterable) else [targets]
    for entry in entries:
        if not _is_target(entry):
            raise TypeError(
                "A target is a glob, a compiled regex, a predicate (path, leaf) -> bool, or a lojax.Rule; "
                f"got {entry!r}."
            )
    return entries


def _is_target(entry: object) -> bool:
    return isinstance(entry, (str, re.Pattern, Rule)) or callable(entry)


DEFAULTS = Rule((), rank=8, scaling="standard", init="kaiming", dropout=0.0, variant="lora")
"""What a rule says that says nothing. ``alpha=None`` means ``alpha = rank``, and ``dtype=None`` float32."""


def as_rules(targets: object, defaults: Rule) -> list[Rule]:
    """The rules that ``targets`` (a target, a `Rule`, or a sequence of these) spell.

    Args:
        targets: None for no rule.
        defaults: The rule of a target that is not a `Rule`, and the settings that a `Rule` leaves open.

    Raises:
        TypeError: An entry is not a target.
        ValueError: A setting is out of range, or a rule that trains an adapter stands where
            ``defaults`` does not.
    """
    rules = []
    for entry in [] if targets is None else as_targets(targets):
        if not isinstance(entry, Rule):
            entry = dataclasses.replace(defaults, targets=entry)
        elif entry.train == "lora" != defaults.train:
            raise ValueError(f"{entry} trains an adapter: its place is in targets=, not in train= or exclude=.")
        else:
            entry = dataclasses.replace(entry, _exact_rank=entry.rank is not None)
        if not as_targets(entry.targets):
            raise ValueError(f"{entry} has no targets. Give a glob, a regex or a predicate.")
        rules.append(_check(entry.fill(defaults)))
    return rules


def _check(rule: Rule) -> Rule:
    """``rule`` with its integers as tuples of `int`, or an error that names the setting that is out of range."""
    if rule.train not in ("lora", "full", "tokens", "none"):
        raise ValueError(f"{rule}: train={rule.train!r}; expected 'lora', 'full', 'tokens' or 'none'.")
    if rule.layers is not None:
        rule = dataclasses.replace(rule, layers=_indices(rule, "layers"))
    if rule.tokens is not None:
        rule = dataclasses.replace(rule, tokens=_indices(rule, "tokens"))
    if rule.train == "tokens" and not rule.tokens:
        raise ValueError(f"{rule}: train='tokens' needs tokens=, the rows of the embedding to train.")
    if rule.tokens and rule.train not in ("lora", "tokens"):
        raise ValueError(f"{rule}: tokens= has no meaning with train={rule.train!r}.")
    if rule.train not in ("lora", "tokens"):
        return rule
    if not _is_floating(rule.dtype or jnp.float32):
        text = f"{rule}: dtype={rule.dtype!r}; expected a real floating-point dtype, or None for float32."
        raise ValueError(text + _suggest_dtype(rule.dtype))
    if rule.base is not None and rule.base not in KINDS:
        hint = suggest(str(rule.base).lower(), KINDS)
        raise ValueError(f"{rule}: base={rule.base!r}; expected one of {', '.join(KINDS)}, or None.{hint}")
    if rule.axes is not None:
        rule = dataclasses.replace(rule, axes=check_roles(rule.axes, str(rule)))
    return rule if rule.train == "tokens" else _check_update(rule)


def _check_update(rule: Rule) -> Rule:
    by_entry = isinstance(rule.rank, Sequence) and not isinstance(rule.rank, str)
    ranks: Sequence[Any] = rule.rank if by_entry else [rule.rank]  # type: ignore[assignment]
    lowest = 0 if by_entry else 1
    if not all(is_integer(r) and r >= lowest for r in ranks) or not any(ranks):
        each = " for some entry of the stack, and 0 for one without an adapter" if by_entry else ""
        raise ValueError(f"{rule}: rank={rule.rank!r}; expected an integer of at least 1{each}.")
    if rule.alpha is not None and not (is_finite(rule.alpha) and rule.alpha > 0):
        raise ValueError(f"{rule}: alpha={rule.alpha!r}; expected a finite number above 0, or None for alpha = rank.")
    if rule.scaling not in SCALINGS:
        raise ValueError(f"{rule}: scaling={rule.scaling!r}; expected one of {sorted(SCALINGS)}.")
    if rule.variant not in VARIANTS:
        hint = suggest(str(rule.variant).lower(), VARIANTS)
        raise ValueError(f"{rule}: variant={rule.variant!r}; expected one of {', '.join(VARIANTS)}.{hint}")
    if rule.variant == "dora" and rule.tokens:
        raise ValueError(f"{rule}: DoRA rescales the columns of the weight, so it does not go with tokens=.")
    if not (is_finite(rule.dropout) and 0 <= rule.dropout < 1):
        raise ValueError(f"{rule}: dropout={rule.dropout!r}; expected a rate in [0, 1).")
    initializer(rule.init)  # raises if it is unknown
    if rule.base is None and str(rule.init).startswith("loftq"):
        raise ValueError(
            f"{rule}: init={rule.init!r} makes a quantized weight and an adapter of each weight, and base= does not "
            'say how to quantize it. Give base="nf4", or another kind of lojax.quantize.'
        )
    return dataclasses.replace(rule, rank=tuple(map(int, ranks)) if by_entry else int(ranks[0]))


def _indices(rule: Rule, field: str) -> tuple[int, ...]:
    value = getattr(rule, field)
    value = (
        value.tolist() if hasattr(value, "tolist") else value
    )  # an array, whose entries JAX does not count as numbers
    if not isinstance(value, Iterable):
        raise TypeError(f"{rule}: {field}={value!r}; expected several integers, such as {field}=[{value}].")
    indices = tuple(value)
    if not indices or not all(is_integer(i) and i >= 0 for i in indices):
        raise ValueError(f"{rule}: {field}={indices!r}; expected integers of at least 0.")
    repeated = sorted(i for i, count in collections.Counter(indices).items() if count > 1)
    if repeated:
        raise ValueError(f"{rule}: {field} names {repeated[0]} more than once. Name each once.")
    return tuple(int(i) for i in indices)


def _is_floating(dtype: Dtype) -> bool:
    try:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 8  # NumPy reads "f16" as 128 bits
    except TypeError:
        return False


def _suggest_dtype(dtype: Dtype | None) -> str:
    spelled = re.fullmatch(r"(b?)(?:float|fp|f)(\d+)", str(dtype).lower())
    name = f"{spelled[1]}float{spelled[2]}" if spelled else str(dtype)
    return suggest(name, ("bfloat16", "float16", "float32", "float64")) if isinstance(dtype, str) else ""


def is_integer(number: object) -> TypeGuard[int]:
    """Whether ``number`` is an integer, Python's or NumPy's. True is none."""
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def is_finite(number: object) -> TypeGuard[float]:
    """Whether ``number`` is a real number, neither infinite nor NaN. True is none."""
    return isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
