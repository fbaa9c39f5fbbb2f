"""The keys of ``adapter_model.safetensors``: what each one is, and which torch parameter it is about."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from lojax.store.peft.config import Config
from lojax.store.peft.factors import torch_shapes
from lojax.store.peft.namemap import Slot

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
_REFUSED = {
    ".lora_magnitude_vector": "DoRA magnitudes",
    ".lora_B.bias": "a bias on B (lora_bias)",
    ".trainable_tokens_delta": "trainable tokens",
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


def read_key(key: str, where: str) -> Factor | str | None:
    """What a key is: a `Factor`, or the name of a parameter saved in full, or None where it is neither.

    Raises:
        ValueError: It belongs to a feature that lojax does not compute.
    """
    if not key.startswith(PREFIX):
        return None
    name = key.removeprefix(PREFIX)
    for suffix, feature in _REFUSED.items():
        if name.endswith((suffix, suffix + ".weight")):
            raise ValueError(f"{where}: {key} holds {feature}, which lojax does not support.")
    found = _FACTOR.fullmatch(name)
    if not found:
        return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    side = found["linear"] or found["embedding"]
    return Factor(key, found["module"], side, bool(found["embedding"]), found["nested"].count(".base_layer"))


def factor_keys(slot: Slot, nested: int = 0) -> tuple[str, str]:
    """The keys of A and B of a slot."""
    start = f"{PREFIX}{slot.module}{'.base_layer' * nested}"
    if slot.kind == "embedding":
        return f"{start}.lora_embedding_A", f"{start}.lora_embedding_B"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


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
