"""`advise`: what the literature would say of a run before it starts, and of the ranks of an adapter after it."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.rule import is_finite, is_integer
from lojax.adapters.single_matrices import single_adapters
from lojax.adapters.spectrum import least_rank, thin_svd
from lojax.adapters.trees import check_pair
from lojax.analysis.memory import StepMemory, full_memory, lora_memory
from lojax.quantized.quantized import is_quantized
from lojax.types import Leaf, Params, Path

REGRET = 'Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"'
TINKER = "Thinking Machines Lab, Tinker documentation, LoRA primer"
RSLORA = "Kalajdzievski 2023, arXiv:2312.03732"
LORA_PLUS = "Hayou et al. 2024, arXiv:2402.12354"
SHAPES = "counted from the shapes"
ECKART_YOUNG = "Eckart and Young 1936, on the spectra of the adapter"

ATTENTION = re.compile(
    r"(?i).*att(n|ention).*|qkv|query|key|value|(to_)?[qkvo]|[qkvo]_(proj|einsum)|w[qkvo]|c_attn|to_out|query_key_value"
)
"""A part of a path that says that a weight is of an attention block."""
OUTSIDE = re.compile(r"(?i).*embed.*|wte|wpe|shared|.*head|classifier|score|pooler|.*norm.*|ln_?\w*|bias|b|scale")
"""A part of a path of what is no linear map inside the net: look-ups, heads, norms, biases."""
SHORT_RUN = 100
"""Steps up to which a run is very short there."""
LARGE_RANK, SMALL_SCALE = 64, 0.25
"""From which rank on, and below which scale, the scale alpha / r is worth a word."""


@dataclasses.dataclass(frozen=True)
class Hint:
    """One piece of advice.

    Attributes:
        topic: What it is about.
        text: What it says.
        source: Who says so.
        warning: Whether something is likely wrong.
    """

    topic: str
    text: str
    source: str
    warning: bool = False


@dataclasses.dataclass(frozen=True)
class Advice:
    """What there is to say of a run. It shows as text, printed or in a REPL.

    Attributes:
        hints: The pieces of advice.
    """

    hints: tuple[Hint, ...]

    @property
    def warnings(self) -> tuple[Hint, ...]:
        """Those that say that something is likely wrong."""
        return tuple(hint for hint in self.hints if hint.warning)

    @property
    def text(self) -> str:
        """Each hint with its source in brackets; warnings begin with ``!``."""
        lines = [f"{'! ' * hint.warning}{hint.topic}: {hint.text} [{hint.source}]" for hint in self.hints]
        return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in lines)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def advise(
    frozen: Params,
    lora: Params,
    *,
    tokens: int | None = None,
    learning_rate: float | None = None,
    steps: int | None = None,
    energy: float = 0.99,
) -> Advice:
    """What the literature says of these adapters: before training from shapes alone, and of trained ones their ranks.

    Args:
        frozen: The frozen tree; shapes are enough: ``jax.eval_shape(model.init, key, params, x)``.
        lora: The ``lora`` tree; likewise. Of a trained one the ranks are looked at too.
        tokens: How many tokens there are to learn: those that the loss counts, of one epoch. None leaves it open.
        learning_rate: The learning rate that full fine-tuning of this net would have, with Adam; None leaves it open.
        steps: How many steps the run has; very short ones need larger learning rates. None leaves it open.
        energy: The share of every update that trimmed ranks would keep, see `lojax.trim`.

    Returns:
        An `Advice`; printing it gives a paragraph for each hint, with its source. It is advice: a sweep
        (`lojax.sweep`) knows better.

    Raises:
        ValueError: The trees do not fit together, lora is a bank or holds no adapter, or a number is out of range.

    >>> import lojax
    >>> params = {"attn": {"query": jnp.ones((64, 64))}, "mlp": {"up": jnp.ones((64, 256))}}
    >>> pair = jax.eval_shape(lambda: lojax.init(jax.random.key(0), params, "attn/query", rank=4))
    >>> advice = advise(*pair, tokens=2000, learning_rate=1e-5)
    >>> [hint.topic for hint in advice.hints]
    ['capacity', 'targets', 'learning rate', 'learning rate of b', 'scale', 'memory']
    >>> print(advice.hints[2].text)
    0.0001, ten times that of full fine-tuning, whatever the rank.
    >>> [hint.topic for hint in advice.warnings]
    ['capacity', 'targets']
    """
    for name, value in (("tokens", tokens), ("steps", steps)):
        if value is not None and (not is_integer(value) or value < 1):
            raise ValueError(f"{name}={value!r}; expected an integer of at least 1.")
    if learning_rate is not None and (not is_finite(learning_rate) or learning_rate <= 0):
        raise ValueError(f"learning_rate={learning_rate!r}; expected a number above 0.")
    if not is_finite(energy) or not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r}; expected a share above 0 and up to 1, such as 0.99.")
    weights, trained = check_pair(frozen, lora)
    adapters = {path: leaf for path, leaf in trained.items() if is_adapter(leaf) and leaf.a is not None}
    if not adapters:
        raise ValueError("lora holds no low-rank adapter, so there is nothing to advise on.")
    hints = [_capacity(adapters, tokens), _targets(weights, adapters), *_learning_rates(learning_rate, steps)]
    return Advice((*hints, _scale(adapters), _memory(weights, trained), *_ranks(adapters, energy)))


def _capacity(adapters: Mapping[Path, Adapter], tokens: int | None) -> Hint:
    count = sum(adapter.parameters for adapter in adapters.values())
    start = f"{count:,} numbers train in {len(adapters)} weight{'s' * (len(adapters) > 1)}"
    if tokens is None:
        return Hint("capacity", f"{start}. Pass tokens= to compare them with what there is to learn.", SHAPES)
    rank = max(adapter.rank for adapter in adapters.values())
    if count >= tokens:
        text = f"{start} for {tokens:,} tokens to learn: enough for LoRA to learn as full fine-tuning does."
        return Hint("capacity", text, TINKER)
    needed = math.ceil(rank * tokens / count)
    text = (
        f"{start} for {tokens:,} tokens to learn. With fewer numbers than tokens supervised learning falls behind full "
        f"fine-tuning; rank {needed:,} instead of {rank} would have as many, or the same rank in more weights. "
        "Learning from rewards needs far less: rank 1 can do."
    )
    return Hint("capacity", text, TINKER, warning=True)


def _targets(weights: Mapping[Path, Leaf], adapters: Mapping[Path, Adapter]) -> Hint:
    linear = {path: _numbers(weights[path]) for path in weights if path in adapters or _is_linear(path, weights[path])}
    left = {path: count for path, count in linear.items() if path not in adapters}
    others = [path for path in left if not _is_attention(path)]
    if others and all(_is_attention(path) for path in adapters):
        text = (
            f"all adapters ({len(adapters)}) are in attention, and other linear maps ({len(others)}, such as "
            f"{others[0]}) have none. Attention alone does worse even with as many numbers; adapt all, feed-forward "
            "layers and experts above all."
        )
        return Hint("targets", text, REGRET, warning=True)
    if left:
        share = 1 - sum(left.values()) / sum(linear.values())
        text = (
            f"{len(adapters)} of {len(linear)} linear maps are adapted, with {share:.0%} of their numbers; "
            f"{next(iter(left))} is not. Adapting all does best."
        )
        return Hint("targets", text, REGRET)
    return Hint("targets", f"every linear map is adapted ({len(linear)}), which does best.", REGRET)


def _learning_rates(learning_rate: float | None, steps: int | None) -> list[Hint]:
    short = steps is not None and steps <= SHORT_RUN
    times, factor = ("fifteen times", 15) if short else ("ten times", 10)
    why = f", for a run as short as {steps} steps" if short else ""
    start = "about" if learning_rate is None else f"{learning_rate * factor:g},"
    text = f"{start} {times} that of full fine-tuning{why}, whatever the rank."
    faster = (
        "b may learn faster than a, 16 times in the paper: lojax.optimizer(tx, b_ratio=16), with a smaller rate of a."
    )
    return [Hint("learning rate", text, REGRET), Hint("learning rate of b", faster, LORA_PLUS)]


def _scale(adapters: Mapping[Path, Adapter]) -> Hint:
    pairs = []
    for adapter in adapters.values():
        scales = adapter.scale if isinstance(adapter.scale, tuple) else (adapter.scale,)
        pairs += [(abs(scale), adapter.rank) for scale in scales]
    scale, rank = min(pairs)
    if rank >= LARGE_RANK and scale < SMALL_SCALE:
        text = (
            f"alpha / r = {scale:g} at rank {rank}: with alpha fixed, the update of a large rank is weak. Take "
            f'scaling="rslora", which is alpha / sqrt(r) = {scale * math.sqrt(rank):g} here, or a larger alpha.'
        )
        return Hint("scale", text, RSLORA, warning=True)
    text = (
        f"alpha {scale * rank:g} at rank {rank}, a scale of {scale:g}. Keep alpha as the rank changes: with alpha / r "
        "the best learning rate then stays about the same (theirs: alpha 32 at every rank)."
    )
    return Hint("scale", text, REGRET)


def _memory(weights: Mapping[Path, Leaf], trained: Mapping[Path, Leaf]) -> Hint:
    plain, full = lora_memory(weights, trained), full_memory(weights, trained)
    parts = [f"{_in_units(plain.total)} for these adapters ({_parts(plain)})"]
    if not any(is_quantized(unbox(leaf)) for leaf in weights.values()):
        small = lora_memory(weights, trained, quantized=True)
        parts.append(f'{_in_units(small.total)} with base="nf4" (the adapted weights in 4 bits)')
    parts.append(f"{_in_units(full.total)} for full fine-tuning")
    text = f"{', '.join(parts)}; with Adam, and without activations, of which all three need about as much."
    return Hint("memory", text, SHAPES)


def _ranks(adapters: Mapping[Path, Adapter], energy: float) -> list[Hint]:
    """Of adapters that have values, and moved from zero, the ranks that they use."""
    old: list[int] = []
    new: list[int] = []
    for path, adapter in adapters.items():
        is_abstract = any(isinstance(x, (Tracer, jax.ShapeDtypeStruct)) for x in adapter.arrays.values())
        if is_abstract or adapter.moved_base or adapter.extras not in ((), ("ranks",), ("scale",)):
            continue
        for _, single in single_adapters(path, adapter):
            s = thin_svd(single.a, single.b)[1]
            if s.size and np.isfinite(s).all() and s[0] > 0:
                old.append(single.rank)
                new.append(least_rank(s, energy))
    if not new:
        return []
    text = (
        f"of {np.mean(old):.1f} ranks, {np.mean(new):.1f} carry {energy:.0%} of the updates, in the mean over "
        f"{len(new)} matri{'x' if len(new) == 1 else 'ces'}; lojax.trim(lora, {energy:g}) leaves {min(new)} to "
        f"{max(new)}."
    )
    return [Hint("ranks", text, ECKART_YOUNG)]


# --- what a weight is, by its path and shape ---


def _is_linear(path: Path, leaf: Leaf) -> bool:
    x = unbox(leaf)
    if x is None or len(np.shape(x)) < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    return not any(OUTSIDE.fullmatch(part) for part in path.split("/"))


def _is_attention(path: Path) -> bool:
    return any(ATTENTION.fullmatch(part) for part in path.split("/"))


def _numbers(leaf: Leaf) -> int:
    return math.prod(np.shape(unbox(leaf)))


def _parts(memory: StepMemory) -> str:
    return (
        f"base {_in_units(memory.weights)}, adapters {_in_units(memory.trained)}, gradients and moments "
        f"{_in_units(memory.gradients + memory.moments)}"
    )


def _in_units(count: int) -> str:
    """Bytes as people say them.

    >>> _in_units(16_060_000_000), _in_units(1_500_000), _in_units(800)
    ('16.1 GB', '1.5 MB', '0.8 kB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"
