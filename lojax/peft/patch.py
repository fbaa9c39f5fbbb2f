"""What a PEFT adapter does to torch weights by name, without a tree: for merging files."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lojax.adapters.targets import nearest
from lojax.files import safetensors
from lojax.peft.config import Config, read_config
from lojax.peft.read_adapter import weights_file
from lojax.peft.tensor_keys import Extra, Factor, read_key, tied_copies

BLOCK = 1 << 20
"""How many numbers of a weight are updated at once."""

Specs = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Patch:
    """A change of one torch tensor: ``w += scale * b @ a``, with DoRA each output then scaled, or its replacement.

    Attributes:
        a: ``[E, r, columns]``.
        b: ``[E, rows, r]``.
        scale: The factor.
        magnitude: DoRA's length of each output: ``[1, rows, 1]``, or ``[1, 1, columns]`` where those are the outputs.
        value: Reads the replacement, where it is one.
        tokens: The rows that the replacement is of; None for all of them.
    """

    a: np.ndarray | None
    b: np.ndarray | None
    scale: float = 1.0
    magnitude: np.ndarray | None = None
    value: Callable[[], np.ndarray] | None = None
    tokens: tuple[int, ...] | None = None

    def apply(self, tensor: np.ndarray) -> None:
        """Changes ``tensor`` in place: block by block, float32 sums, one cast."""
        if self.value is not None:
            tensor[slice(None) if self.tokens is None else list(self.tokens)] = self.value().astype(tensor.dtype)
            return
        assert self.a is not None and self.b is not None
        flat = tensor.reshape(*self.b.shape[:2], -1)
        gain = self._gain(flat)
        for at in self._blocks(flat):
            flat[at] = (self._updated(flat, at) * gain(at)).astype(tensor.dtype)

    def _blocks(self, flat: np.ndarray) -> Iterator[tuple[int, slice]]:
        experts, rows, columns = flat.shape
        step = max(1, BLOCK // max(columns, 1))
        for e, start in itertools.product(range(experts), range(0, rows, step)):
            yield e, slice(start, start + step)

    def _updated(self, flat: np.ndarray, at: tuple[int, slice]) -> np.ndarray:
        """``w + scale * b @ a`` of a block, in float32 or wider."""
        assert self.a is not None and self.b is not None
        wide = np.promote_types(flat.dtype, np.float32) if flat.dtype.kind == "f" else np.dtype(np.float32)
        return flat[at].astype(wide) + (self.scale * self.b[at].astype(wide)) @ self.a[at[0]].astype(wide)

    def _gain(self, flat: np.ndarray) -> Callable[[tuple[int, slice]], Any]:
        """What DoRA multiplies a block with: the magnitude over the length, which is measured first."""
        if self.magnitude is None:
            return lambda at: 1.0
        squares = np.zeros(self.magnitude.shape, np.float32)
        over_rows = self.magnitude.shape[1:] != (flat.shape[1], 1)
        for e, rows in self._blocks(flat):
            block = np.square(self._updated(flat, (e, rows)))
            squares[(e, slice(None) if over_rows else rows)] += block.sum(axis=0 if over_rows else 1, keepdims=True)
        gain = self.magnitude.astype(np.float32) / np.sqrt(squares)
        return lambda at: gain[at[0]] if over_rows else gain[at]


def patches(adapter: Path, base: Specs, *, experts: str | None = None) -> dict[str, Patch]:
    """The patch of each tensor of ``base`` that the adapter changes.

    Args:
        adapter: The directory of a PEFT adapter.
        base: Dtype and shape of every tensor of the base.
        experts: How the base has its experts, where the shapes do not tell: ``"out_in"`` for
            ``[expert, out, in]``, as most models, or ``"in_out"``.

    Raises:
        ValueError: Anything in the adapter has no place in the base; all of it is listed.
    """
    config = read_config(adapter)
    file = safetensors.open_file(weights_file(adapter))
    read = {key: read_key(key, str(file.path)) for key in file.entries}
    factors = {(k.module, k.nested, k.side): k for k in read.values() if isinstance(k, Factor)}
    owners = {name.rpartition(".")[0] for name in base}
    tied = tied_copies(read, file.read, owners.__contains__)
    full = {name: key for key, name in read.items() if isinstance(name, str) and key not in tied}
    extras = [k for k in read.values() if isinstance(k, Extra) and k.key not in tied]
    lengths = {k.module: k.key for k in extras if k.kind == "magnitude"}
    rename = _prefix({module for module, _, _ in factors} | {name.rpartition(".")[0] for name in full}, base)
    problems = [f"  unexpected: {key}" for key, name in read.items() if name is None]
    found: dict[str, Patch] = {}
    levels: dict[str, list[int]] = {}
    for module, nested, _ in factors:
        levels.setdefault(module, [])
        levels[module] += [nested] if nested not in levels[module] else []
    work = _Work(file, config, base, factors, experts, lengths)
    work.vote(levels, rename)
    for module, depths in levels.items():
        problems += work.place(module, rename(module), sorted(depths, reverse=True), found)
    for name, key in full.items():
        target = rename(name)
        shape = file.entries[key].shape
        if target not in base or base[target][1] != shape:
            problems.append(
                f"  {key} {shape} has no place" + (f": {target} is {base[target][1]}" if target in base else "")
            )
        elif target not in found:
            found[target] = Patch(None, None, value=functools.partial(file.read, key))
    problems += [f"  {key} has no lora_A and lora_B beside it" for m, key in lengths.items() if m not in levels]
    for extra in (k for k in extras if k.kind == "rows"):
        problems += work.place_rows(extra, rename(extra.module) + ".weight", found)
    if problems:
        raise ValueError("\n".join([f"{file.path} does not fit the base:", *problems[:20]]))
    return found


def _prefix(modules: set[str], base: Specs) -> Any:
    """Torch names as the base has them: alike, or all under (or out of) one prefix, as ``bert.``."""
    owners = {name.rpartition(".")[0] for name in base} | {name.rpartition(".")[0].rpartition(".")[0] for name in base}
    if not modules or any(module in owners for module in modules):
        return lambda name: name
    first = min(modules, key=len)
    tops = {first.partition(".")[0] + "."}
    if all(module.startswith(tuple(tops)) for module in modules):
        top = tops.pop()
        if all(module.removeprefix(top) in owners for module in modules):
            return lambda name: name.removeprefix(top)
    added = {owner.removesuffix(first) for owner in owners if owner.endswith("." + first)}
    fitting = [prefix for prefix in added if all(prefix + module in owners for module in modules)]
    return (lambda name: fitting[0] + name) if len(fitting) == 1 else (lambda name: name)


class _Work:
    """The adapter file, and how its factors lie in the base's tensors."""

    def __init__(
        self,
        file: safetensors.File,
        config: Config,
        base: Specs,
        factors: Mapping[Any, Factor],
        experts: str | None,
        lengths: Mapping[str, str],
    ) -> None:
        self.file, self.config, self.base, self.factors, self.lengths = file, config, base, factors, lengths
        self.transposed = bool(config["fan_in_fan_out"])
        over_rows = experts == "in_out" or config.exchanges_experts
        self.over_rows = (False, True) if experts is None else (over_rows,)

    def shapes(self, module: str, nested: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The shapes of A and B, or None where one is missing."""
        pair = [self.factors.get((module, nested, side)) for side in "AB"]
        if None in pair:
            return None
        a, b = (self.file.entries[key.key].shape for key in pair if key)
        return a, b

    def vote(self, levels: Mapping[str, list[int]], rename: Any) -> None:
        """Decides how square weights lie: as the others do; only without others as the config says."""
        votes = set()
        for module in levels:
            shapes, spec = self.shapes(module, 0), self.base.get(rename(module) + ".weight")
            factor = self.factors.get((module, 0, "A"))
            if (
                shapes
                and factor
                and not factor.embedding
                and spec
                and len(spec[1]) == len(shapes[0]) == 2
                and spec[1][0] != spec[1][1]
            ):
                votes.add(spec[1] != (shapes[1][0], shapes[0][1]))
        if len(votes) == 1:
            self.transposed = votes.pop()

    def place(self, module: str, target: str, depths: list[int], found: dict[str, Patch]) -> list[str]:
        """Adds the patches of one module; returns what has no place."""
        shapes = [self.shapes(module, depth) for depth in depths]
        if None in shapes:
            return [f"  {module} has only one of lora_A and lora_B"]
        weight = f"{target}.weight"
        if depths == [0] and weight in self.base:
            return self.place_weight(module, weight, found)
        names = [n for n in self.base if n.startswith(target + ".") and self.config.targets_parameter(n)]
        fits = [
            (order, over_rows)
            for over_rows in self.over_rows
            for order in itertools.permutations(names, len(depths))
            if all(self.fits(name, pair, over_rows) for name, pair in zip(order, shapes, strict=True))
        ]
        if not fits:
            near = nearest(weight, list(self.base), 1)
            return [f"  {module} has no place" + (f" (nearest in the base: {near[0]})" if near else "")]
        if len(fits) > 1:
            listed = ", ".join(names)
            return [
                f"  {module}: {listed} can be [expert, out, in] or [expert, in, out] by shape; say which with experts="
            ]
        (order, over_rows), *_ = fits
        for name, depth in zip(order, depths, strict=True):
            found[name] = self.experts(module, depth, name, over_rows)
        return []

    def tensors(self, module: str, nested: int) -> tuple[np.ndarray, np.ndarray]:
        """A and B."""
        a, b = (self.file.read(self.factors[module, nested, side].key) for side in "AB")
        return a, b

    def place_weight(self, module: str, name: str, found: dict[str, Patch]) -> list[str]:
        """Linear, Conv1D, embedding and convolution."""
        dtype, shape = self.base[name]
        a, b = self.tensors(module, 0)
        rank = a.shape[0]
        if rank != self.config.rank(module):
            return [f"  {module} has rank {rank}, adapter_config.json says {self.config.rank(module)}"]
        if dtype.kind not in "fV":
            return [f"  {name} is {dtype}: a quantized base cannot be merged into"]
        straight = (b.shape[0], *a.shape[1:])
        embedding = self.factors[module, 0, "A"].embedding
        a, b = a.reshape(rank, -1), b.reshape(b.shape[0], -1)
        scale = self.config.scale(module, rank)
        turned = embedding or (len(shape) == 2 and straight[::-1] == shape and (straight != shape or self.transposed))
        if b.shape[1] != rank or (straight[::-1] if turned else straight) != shape:
            return [f"  {module}: lora_B @ lora_A is {straight}, {name} is {shape}"]
        outs = len(b)
        use_dora = bool(self.config["use_dora"])
        if (module in self.lengths) != use_dora:
            has = "a" if module in self.lengths else "no"
            return [f"  {module} has {has} lora_magnitude_vector, adapter_config.json says use_dora={use_dora}"]
        magnitude = self.file.read(self.lengths[module]) if module in self.lengths else None
        if magnitude is not None and magnitude.size != outs:
            return [f"  {self.lengths[module]} has {magnitude.size} entries, {name} {outs} outputs"]
        magnitude = None if magnitude is None else magnitude.reshape((1, 1, outs) if turned else (1, outs, 1))
        a, b = (b.T, a.T) if turned else (a, b)
        found[name] = Patch(a[None], b[None], scale, magnitude)
        return []

    def place_rows(self, extra: Extra, name: str, found: dict[str, Patch]) -> list[str]:
        """Adds the patch of trained token rows; returns why there is no place."""
        tokens, shape = self.config.tokens(extra.module), self.base.get(name, (None, ()))[1]
        if not tokens:
            return [f"  {extra.key}: adapter_config.json names no trainable_token_indices for {extra.module}"]
        rows = self.file.entries[extra.key].shape
        if len(shape) != 2 or rows != (len(tokens), shape[1]) or max(tokens) >= shape[0]:
            return [f"  {extra.key} {rows}: rows {list(tokens)} have no place, {name} is {shape or 'missing'}"]
        read = functools.partial(self.file.read, extra.key)
        if name not in found:
            found[name] = Patch(None, None, value=read, tokens=tokens)
            return []
        whole = found[name].value
        if whole is None:
            return [f"  {extra.key}: {name} has an adapter too, which PEFT does not allow"]
        found[name] = Patch(None, None, value=lambda: _overlaid(whole(), read(), tokens))
        return []

    def fits(self, name: str, pair: Any, over_rows: bool) -> bool:
        """Whether a pair can belong to a parameter ``[E, d1, d2]``, A over ``d1`` or over ``d2``, or ``[d1, d2]``."""
        shape = self.base[name][1]
        if len(shape) not in (2, 3) or (len(shape) == 2 and over_rows):
            return False
        experts = shape[0] if len(shape) == 3 else 1
        rank = experts * self.config.rank(name)
        columns, rows = shape[-2:] if over_rows else shape[-2:][::-1]
        return pair == ((rank, columns), (rows, rank))

    def experts(self, module: str, nested: int, name: str, over_rows: bool) -> Patch:
        """The patch of a parameter reached through ``target_parameters``."""
        rank = self.config.rank(name)
        a, b = self.tensors(module, nested)
        count = a.shape[0] // rank
        a, b = a.reshape(count, rank, -1), b.reshape(-1, rank, count).transpose(2, 0, 1)
        pair = (b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if over_rows else (a, b)
        return Patch(*pair, self.config.scale(name, rank))


def _overlaid(whole: np.ndarray, rows: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """``whole`` with other rows: PEFT saves an embedding that was resized beside the rows that train."""
    whole = whole.copy()
    whole[list(tokens)] = rows.astype(whole.dtype)
    return whole
