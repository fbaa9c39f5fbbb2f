"""The keys of ``adapter_model.safetensors``: what each one is, and which torch parameter it is about."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from lojax.files import safetensors
from lojax.peft.config import Config
from lojax.peft.extras import EXTRAS, Extra
from lojax.peft.factors import torch_shapes
from lojax.peft.name_map import TorchParameter
from lojax.types import Shape

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
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
        single: Those of factors that have none.
        extras: Those of tensors besides the factors.
        full: The keys of parameters saved in full, by the name of the parameter.
        foreign: Those that PEFT does not write.
    """

    pairs: list[FactorPair]
    single: list[str]
    extras: list[ExtraKey]
    full: dict[str, str]
    foreign: list[str]


def read_keys(file: safetensors.File, has_module: Callable[[str], bool] = lambda module: True) -> Keys:
    """The keys of a file, without the copies that PEFT makes of the token rows of tied modules.

    Args:
        file: The weights of an adapter.
        has_module: Whether the base has a torch module.

    Raises:
        ValueError: A key belongs to a feature that lojax does not compute.
    """
    keys = Keys([], [], [], {}, [])
    factors: dict[tuple[str, int, bool], dict[str, str]] = {}
    for key in file.entries:
        name = key.removeprefix(PREFIX)
        for suffix, feature in UNSUPPORTED.items():
            if name.endswith(suffix):
                raise ValueError(f"{file.path}: {key} holds {feature}, which lojax does not support.")
        factor = next((suffix for suffix in FACTORS if name.endswith(suffix)), None)
        extra = next((e for e in EXTRAS if name.endswith((e.suffix, f"{e.suffix}.weight"))), None)
        if name == key:
            keys.foreign.append(key)
        elif factor:
            module, depth = _unwrap(name.removesuffix(factor))
            side, is_embedding = FACTORS[factor]
            factors.setdefault((module, depth, is_embedding), {})[side] = key
        elif extra:
            keys.extras.append(ExtraKey(key, name.removesuffix(".weight").removesuffix(extra.suffix), extra))
        else:
            for inserted in (".token_adapter.base_layer.", f"{WRAPPER}.", ".modules_to_save."):
                name = name.replace(inserted, ".")
            keys.full[name] = key
    for place, sides in factors.items():
        if len(sides) == 2:
            keys.pairs.append(FactorPair(*place, sides["A"], sides["B"]))
        else:
            keys.single.extend(sides.values())
    _drop_tied_copies(keys, file, has_module)
    return keys


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
        # PEFT wraps the parameters of a module in the order in which torch registers them: the first lies innermost
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
    if len(pairs) > len(weights):
        return ()
    weights = sorted(weights, key=lambda weight: weight.order)
    got = [(shapes[pair.a], shapes[pair.b]) for pair in pairs]
    for exchanged in (config.exchanges_experts, not config.exchanges_experts):
        for order in itertools.permutations(weights, len(pairs)):
            if [torch_shapes(w, config.rank(w.config_key), exchanged=exchanged) for w in order] == got:
                return order
    return weights[: len(pairs)]
