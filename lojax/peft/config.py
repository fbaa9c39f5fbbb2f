"""``adapter_config.json``: what each field means for the computation; each is honored, or refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lojax.files.naming import as_path
from lojax.peft.patterns import MAX_PATTERNS, ModulePattern, compile_pattern
from lojax.text import printable

CONFIG = "adapter_config.json"
_SAVED, _LAYER = r"(^|.*\.)(?:{})($|\..*)", r"(?:^|.*?\.)(?:{})\.(\d+)\."
"""How PEFT matches the modules saved in full, and the module that holds the layers."""
Number = TypeVar("Number", int, float)

REFUSED = {
    "lora_bias": "it adds a bias to B",
    "ensure_weight_tying": "it ties the adapters of tied layers",
    "layer_replication": "it repeats layers of the base",
    "use_qalora": "it pools inputs before A",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it truncates the base weights and adds singular values",
    "monteclora_config": "it samples its factors",
    "velora_config": "it compresses activations",
}
"""Fields that change the computation in a way that lojax does not support, and how."""

HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""The values of ``init_lora_weights`` that leave the base weights as they were."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked ``adapter_config.json``. ``fields`` holds all of it, unknown fields included."""

    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields.get(name)

    def rank(self, module: str) -> int:
        """The rank of the adapter on a torch module."""
        return self._first_match(self._ranks, module, self.fields["r"])

    def scale(self, module: str, rank: int) -> float:
        """The factor on the update of a torch module, at its rank."""
        alpha = self._first_match(self._alphas, module, self.fields.get("lora_alpha", 8))
        return float(alpha / math.sqrt(rank) if self["use_rslora"] else alpha / rank)

    @functools.cached_property
    def _ranks(self) -> list[tuple[ModulePattern, int]]:
        return [(ModulePattern(key), rank) for key, rank in (self["rank_pattern"] or {}).items()]

    @functools.cached_property
    def _alphas(self) -> list[tuple[ModulePattern, float]]:
        return [(ModulePattern(key), alpha) for key, alpha in (self["alpha_pattern"] or {}).items()]

    def _first_match(self, patterns: list[tuple[ModulePattern, Number]], module: str, default: Number) -> Number:
        return next((value for pattern, value in patterns if pattern.matches(module)), default)

    def targets(self, module: str) -> bool:
        """Whether the config asks for an adapter on a torch module, by PEFT's rules."""
        if self._excluded(module) or (self._saved and self._saved.match(module)):
            return False
        if not self._targeted(module):
            return False
        targets = self["target_modules"]
        return isinstance(targets, str) or module in targets or self._transforms_layer_of(module)

    def targets_parameter(self, name: str) -> bool:
        """Whether the config asks for an adapter on a parameter through ``target_parameters``."""
        return self._parameters(name)

    @functools.cached_property
    def _targeted(self) -> Callable[[str], bool]:
        targets = self["target_modules"]
        return _matcher(None if targets == "all-linear" else targets)

    @functools.cached_property
    def _excluded(self) -> Callable[[str], bool]:
        return _matcher(self["exclude_modules"])

    @functools.cached_property
    def _parameters(self) -> Callable[[str], bool]:
        return _matcher(self["target_parameters"])

    @functools.cached_property
    def _saved(self) -> re.Pattern[str] | None:
        names = self["modules_to_save"]
        return compile_pattern(_SAVED, *names) if names else None

    @functools.cached_property
    def _layers(self) -> list[re.Pattern[str]]:
        names = self["layers_pattern"] or []
        names = [names] if isinstance(names, str) else names
        return [compile_pattern(_LAYER, name) for name in names] or [re.compile(r".*?\.[^.]*\.(\d+)\.")]

    def tokens(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that train, by its torch module; None where none do.

        A bare list is about the embedding that the file holds rows of: PEFT asks the model which one that is.
        """
        tokens = self["trainable_token_indices"]
        if isinstance(tokens, list):
            return tuple(tokens) or None
        return next((tuple(rows) for name, rows in (tokens or {}).items() if rows and module.endswith(name)), None)

    @property
    def exchanges_experts(self) -> bool:
        """Whether it is of a PEFT before 0.19, which took experts ``[E, out, in]`` for ``[E, in, out]``."""
        version = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", str(self["peft_version"]))
        return version is None or (int(version[1]), int(version[2])) < (0, 19)

    def _transforms_layer_of(self, module: str) -> bool:
        layers = self["layers_to_transform"]
        if layers is None or layers == []:
            return True
        match = next((match for pattern in self._layers if (match := pattern.match(module))), None)
        return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)

    def computation(self) -> dict[str, Any]:
        """The fields that decide what the adapter computes."""
        return {name: self[name] for name in sorted({*HONORED, "peft_version"})}  # which decides the axes of experts


def _matcher(targets: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Whether a name is, or ends with a dot and, one of ``targets``; a string is a regular expression for the name."""
    if isinstance(targets, str):
        pattern = compile_pattern("{}", targets)
        return lambda name: pattern.fullmatch(name) is not None
    names = frozenset(targets or ())

    def is_target(name: str) -> bool:
        pieces = name.split(".")
        return bool(names) and any(".".join(pieces[i:]) in names for i in range(len(pieces)))

    return is_target


def read_config(directory: str | os.PathLike[str]) -> Config:
    """Reads and checks the config of an adapter directory.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not JSON, has a field of the wrong type, or asks for what lojax does not do.
    """
    directory = as_path(directory)
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(_missing_text(directory))
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a ValueError too for a number of more than 4,300 digits
        raise ValueError(f"{path} is not JSON: {printable(error)}. Fetch or save the adapter again.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; expected a JSON object.")
    return check_config(fields, str(path))


def _missing_text(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory. Pass the directory that holds {CONFIG}."
    adapters = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    hint = f" It holds adapters in the subdirectories {', '.join(adapters)}: pass one of these." if adapters else ""
    return f"{directory} holds no {CONFIG}, so it is not a PEFT adapter.{hint}"


def check_config(fields: Mapping[str, Any], where: str) -> Config:
    """The config; raises where ``fields`` cannot be honored, and warns about unknown fields that are set."""

    def quoted(name: str) -> str:
        return printable(repr(fields.get(name)))

    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {quoted('peft_type')}; lojax reads 'LORA' adapters.")
    for name, reason in REFUSED.items():
        if fields.get(name):
            raise ValueError(f"{where}: {name}={quoted(name)} is not supported ({reason}).")
    init = fields.get("init_lora_weights")
    if not any(init is value or (isinstance(value, str) and init == value) for value in SAME_BASE):
        raise ValueError(
            f"{where}: init_lora_weights={quoted('init_lora_weights')} changed the base weights, so this adapter does "
            "not belong to the original base. Save it with path_initial_model_for_weight_conversion= in PEFT, which "
            "makes it plain LoRA."
        )
    for name, is_valid in HONORED.items():
        if name in fields and not is_valid(fields[name]):
            raise ValueError(f"{where}: {name}={quoted(name)} is not a valid value.")
    if "r" not in fields:
        raise ValueError(f"{where} lacks the rank, r.")
    if fields.get("use_dora") and fields.get("target_parameters"):
        raise ValueError(
            f"{where}: use_dora=True with target_parameters={quoted('target_parameters')}; PEFT has no DoRA on "
            "parameters. Adapt them with plain LoRA, in an adapter of their own."
        )
    config = Config(fields)
    _check_patterns(config, where)
    unknown = sorted(n for n, v in fields.items() if v and n not in KNOWN)
    if unknown:
        names = printable(", ".join(unknown))
        warnings.warn(f"{where}: unknown fields {names} are kept, and not acted on.", stacklevel=3)
    return config


def _check_patterns(config: Config, where: str) -> None:
    """Compiles every regular expression, as it is used."""
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"):
        count = 1 if isinstance(config[name], str) else len(config[name] or ())
        if count > MAX_PATTERNS:
            raise ValueError(f"{where}: {name} holds {count:,} patterns; lojax reads {MAX_PATTERNS:,} at most.")
    try:
        _ = config._ranks, config._alphas, config._targeted, config._excluded, config._saved, config._layers
    except ValueError as error:
        raise ValueError(f"{where}: {printable(error, 500)}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and -1e300 < value < 1e300


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_tokens(value: object) -> bool:
    def is_rows(rows: object) -> bool:
        return (
            isinstance(rows, list)
            and all(type(i) is int and 0 <= i < 2**63 for i in rows)
            and len({*rows}) == len(rows)
        )

    return value is None or is_rows(value) or (isinstance(value, dict) and all(map(is_rows, value.values())))


def _is_layers(value: object) -> bool:
    layers = value if isinstance(value, list) else [value]
    return value is None or all(type(layer) is int for layer in layers)


def _is_regex_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_invocation(value: object) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value))


HONORED: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda v: True,  # checked first, by itself
    "init_lora_weights": lambda v: True,
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": lambda v: _is_number(v) and 0 <= v < 1,
    "rank_pattern": lambda v: v is None or (isinstance(v, dict) and all(_is_rank(n) for n in v.values())),
    "alpha_pattern": lambda v: v is None or (isinstance(v, dict) and all(_is_number(n) for n in v.values())),
    "bias": lambda v: v in (None, "none", "all", "lora_only"),
    "target_modules": _is_regex_or_names,
    "exclude_modules": _is_regex_or_names,
    "modules_to_save": _is_names,
    "target_parameters": _is_names,
    "layers_to_transform": _is_layers,
    "layers_pattern": _is_regex_or_names,
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "fan_in_fan_out": lambda v: True,  # shapes and the name map tell
    "trainable_token_indices": _is_tokens,
    "alora_invocation_tokens": _is_invocation,
}
"""The fields that lojax acts on, and whether a value is one that they can have."""
KNOWN = {*HONORED, *HARMLESS, *REFUSED}
