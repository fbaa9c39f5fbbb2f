"""The keys of ``adapter_model.safetensors``: what each one is, and which torch parameter it is about."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from lojax.files import safetensors
from lojax.peft.config import Config
from lojax.peft.extras import EXTRAS, Extra
from lojax.peft.factors import torch_shapes
from lojax.peft.name_map import TorchParameter
from lojax.text import printable
from lojax.types import Shape

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG_RECORD = "lojax_config"
"""The metadata key of a copy of the config fields that decide the computation, so that a changed digit is noticed."""
WRAPPER = ".base_layer"
"""What PEFT puts between a module and its parameters when it wraps the module."""

FACTORS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
"""The suffix of a factor's key: which factor it is, and whether it is one of an embedding."""

UNSUPPORTED = {
    ".lora_B.bias": "a bias on B (lora_bias)",
    ".lora_diag": "KaSA singular values",
    ".lora_diag.weight": "KaSA singular values",
}


MAX_LENGTH = 1000
"""Of a key. No real key is longer, and the patterns of the config are matched against what keys name."""

Shapes = tuple[Shape, Shape]
"""Of A and B."""
Place = TypeVar("Place")
Member = TypeVar("Member")


@dataclasses.dataclass(frozen=True)
class FactorPair:
    """The keys of the factors of one module; ``depth`` counts the wrappers around that pair."""

    module: str
    depth: int
    is_embedding: bool
    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class ExtraKey:
    """The key of a tensor besides the factors of a module."""

    key: str
    module: str
    extra: Extra


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a file by what they are.

    Attributes:
        pairs: Those of factors that have a partner.
        extras: Those of tensors besides the factors.
        full: The keys of parameters saved in full, by the name of the parameter.
        unexpected: All other keys, and what is wrong with each.
    """

    pairs: list[FactorPair]
    extras: list[ExtraKey]
    full: dict[str, str]
    unexpected: dict[str, str]


def read_keys(file: safetensors.File, has_module: Callable[[str], bool] = lambda module: True) -> Keys:
    """The keys of a file, without the copies that PEFT makes of the token rows of tied modules.

    Args:
        file: The weights of an adapter.
        has_module: Whether the base has a torch module.

    Raises:
        ValueError: A key belongs to a feature that lojax does not compute.
    """
    keys = Keys([], [], {}, {})
    factors: dict[tuple[str, int, bool], dict[str, str]] = {}
    extras: dict[tuple[str, str], ExtraKey] = {}
    for key, entry in file.entries.items():
        name = key.removeprefix(PREFIX)
        for suffix, feature in UNSUPPORTED.items():
            if name.endswith(suffix):
                raise ValueError(f"{file.path}: {printable(key)} holds {feature}, which lojax does not support.")
        factor = next((suffix for suffix in FACTORS if name.endswith(suffix)), None)
        extra = next((e for e in EXTRAS if name.endswith((e.suffix, f"{e.suffix}.weight"))), None)
        if name == key or len(key) > MAX_LENGTH:
            keys.unexpected[key] = "is not a key of PEFT"
        elif (factor or extra) and entry.dtype.kind not in "fV":  # bfloat16 and float8 are of kind V
            keys.unexpected[key] = f"holds {entry.dtype}, not floating-point numbers"
        elif factor:
            module, depth = _unwrap(name.removesuffix(factor))
            side, is_embedding = FACTORS[factor]
            factors.setdefault((module, depth, is_embedding), {})[side] = key
        elif extra:
            module = name.removesuffix(".weight").removesuffix(extra.suffix)
            _put(extras, (module, extra.field), ExtraKey(key, module, extra), key, keys.unexpected)
        else:
            for inserted in (".token_adapter.base_layer.", f"{WRAPPER}.", ".modules_to_save."):
                name = name.replace(inserted, ".")
            _put(keys.full, name, key, key, keys.unexpected)
    keys.extras.extend(extras.values())
    for place, sides in factors.items():
        if len(sides) == 2:
            keys.pairs.append(FactorPair(*place, sides["A"], sides["B"]))
        for side, key in sides.items() if len(sides) == 1 else ():
            keys.unexpected[key] = f"has no lora_{'B' if side == 'A' else 'A'} beside it"
    _drop_tied_copies(keys, file, has_module)
    return keys


def _put(members: dict[Place, Member], place: Place, member: Member, key: str, unexpected: dict[str, str]) -> None:
    """Puts a member into its place, which PEFT spells in several ways: a second key for it is unexpected."""
    if place in members:
        unexpected[key] = "is the second tensor for one place"
    else:
        members[place] = member


def _unwrap(name: str) -> tuple[str, int]:
    """A module without its wrappers, and their number."""
    end, depth = len(name), 0
    while name.endswith(WRAPPER, 0, end) and end > len(WRAPPER):
        end, depth = end - len(WRAPPER), depth + 1
    return name[:end], depth


def _drop_tied_copies(keys: Keys, file: safetensors.File, has_module: Callable[[str], bool]) -> None:
    """Drops what PEFT saved once more under the name of a module that is tied to another, which the base lacks."""
    rows = [key for key in keys.extras if key.extra.field == "rows"]
    originals = {file.read(key.key).tobytes() for key in rows if has_module(key.module)}
    copies = {k.key: k.module for k in rows if not has_module(k.module) and file.read(k.key).tobytes() in originals}
    keys.extras[:] = [key for key in keys.extras if key.key not in copies]
    for module in copies.values():
        keys.full.pop(f"{module}.weight", None)


def factor_keys(parameter: TorchParameter, depth: int = 0) -> tuple[str, str]:
    """The keys of A and B of a parameter."""
    module = f"{PREFIX}{parameter.module}{WRAPPER * depth}"
    if parameter.kind == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def extra_key(extra: Extra, parameter: TorchParameter) -> str:
    """The key of a tensor besides the factors of a parameter."""
    return f"{PREFIX}{parameter.module}{extra.suffix}"


def match_factors(
    pairs: Iterable[FactorPair],
    weights: Mapping[str, Sequence[TorchParameter]],
    shapes: Mapping[str, Shape],
    config: Config,
) -> tuple[list[tuple[TorchParameter, str, str]], list[str]]:
    """The parameter of each pair of factors, and the keys that fit none.

    Args:
        pairs: Those in the file.
        weights: The weights of each torch module, in the order of the rules.
        shapes: The shape of each key.
        config: Decides which ranks are expected.

    Returns:
        Triples ``(parameter, key of A, key of B)``, and the unexpected keys.
    """
    modules: dict[str, list[FactorPair]] = {}
    for pair in pairs:
        modules.setdefault(pair.module, []).append(pair)
    matched, unexpected = [], []
    for module, nested in modules.items():
        # PEFT wraps the parameters of a module in the order in which torch registers them: the first is innermost
        nested.sort(key=lambda pair: -pair.depth)
        for parameter, pair in itertools.zip_longest(_order(weights.get(module, ()), nested, shapes, config), nested):
            is_embedding = parameter is not None and parameter.kind == "embedding"
            if parameter is None or pair.is_embedding != is_embedding or (pair.depth and not parameter.is_experts):
                unexpected += [pair.a, pair.b]
            else:
                matched.append((parameter, pair.a, pair.b))
    return matched, unexpected


def _order(
    weights: Sequence[TorchParameter], pairs: Sequence[FactorPair], shapes: Mapping[str, Shape], config: Config
) -> Sequence[TorchParameter]:
    """The weights in the order of the pairs: that of the rules where the shapes allow, else another that fits."""
    weights = sorted(weights, key=lambda weight: weight.order)
    shapes_of_pairs = [(shapes[pair.a], shapes[pair.b]) for pair in pairs]
    for exchanged in (config.exchanges_experts, not config.exchanges_experts):
        expected = {w.name: torch_shapes(w, config.rank(w.config_key), exchanged=exchanged) for w in weights}
        names = assign(shapes_of_pairs, expected)
        if names:
            by_name = {weight.name: weight for weight in weights}
            return [by_name[name] for name in names]
    return weights[: len(pairs)] if len(pairs) <= len(weights) else ()


def assign(shapes: Iterable[Shapes], expected: Mapping[str, Shapes]) -> list[str] | None:
    """A name for each pair of shapes, each name once and as early as possible; None where there is not one for each.

    >>> assign([((2, 3), (4, 2)), ((2, 4), (3, 2))], {"down": ((2, 4), (3, 2)), "up": ((2, 3), (4, 2))})
    ['up', 'down']
    """
    names: dict[Shapes, list[str]] = {}
    for name in reversed([*expected]):
        names.setdefault(expected[name], []).append(name)
    try:
        return [names[pair].pop() for pair in shapes]
    except (KeyError, IndexError):
        return None
