"""The keys of ``adapter_model.safetensors``: what each one is, and which torch parameter it is about."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from lojax.peft.config import Config
from lojax.peft.factors import torch_shapes
from lojax.peft.name_map import Slot

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
_SINGLE = re.compile(
    r"(?P<module>.+)\.(?:(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|token_adapter\.trainable_tokens_delta)"
)
_REFUSED = {
    ".lora_B.bias": "a bias on B (lora_bias)",
    ".lora_diag": "KaSA singular values",
}


@dataclasses.dataclass(frozen=True)
class Factor:
    """A key of one factor: ``side`` is ``"A"`` or ``"B"``; ``nested`` counts the wrappers around it."""

    key: str
    module: str
    side: str
    embedding: bool
    nested: int


@dataclasses.dataclass(frozen=True)
class Extra:
    """A key beside the factors: ``kind`` is ``"magnitude"`` (DoRA) or ``"rows"`` (trainable tokens)."""

    key: str
    module: str
    kind: str


def read_key(key: str, where: str) -> Factor | Extra | str | None:
    """What a key is: a `Factor`, an `Extra`, or the name of a parameter saved in full; None where it is none of them.

    Raises:
        ValueError: It belongs to a feature that lojax does not compute.
    """
    if not key.startswith(PREFIX):
        return None
    name = key.removeprefix(PREFIX)
    for suffix, feature in _REFUSED.items():
        if name.endswith((suffix, suffix + ".weight")):
            raise ValueError(f"{where}: {key} holds {feature}, which lojax does not support.")
    single = _SINGLE.fullmatch(name)
    if single:
        return Extra(key, single["module"], "magnitude" if single["magnitude"] else "rows")
    found = _FACTOR.fullmatch(name)
    if not found:
        name = name.replace(".token_adapter.base_layer.", ".")
        return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    side = found["linear"] or found["embedding"]
    return Factor(key, found["module"], side, bool(found["embedding"]), found["nested"].count(".base_layer"))


def tied_copies(
    read: Mapping[str, Factor | Extra | str | None],
    tensor: Callable[[str], np.ndarray],
    has_place: Callable[[str], bool],
) -> set[str]:
    """The keys of a module that the base lacks because it is tied to another: PEFT may save its token rows twice.

    Args:
        read: What each key is.
        tensor: Reads a key.
        has_place: Whether the base has a torch module.
    """
    rows = [kind for kind in read.values() if isinstance(kind, Extra) and kind.kind == "rows"]
    known = [tensor(kind.key) for kind in rows if has_place(kind.module)]
    lost = [kind for kind in rows if not has_place(kind.module)]
    tied = {kind.module for kind in lost if any(np.array_equal(tensor(kind.key), value) for value in known)}
    weights = {f"{module}.weight" for module in tied}
    return {key for key, kind in read.items() if (kind.module in tied if isinstance(kind, Extra) else kind in weights)}


def factor_keys(slot: Slot, nested: int = 0) -> tuple[str, str]:
    """The keys of A and B of a slot."""
    start = f"{PREFIX}{slot.module}{'.base_layer' * nested}"
    if slot.kind == "embedding":
        return f"{start}.lora_embedding_A", f"{start}.lora_embedding_B"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def magnitude_key(slot: Slot) -> str:
    """The key of DoRA's magnitude of a slot."""
    return f"{PREFIX}{slot.module}.lora_magnitude_vector"


def rows_key(slot: Slot) -> str:
    """The key of the trained rows of an embedding."""
    return f"{PREFIX}{slot.module}.token_adapter.trainable_tokens_delta"


def is_parameter_target(slot: Slot) -> bool:
    """Whether PEFT reaches this weight through ``target_parameters``."""
    return slot.kind in ("experts", "experts_t")


def pair_up(
    factors: Iterable[Factor],
    slots: Mapping[str, Sequence[Slot]],
    shapes: Mapping[str, tuple[int, ...]],
    config: Config,
) -> tuple[list[tuple[Slot, str, str]], list[str]]:
    """The slot of each pair of factors, and the keys that fit none.

    Args:
        factors: The factors in the file.
        slots: The weights of each torch module, in the order of the rules.
        shapes: The shape of each key.
        config: Decides which ranks are expected.

    Returns:
        Triples ``(slot, key of A, key of B)``, and the unexpected keys; a factor without its partner
        is among these.
    """
    modules: dict[str, dict[int, dict[str, Factor]]] = {}
    for factor in factors:
        modules.setdefault(factor.module, {}).setdefault(factor.nested, {})[factor.side] = factor
    pairs, unexpected = [], []
    for module, levels in modules.items():
        keys = {level: (sides["A"].key, sides["B"].key) for level, sides in levels.items() if len(sides) == 2}
        if len(keys) < len(levels) or len(levels) > len(slots.get(module, ())):
            unexpected += [factor.key for sides in levels.values() for factor in sides.values()]
            continue
        # the parameter that torch registers first is wrapped first, and so lies innermost
        inward = sorted(keys, reverse=True)
        for slot, level in zip(_ordered(slots[module], [keys[n] for n in inward], shapes, config), inward, strict=True):
            embedding = levels[level]["A"].embedding
            if embedding != (slot.kind == "embedding") or (level and not is_parameter_target(slot)):
                unexpected += keys[level]
            else:
                pairs.append((slot, *keys[level]))
    return pairs, unexpected


def _ordered(
    slots: Sequence[Slot], keys: Sequence[tuple[str, str]], shapes: Mapping[str, tuple[int, ...]], config: Config
) -> Sequence[Slot]:
    """The slots in the order of the keys: that of the rules where the shapes allow, else another that fits."""
    slots = sorted(slots, key=lambda slot: slot.order)
    for exchanged in (config.exchanges_experts, not config.exchanges_experts):
        for order in itertools.permutations(slots, len(keys)):
            expected = [torch_shapes(s, config.rank(parameter_key(s)), exchanged=exchanged) for s in order]
            if expected == [(shapes[a], shapes[b]) for a, b in keys]:
                return order
    return slots[: len(keys)]


def parameter_key(slot: Slot) -> str:
    """The name by which PEFT looks up a slot's rank and alpha: the module, or the parameter itself."""
    return slot.name if is_parameter_target(slot) else slot.module
