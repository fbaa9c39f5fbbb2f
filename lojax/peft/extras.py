"""What PEFT stores for a module besides A and B: DoRA's magnitude, and trained rows of an embedding.

Each kind is one class here, and reading, writing and the config know them through `Extra` alone. To add another,
write a class and list it in `EXTRAS`; `lojax.peft.patch` has what it does to a torch weight.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter
from lojax.adapters.axes import Axes, positions
from lojax.adapters.matrices import at_least_float32, column_squares
from lojax.adapters.metadata import unbox
from lojax.peft.config import Config
from lojax.peft.name_map import TorchParameter
from lojax.types import Dtype, Leaf, Path, Shape

Placed = Sequence[tuple[TorchParameter, np.ndarray]]
"""Tensors of a file, each with the weight of its module."""


class Extra(abc.ABC):
    """A kind of tensor.

    Attributes:
        suffix: What its keys end with.
        field: The field of `Adapter` that holds it.
        needs_factors: Whether a module has it beside A and B, or instead of them.
    """

    suffix: ClassVar[str]
    field: ClassVar[str]
    needs_factors: ClassVar[bool]

    @abc.abstractmethod
    def misfit(self, weight: TorchParameter, config: Config) -> str | None:
        """Why a weight cannot have this tensor; None if the config asks for it."""

    def missing(
        self, weights: Iterable[TorchParameter], present: Collection[TorchParameter], config: Config
    ) -> list[TorchParameter]:
        """The weights that lack the tensor, of those that may have it."""
        names = {weight.name for weight in present}
        return [weight for weight in weights if weight.name not in names and not self.misfit(weight, config)]

    @abc.abstractmethod
    def torch_shape(self, weight: TorchParameter, config: Config) -> Shape:
        """The shape of the tensor."""

    @abc.abstractmethod
    def add(self, adapter: Adapter | None, tensors: Placed, leaf: Leaf, config: Config, dtype: Dtype | None) -> Adapter:
        """The adapter of a leaf with the tensors of its modules, whose shapes are checked, in its ``field``."""

    @abc.abstractmethod
    def to_torch(self, weight: TorchParameter, adapter: Adapter, leaf: Leaf) -> np.ndarray:
        """The tensor for one module; raises where PEFT cannot express it. ``leaf``: the base weight, if known."""

    def is_idle(self, weight: TorchParameter, tensor: np.ndarray, leaf: Leaf) -> bool:
        """Whether the tensor leaves the base as it is."""
        return False

    @abc.abstractmethod
    def config_fields(self, adapters: Mapping[Path, Adapter], modules: Mapping[Path, str]) -> dict[str, Any]:
        """What the config says of it; raises if PEFT cannot express these adapters together."""


class _Magnitude(Extra):
    """DoRA's magnitude, ``[*stack, *out]`` in an adapter.

    PEFT scales every output: ``w' = m * (w + s b a) / |w + s b a|``, the length taken over all axes but out and held
    constant in the backward pass (Liu et al. 2024, arXiv:2402.09353, eq. 5 and 11): as here.

    >>> kernel = TorchParameter("conv.weight", "conv", "w", (3, 3, 2, 8), ("in", "in", "in", "out"), {}, "")
    >>> _Magnitude().torch_shape(kernel, Config({}))
    (1, 8, 1, 1)
    """

    suffix = ".lora_magnitude_vector"
    field = "magnitude"
    needs_factors = True

    def misfit(self, weight: TorchParameter, config: Config) -> str | None:
        return None if config["use_dora"] else f"adapter_config.json says use_dora={config['use_dora']}"

    def torch_shape(self, weight: TorchParameter, config: Config) -> Shape:
        return self._shape(weight, math.prod(weight.sizes("out")))

    def _shape(self, weight: TorchParameter, outputs: int) -> Shape:
        window = len(weight.own_axes("in")) - 1 if weight.kind == "conv" else 0
        return (1, outputs, *[1] * window) if window else (outputs,)

    def add(self, adapter: Adapter | None, tensors: Placed, leaf: Leaf, config: Config, dtype: Dtype | None) -> Adapter:
        assert adapter is not None
        weight = tensors[0][0]
        axes = [*positions(adapter.axes, "stack"), *positions(adapter.axes, "out")]
        magnitude = np.full([weight.shape[i] for i in axes], np.nan, np.float32)
        for one, tensor in tensors:
            self._check_parts(one)
            magnitude[one.at(axes)] = tensor.reshape(one.sizes("out"))
        missing = np.isnan(magnitude)
        if missing.any():  # columns of modules without an adapter: with their own lengths they stay as they are
            lengths = _column_lengths(leaf, adapter.axes)
            if lengths is None:
                raise ValueError(
                    f"{weight.path}: only {len(tensors)} of its modules are DoRA adapted, so the lengths of the other "
                    "columns must come from the base; pass its arrays, not shapes."
                )
            magnitude = np.where(missing, lengths, magnitude)
        return dataclasses.replace(adapter, magnitude=magnitude.astype(at_least_float32(adapter.a.dtype)))

    def to_torch(self, weight: TorchParameter, adapter: Adapter, leaf: Leaf) -> np.ndarray:
        self._check_parts(weight)
        if weight.is_experts:
            raise ValueError(
                f"{weight.path}: the adapter is a DoRA one, and PEFT has no DoRA on parameters such as {weight.name}. "
                "Use plain LoRA for it."
            )
        axes = [*positions(adapter.axes, "stack"), *positions(adapter.axes, "out")]
        magnitude = np.asarray(unbox(adapter.magnitude))[weight.at(axes)]
        return magnitude.reshape(self._shape(weight, magnitude.size))

    def _check_parts(self, weight: TorchParameter) -> None:
        for axis, index in weight.index.items():
            if isinstance(index, slice) and weight.roles()[axis] == "in":
                raise ValueError(
                    f"{weight.path}: the name rule {weight.rule!r} has {weight.module} as a part along the in axis "
                    f"{axis}, and DoRA takes the length of whole columns, across all parts. Keep the parts in leaves "
                    "of their own, or use plain LoRA."
                )

    def is_idle(self, weight: TorchParameter, tensor: np.ndarray, leaf: Leaf) -> bool:
        axes = weight.adapter_axes()
        lengths = _column_lengths(leaf, axes)
        if lengths is None:
            return False
        own = lengths[weight.at([*positions(axes, "stack"), *positions(axes, "out")])]
        rounding = max(1e-6, float(jnp.finfo(tensor.dtype).eps))
        return np.allclose(tensor.astype(np.float32).ravel(), own.ravel(), rtol=rounding)

    def config_fields(self, adapters: Mapping[Path, Adapter], modules: Mapping[Path, str]) -> dict[str, Any]:
        factored = {path: adapter for path, adapter in adapters.items() if adapter.a is not None}
        dora = [path for path, adapter in factored.items() if adapter.magnitude is not None]
        plain = [path for path, adapter in factored.items() if adapter.magnitude is None]
        if dora and plain:
            raise ValueError(
                f"PEFT has one use_dora for all adapters; {len(dora)} of these are DoRA ({dora[0]}) and {len(plain)} "
                f"are not ({plain[0]}). Use one variant for all, or save two adapters."
            )
        return {"use_dora": bool(dora)}


def _column_lengths(leaf: Leaf, axes: Axes) -> np.ndarray | None:
    """The length of each column of a weight, ``[*stack, *out]``; None where it is only a shape."""
    weight = unbox(leaf)
    if not hasattr(weight, "__array__"):
        return None
    return np.sqrt(np.asarray(column_squares(jnp.asarray(weight), axes), np.float32))


class _TokenRows(Extra):
    """Trained rows of an embedding: PEFT stores the new rows (and calls them ``delta``), an adapter what is added.

    An embedding has them instead of A and B. In an adapter they are ``[k, *out]``.
    """

    suffix = ".token_adapter.trainable_tokens_delta"
    field = "rows"
    needs_factors = False

    def misfit(self, weight: TorchParameter, config: Config) -> str | None:
        tokens = config.tokens(weight.module)
        if not tokens:
            return f"adapter_config.json names no trainable_token_indices for {weight.module}"
        if not is_table(weight):
            return f"token rows are of an embedding, and the name map has {weight.path} as a {weight.kind} weight there"
        if max(tokens) >= _vocabulary(weight):
            return (
                f"adapter_config.json trains row {max(tokens)}; {weight.path} {weight.shape} has {_vocabulary(weight)}"
            )
        return None

    def missing(
        self, weights: Iterable[TorchParameter], present: Collection[TorchParameter], config: Config
    ) -> list[TorchParameter]:
        # a bare list of rows is about the embedding that the file holds rows of, whichever that is
        is_settled = present and not isinstance(config["trainable_token_indices"], dict)
        return [] if is_settled else super().missing(weights, present, config)

    def torch_shape(self, weight: TorchParameter, config: Config) -> Shape:
        return len(config.tokens(weight.module) or ()), _features(weight)

    def add(self, adapter: Adapter | None, tensors: Placed, leaf: Leaf, config: Config, dtype: Dtype | None) -> Adapter:
        ((weight, rows),) = tensors
        tokens = config.tokens(weight.module) or ()
        why = "trainable_tokens_delta holds whole rows, of which the adapter keeps what is new"
        base = _base_rows(weight, tokens, leaf, why)
        delta = rows.astype(np.float32).reshape(base.shape) - base
        return Adapter(None, None, 1.0, weight.adapter_axes(), rows=delta.astype(dtype or rows.dtype), tokens=tokens)

    def to_torch(self, weight: TorchParameter, adapter: Adapter, leaf: Leaf) -> np.ndarray:
        if not is_table(weight):
            raise ValueError(
                f"{weight.path} {weight.shape} is {weight.module} as a {weight.kind} weight with axes {weight.axes} "
                f"by the name rule {weight.rule!r}; token rows are of an embedding, one leaf with one in axis."
            )
        assert adapter.tokens is not None
        if adapter.a is not None:
            raise ValueError(
                f"{weight.path} holds an adapter and token rows; PEFT has one or the other for an embedding. "
                "Train rows alone (train='tokens'), or the adapter without tokens=."
            )
        if adapter.axes != weight.adapter_axes():
            raise ValueError(
                f"{weight.path}: the token rows are of axes {adapter.axes}, the name rule {weight.rule!r} says "
                f"{weight.axes}. Correct the rule, or adapt the weight with axes= as the rule says."
            )
        base = _base_rows(weight, adapter.tokens, leaf, "PEFT stores whole rows, not what was added to them")
        return (base + np.asarray(unbox(adapter.rows), np.float32)).reshape(len(adapter.tokens), _features(weight))

    def config_fields(self, adapters: Mapping[Path, Adapter], modules: Mapping[Path, str]) -> dict[str, Any]:
        rows = {modules[path]: list(x.tokens) for path, x in adapters.items() if x.tokens is not None}
        return {"trainable_token_indices": rows or None}


def is_table(weight: TorchParameter) -> bool:
    """Whether a weight is a whole embedding, with one axis of rows: what PEFT can train rows of."""
    return weight.kind == "embedding" and not weight.index and weight.axes is not None and weight.axes.count("in") == 1


def _vocabulary(weight: TorchParameter) -> int:
    return math.prod(weight.sizes("in"))


def _features(weight: TorchParameter) -> int:
    return math.prod(weight.shape) // _vocabulary(weight)


def _base_rows(weight: TorchParameter, tokens: Sequence[int], leaf: Leaf, why: str) -> np.ndarray:
    """The rows of the base, ``[k, *out]``, in float32."""
    table = unbox(leaf)
    if not hasattr(table, "__array__"):
        raise ValueError(f"{weight.path}: {why}; pass the array of the embedding, not its shape.")
    (axis,) = weight.own_axes("in")
    if isinstance(table, jax.Array):  # which may be sharded over many devices: only the rows come to the host
        rows = jnp.take(table, jnp.array(tokens), axis=axis)
    else:
        rows = np.take(np.asarray(table), tokens, axis=axis)
    return np.moveaxis(np.asarray(rows, np.float32), axis, 0)


EXTRAS: tuple[Extra, ...] = (_Magnitude(), _TokenRows())
"""Every kind there is."""
