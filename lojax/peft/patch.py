"""What a PEFT adapter does to torch weights by name, without a tree: for merging files."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.targets import nearest
from lojax.files import safetensors
from lojax.peft.config import Config
from lojax.peft.name_map import group_by
from lojax.peft.read_adapter import MAX_LISTED, open_adapter
from lojax.peft.tensor_keys import FactorPair, Keys, Shapes, assign, read_keys
from lojax.text import printable
from lojax.types import Shape

BLOCK = 1 << 20
"""How many numbers of a weight are updated at once."""

Specs = Mapping[str, tuple[np.dtype, Shape]]
Block = tuple[int, slice]
"""An expert, and a range of its rows."""


@dataclasses.dataclass(frozen=True)
class Update:
    """``w += scale * b @ a``, and with DoRA each output then scaled.

    Attributes:
        a: ``[E, r, columns]``.
        b: ``[E, rows, r]``.
        scale: The LoRA scale.
        magnitude: DoRA's length of each output: ``[1, rows, 1]``, or ``[1, 1, columns]`` where those are the outputs.
        is_in_out: Whether the rows are the inputs and the columns the outputs.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    is_in_out: bool = False

    def as_adapter(self) -> Adapter:
        """The update as an adapter of `as_weight`."""
        a, b = (self.b, self.a) if self.is_in_out else (self.a.swapaxes(1, 2), self.b.swapaxes(1, 2))
        magnitude = None if self.magnitude is None else self.magnitude.reshape(1, -1)
        if len(a) == 1:
            gain = None if magnitude is None else magnitude[0]
            return Adapter(a[0], b[0], self.scale, ("in", "out"), magnitude=gain)
        return Adapter(a, b, self.scale, ("stack", "in", "out"), magnitude=magnitude)

    def as_weight(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as ``[in, out]``, or as ``[E, in, out]`` where it holds several experts."""
        w = tensor.reshape(*self.b.shape[:2], -1)
        w = w if self.is_in_out else w.swapaxes(1, 2)
        return w[0] if len(w) == 1 else w

    def apply(self, tensor: np.ndarray) -> None:
        """Changes ``tensor`` in place: block by block, float32 sums, one cast."""
        w = tensor.reshape(*self.b.shape[:2], -1)
        gain = self._gain(w)
        for block in self._blocks(w):
            w[block] = (self._updated(w, block) * gain(block)).astype(tensor.dtype)

    def _blocks(self, w: np.ndarray) -> Iterator[Block]:
        experts, rows, columns = w.shape
        step = max(1, BLOCK // max(columns, 1))
        for expert, start in itertools.product(range(experts), range(0, rows, step)):
            yield expert, slice(start, start + step)

    def _updated(self, w: np.ndarray, block: Block) -> np.ndarray:
        """``w + scale * b @ a`` of a block, in float32 or wider."""
        # ml_dtypes such as bfloat16 are of kind "V", for which NumPy has no promotion
        dtype = np.promote_types(w.dtype, np.float32) if w.dtype.kind == "f" else np.dtype(np.float32)
        update = (self.scale * self.b[block].astype(dtype)) @ self.a[block[0]].astype(dtype)
        return w[block].astype(dtype) + update

    def _gain(self, w: np.ndarray) -> Callable[[Block], np.ndarray | float]:
        """What DoRA multiplies a block by: the magnitude over the length, which takes a first pass over the weight."""
        if self.magnitude is None:
            return lambda block: 1.0
        squares = np.zeros(self.magnitude.shape, np.float32)
        over_rows = self.magnitude.shape[1:] != (w.shape[1], 1)
        for expert, rows in self._blocks(w):
            block_squares = np.square(self._updated(w, (expert, rows)))
            outputs = slice(None) if over_rows else rows
            squares[expert, outputs] += block_squares.sum(axis=0 if over_rows else 1, keepdims=True)
        gain = self.magnitude.astype(np.float32) / np.sqrt(squares)
        return lambda block: gain[block[0]] if over_rows else gain[block]


@dataclasses.dataclass(frozen=True)
class Replacement:
    """New values of a tensor, or of some of its rows.

    Attributes:
        read: Reads them.
        rows: The rows that they are; None for all.
    """

    read: Callable[[], np.ndarray]
    rows: tuple[int, ...] | None = None

    def apply(self, tensor: np.ndarray) -> None:
        """Changes ``tensor`` in place."""
        tensor[slice(None) if self.rows is None else list(self.rows)] = self.read().astype(tensor.dtype)


Patches = dict[str, list[Update | Replacement]]


def patches(adapter: Path, base: Specs, *, experts: str | None = None) -> Patches:
    """What is to be done, in order, to each tensor of ``base`` that the adapter changes.

    Args:
        adapter: The directory of a PEFT adapter.
        base: Dtype and shape of every tensor of the base.
        experts: How the base has its experts, where the shapes do not tell: ``"out_in"`` for
            ``[expert, out, in]``, as most models, or ``"in_out"``.

    Raises:
        ValueError: Anything in the adapter has no place in the base; all of it is listed.
    """
    config, file = open_adapter(adapter)
    modules = {name.rpartition(".")[0] for name in base}
    patcher = Patcher(file, config, base, read_keys(file, modules.__contains__), experts)
    problems = [*itertools.islice(patcher.place_all(), MAX_LISTED)]
    if problems:
        raise ValueError("\n".join([f"{file.path} does not fit the base:", *map(_line, problems)]))
    return patcher.patches


def _line(problem: str) -> str:
    return f"  {printable(problem, 500)}"


class Patcher:
    """Finds the tensor of the base that each tensor of an adapter changes. Its methods return problems, as text."""

    def __init__(self, file: safetensors.File, config: Config, base: Specs, keys: Keys, experts: str | None) -> None:
        self.file, self.config, self.base, self.keys = file, config, base, keys
        self.magnitudes = {key.module: key.key for key in keys.extras if key.extra.field == "magnitude"}
        self.modules = group_by(keys.pairs, lambda pair: pair.module)
        self.rename = _prefix({*self.modules, *(name.rpartition(".")[0] for name in keys.full)}, base)
        # whether the experts of the base may be [expert, out, in] (False) and [expert, in, out] (True)
        is_in_out = experts == "in_out" or config.exchanges_experts
        self.expert_layouts = (False, True) if experts is None else (is_in_out,)
        self.children = group_by(base, lambda name: name.rpartition(".")[0])
        self.is_transposed = self._vote()
        self.searches = 0
        self.patches: Patches = {}

    def place_all(self) -> Iterator[str]:
        """Places every tensor of the adapter; yields the problems."""
        for key, reason in self.keys.unexpected.items():
            yield f"unexpected: {key} {reason}"
        for module, pairs in self.modules.items():
            yield from self._place_module(module, sorted(pairs, key=lambda pair: -pair.depth))
        for name, key in self.keys.full.items():
            yield from self._place_full(self.rename(name), key)
        for module, key in self.magnitudes.items():
            if module not in self.modules:
                yield f"{key} has no lora_A and lora_B beside it"
        for key in self.keys.extras:
            if key.extra.field == "rows":
                yield from self._place_rows(key.key, key.module, self.rename(key.module) + ".weight")

    def _vote(self) -> bool:
        """Whether square weights are ``[in, out]``: if the other weights are; if there are none, the config says."""
        votes = set()
        for pair in self.keys.pairs:
            a, b = self._shapes(pair)
            shape = self._base_shape(self.rename(pair.module) + ".weight")
            is_matrix = len(shape) == len(a) == len(b) == 2 and not pair.is_embedding and not pair.depth
            if is_matrix and shape[0] != shape[1]:
                votes.add(shape != (b[0], a[1]))
        return votes.pop() if len(votes) == 1 else bool(self.config["fan_in_fan_out"])

    def _base_shape(self, name: str) -> Shape:
        return self.base[name][1] if name in self.base else ()

    def _shapes(self, pair: FactorPair) -> tuple[Shape, Shape]:
        return self.file.entries[pair.a].shape, self.file.entries[pair.b].shape

    def _place_module(self, module: str, pairs: Sequence[FactorPair]) -> list[str]:
        """The factors of one module, the innermost first."""
        target = self.rename(module)
        weight = f"{target}.weight"
        if [pair.depth for pair in pairs] == [0] and weight in self.base:
            return self._place_weight(pairs[0], weight)
        names = [name for name in self.children.get(target, ()) if self.config.targets_parameter(name)]
        shapes = [self._shapes(pair) for pair in pairs]
        places: list[tuple[list[str], bool]] = []
        is_certain = len({*shapes}) == len(shapes)
        for is_in_out in self.expert_layouts:
            expected = {name: pair for name in names if (pair := self._experts_shapes(name, is_in_out))}
            order = assign(shapes, expected)
            if order is not None:
                places.append((order, is_in_out))
                is_certain &= sum(pair in shapes for pair in expected.values()) == len(shapes)
        if not places:
            return [f"{module} has no place{self._nearest(weight)}"]
        if len(places) > 1 or not is_certain:
            return [
                f"{module}: {', '.join(names)} can be [expert, out, in] or [expert, in, out] by shape; say which with "
                "experts='out_in' or experts='in_out' (--experts)"
            ]
        ((order, is_in_out),) = places
        for name, pair in zip(order, pairs, strict=True):
            self.patches[name] = [self._experts_update(name, pair, is_in_out)]
        return []

    def _nearest(self, weight: str) -> str:
        """The name in the base nearest to ``weight``, for the first few: the search takes a while in a large base."""
        self.searches += 1
        return (
            f" (nearest in the base: {nearest(weight, [*self.base], 1)[0]})" if self.base and self.searches < 4 else ""
        )

    def _place_weight(self, pair: FactorPair, name: str) -> list[str]:
        """Linear, Conv1D, embedding and convolution."""
        module = pair.module
        (a_shape, b_shape), (dtype, shape) = self._shapes(pair), self.base[name]
        if len(a_shape) < 2 or len(b_shape) != len(a_shape):
            return [f"{module}: lora_A is {a_shape} and lora_B {b_shape}, which are not two factors"]
        rank, outputs = a_shape[0], b_shape[0]
        if rank != self.config.rank(module):
            return [f"{module} has rank {rank}, adapter_config.json says {self.config.rank(module)}"]
        if dtype.kind not in "fV":
            return [f"{name} is {dtype}: a quantized base cannot be merged into"]
        out_in = (outputs, *a_shape[1:])
        fits_in_out = len(shape) == 2 and out_in[::-1] == shape
        is_in_out = pair.is_embedding or (fits_in_out and (out_in != shape or self.is_transposed))
        if math.prod(b_shape[1:]) != rank or (out_in[::-1] if is_in_out else out_in) != shape:
            return [f"{module}: lora_B @ lora_A is {out_in}, {name} is {shape}"]
        use_dora, key = bool(self.config["use_dora"]), self.magnitudes.get(module)
        if (key is not None) != use_dora:
            has = "a" if key else "no"
            return [f"{module} has {has} lora_magnitude_vector, adapter_config.json says use_dora={use_dora}"]
        magnitude = None if key is None else self.file.read(key)
        if magnitude is not None:
            if magnitude.size != outputs:
                return [f"{key} has {magnitude.size} entries, {name} {outputs} outputs"]
            magnitude = magnitude.reshape((1, 1, outputs) if is_in_out else (1, outputs, 1))
        a, b = self.file.read(pair.a).reshape(rank, -1), self.file.read(pair.b).reshape(-1, rank)
        a, b = (b.T, a.T) if is_in_out else (a, b)
        self.patches[name] = [Update(a[None], b[None], self.config.scale(module, rank), magnitude, is_in_out)]
        return []

    def _place_full(self, name: str, key: str) -> list[str]:
        """A parameter saved in full; the base weight that PEFT saves beside an adapter is not one."""
        shape = self.file.entries[key].shape
        if name not in self.base:
            return [f"{key} {shape} has no place"]
        dtype, base_shape = self.base[name]
        if base_shape != shape:
            return [f"{key} {shape} has no place: {name} is {base_shape}"]
        if dtype.kind in "fV" and self.file.entries[key].dtype.kind not in "fV":
            return [f"{key} holds {self.file.entries[key].dtype}, {name} is {dtype}"]
        self.patches.setdefault(name, [Replacement(functools.partial(self.file.read, key))])
        return []

    def _place_rows(self, key: str, module: str, name: str) -> list[str]:
        """Trained token rows; they come after the embedding itself, which PEFT saves too where it was resized."""
        tokens, shape = self.config.tokens(module), self._base_shape(name)
        if not tokens:
            return [f"{key}: adapter_config.json names no trainable_token_indices for {module}"]
        rows = self.file.entries[key].shape
        if len(shape) != 2 or rows != (len(tokens), shape[1]) or max(tokens) >= shape[0]:
            return [f"{key} {rows}: rows {list(tokens)} have no place, {name} is {shape or 'missing'}"]
        before = self.patches.setdefault(name, [])
        if any(isinstance(patch, Update) for patch in before):
            return [f"{key}: {name} has an adapter too, which PEFT does not allow"]
        before.append(Replacement(functools.partial(self.file.read, key), tokens))
        return []

    def _experts_shapes(self, name: str, is_in_out: bool) -> Shapes | None:
        """The shapes of A and B for a parameter ``[E, d1, d2]``, A over ``d2`` or over ``d1``, or ``[d1, d2]``."""
        _, shape = self.base[name]
        if len(shape) not in (2, 3) or (len(shape) == 2 and is_in_out) or 0 in shape:
            return None
        rank = (shape[0] if len(shape) == 3 else 1) * self.config.rank(name)
        columns, rows = shape[-2:] if is_in_out else shape[-2:][::-1]
        return (rank, columns), (rows, rank)

    def _experts_update(self, name: str, pair: FactorPair, is_in_out: bool) -> Update:
        """The update of a parameter reached through ``target_parameters``."""
        rank = self.config.rank(name)
        a, b = self.file.read(pair.a), self.file.read(pair.b)
        experts = a.shape[0] // rank
        a, b = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts).transpose(2, 0, 1)
        if is_in_out:
            a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
        return Update(a, b, self.config.scale(name, rank), is_in_out=is_in_out)


def _prefix(modules: Iterable[str], base: Specs) -> Callable[[str], str]:
    """Torch names as the base has them: alike, or all under (or out of) one prefix, as ``bert.``."""
    owners = {name.rpartition(".")[0] for name in base}
    owners |= {owner.rpartition(".")[0] for owner in owners}
    modules = sorted(modules, key=len)
    if not modules or any(module in owners for module in modules):
        return lambda name: name
    shortest = modules[0]
    top = shortest.partition(".")[0] + "."
    if all(module.startswith(top) and module.removeprefix(top) in owners for module in modules):
        return lambda name: name.removeprefix(top)
    added = {owner.removesuffix(shortest) for owner in owners if owner.endswith("." + shortest)}
    fitting = [prefix for prefix in added if all(prefix + module in owners for module in modules)]
    return (lambda name: fitting[0] + name) if len(fitting) == 1 else (lambda name: name)
