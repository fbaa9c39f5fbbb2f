"""A batch whose rows use different adapters of a bank.

Each row is computed as a batch of one, under `jax.vmap`: what depends on the adapter is batched, and a product with a
frozen weight stays one product of all rows. So it works for any net whose rows do not meet, with one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lojax.adapters.adapter import is_adapter
from lojax.adapters.bank import Bank
from lojax.adapters.bank_shapes import check_bank_pair, drop_full
from lojax.adapters.create import check_key
from lojax.adapters.initializers import key_for
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.stack import stack
from lojax.lowrank.bank_value import BankValue, from_bank, mix_full, pick_full, prefers_wide
from lojax.lowrank.value import Dropout, LowRank
from lojax.rewrite.batch_axes import (
    CACHE,
    BatchAxes,
    find_cache_axes,
    named_axes,
    probe_outputs,
    split_arguments,
    split_cache_axes,
)
from lojax.rewrite.evaluate import evaluate, frozen_leaf
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.recorder import Use
from lojax.rewrite.row_choice import check_active, check_bank, check_base, check_choice, check_invocation
from lojax.text import spec
from lojax.types import Array, Key, Leaf, Params, Path, PyTree


@dataclasses.dataclass(frozen=True)
class MixedBatch:
    """What says which row uses which adapter.

    Attributes:
        bank: The adapters.
        adapter: ``int [batch]``, ``float [batch, N]``, or an ``int []`` for the whole batch.
        active: ``bool [batch, T]``, the tokens on which the adapters act; None for all.
        batch_axes: See `lojax.Model.apply`.
        check_rows: Whether to refuse a net whose rows meet.
    """

    bank: Bank
    adapter: Any
    active: Any = None
    batch_axes: BatchAxes = 0
    check_rows: bool = True

    def evaluate(
        self,
        f: Callable[..., PyTree],
        interpreter: Interpreter,
        frozen: Params,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        dropout_key: Key | None = None,
    ) -> PyTree:
        """``f`` of the adapted parameters, each row of its arguments with its own adapter."""
        choice = check_choice(self.bank, self.adapter)
        if dropout_key is not None:
            check_key(dropout_key, "dropout_key takes a PRNG key, a new one for each call.")
        if self.active is None:
            check_invocation(self.bank.lora)
        elif choice.ndim == 0:
            choice = jnp.full(jnp.shape(self.active)[:1], choice)
        values = _Values(frozen, self.bank, choice)
        if choice.ndim == 0:
            return evaluate(f, interpreter, values.pick(choice, dropout_key), args, kwargs)
        return self._by_row(f, interpreter, values, choice, args, kwargs, dropout_key)

    def _by_row(
        self,
        f: Callable[..., PyTree],
        interpreter: Interpreter,
        values: _Values,
        choice: Array,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        dropout_key: Key | None,
    ) -> PyTree:
        rows = choice.shape[0]
        active = None if self.active is None else check_active(self.active, rows)
        asked, cache_axes = split_cache_axes(self.batch_axes, kwargs)
        axes = named_axes(args, kwargs, asked)
        inputs = {f"args/{i}": x for i, x in enumerate(args)} | {f"kwargs/{name}": x for name, x in kwargs.items()}
        # A Linen net decodes with a collection of its variables that has an entry for each row.
        cache = values.cache
        arguments = split_arguments(
            inputs | {CACHE: cache}, rows, axes | {CACHE: find_cache_axes(cache, rows, cache_axes)}
        )

        def call(params: Params, inputs: dict[str, Any], interpreter: Interpreter) -> PyTree:
            own_args = [inputs[f"args/{i}"] for i in range(len(args))]
            own_kwargs = {name: inputs[f"kwargs/{name}"] for name in kwargs}
            return evaluate(f, interpreter, values.with_cache(params, inputs[CACHE]), own_args, own_kwargs)

        def probe(leaves: dict[int, Any]) -> PyTree:
            silent = Interpreter(interpreter.rules, "factored")
            return call(values.plain(), arguments.rebuild(leaves), silent)

        outputs = probe_outputs(probe, arguments, rows, self.check_rows)
        keys = None if dropout_key is None else jax.random.split(dropout_key, rows)
        uses: list[Use] = []
        tree: Any = None

        def row(own_choice: Array, own_key: Key | None, own_active: Array | None, own: list[Array]) -> list[Array]:
            nonlocal tree
            with interpreter.recorder.collect(uses):
                result = call(values.pick(own_choice, own_key, own_active), arguments.one_row(own), interpreter)
            leaves, tree = jax.tree.flatten(result)
            return [
                x if axis is None else _without_axis(x, axis, name)
                for x, axis, name in zip(leaves, outputs.axes, outputs.names, strict=True)
            ]

        mapped = jax.vmap(row, in_axes=(0, 0, 0, arguments.in_axes()), out_axes=list(outputs.axes))
        try:
            choice, keys, active = jax.tree.map(arguments.shard_like_rows, (choice, keys, active))
            leaves = mapped(choice, keys, active, arguments.own_keys(rows))
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            shared = [name for name, axis in zip(outputs.names, outputs.axes, strict=True) if axis is None]
            raise ValueError(
                f"One of the outputs {', '.join(shared)} has no axis for the rows of the batch and yet differs from "
                "row to row, as a mean over the batch, new batch statistics or a norm of the weights does. Return one "
                "value for each row, or call the net with one adapter (bank[i])."
            ) from error
        interpreter.recorder.replay(uses, rows)
        return jax.tree.unflatten(tree, leaves)


class _Values:
    """The parameters of all adapters: a `BankValue` at each adapted weight, a frozen weight at each other leaf."""

    def __init__(self, frozen: Params, bank: Bank, choice: Array):
        self.bank = bank
        self.cache = frozen.get(CACHE, None) if isinstance(frozen, Mapping) and "params" in frozen else None
        # A parameter trained in full may have its base value in frozen, which -1 then picks.
        trained = flatten(bank.lora)
        in_full = {path for path, leaf in trained.items() if leaf is not None and not is_adapter(leaf)}
        self.base = {path: leaf for path, leaf in flatten(frozen).items() if path in in_full and leaf is not None}
        check_bank_pair(frozen, bank)
        without = drop_full(frozen, bank.lora)
        if not isinstance(choice, Tracer):
            check_base(choice, in_full - {*self.base}, trained)
        self.weights = {path: frozen_leaf(leaf) for path, leaf in flatten(without).items()}
        self.adapted = {
            path: from_bank(path, unbox(self.weights[path]), leaf) for path, leaf in trained.items() if is_adapter(leaf)
        }

    def plain(self) -> Params:
        """The parameters without any update, for a trace of the net alone."""

        def put(path: Path, leaf: Leaf) -> Leaf:
            return self.weights[path] if leaf is None or is_adapter(leaf) else rebox(leaf, unbox(leaf)[0])

        return map_paths(put, self.bank.lora)

    def pick(self, choice: Array, key: Key | None, active: Array | None = None) -> Params:
        """The parameters of one adapter, or of a weighted sum of them."""

        def put(path: Path, leaf: Leaf) -> Leaf:
            if leaf is None:
                return self.weights[path]
            if is_adapter(leaf):
                value = _with_active(self._value(self.adapted[path], choice), active)
                return rebox(self.weights[path], _with_dropout(value, leaf, path, key))
            return rebox(leaf, self._full(path, unbox(leaf), choice))

        return map_paths(put, self.bank.lora)

    def with_cache(self, params: Params, cache: PyTree) -> Params:
        """The parameters with the cache of one row."""
        return params if self.cache is None else {**params, CACHE: cache}

    def _value(self, value: BankValue, choice: Array) -> LowRank:
        if choice.ndim == 1:
            return value.mix(choice)
        if prefers_wide(value.width, jax.default_backend()):
            count = len(self.bank)
            inside = (choice >= -1) & (choice < count)
            weights = jnp.where(inside, jax.nn.one_hot(choice, count), jnp.nan)
            return value.mix(weights, choice)
        return value.pick(choice)

    def _full(self, path: Path, x: Array, choice: Array) -> Array:
        base = self.base.get(path)
        if choice.ndim == 1:
            if base is None:
                raise ValueError(
                    f"{path} is trained in full, and weights over adapters add to the value of the base. Put that into "
                    "frozen, or pass the number of one adapter for each row."
                )
            return mix_full(x, choice, unbox(base))
        return pick_full(x, choice, None if base is None else unbox(base))


def mixed_batch(
    lora: Params | Bank | None, adapter: Any, active: Any, batch_axes: BatchAxes, check_rows: bool
) -> MixedBatch | None:
    """The mixed batch that the arguments of `lojax.Model.apply` ask for; None where they ask for none."""
    if adapter is None and active is None:
        return None
    if adapter is None and lora is not None and not isinstance(lora, Bank):
        lora, adapter = stack([lora]), 0  # each row has the tokens on which it acts to itself
    if adapter is None and isinstance(lora, Bank):
        raise ValueError(f"lora is a stack of {len(lora)} adapters: say which row uses which with adapter=ids.")
    return MixedBatch(check_bank(lora), adapter, active, batch_axes, check_rows)


def _with_dropout(value: LowRank, adapter: Any, path: Path, key: Key | None) -> LowRank:
    if key is None:
        return value
    rates = {entry.dropout for entry in adapter.entries or () if entry is not None}
    if len(rates) > 1:
        raise ValueError(
            f"{path}: the adapters of the bank have the dropout rates {sorted(rates)}, and one program has one. Leave "
            "dropout_key out, or make them alike before lojax.stack."
        )
    return (
        dataclasses.replace(value, dropout=Dropout(key_for(key, path), adapter.dropout)) if adapter.dropout else value
    )


def _with_active(value: LowRank, active: Array | None) -> LowRank:
    if active is None:
        return value
    if value.gain is not None:
        raise ValueError(f"{value.path}: active= is for updates that add to their weight, and a DoRA one scales it.")
    return dataclasses.replace(value, active=active, fusible=False)


def _without_axis(x: Array, axis: int, name: str) -> Array:
    if x.ndim <= axis or x.shape[axis] != 1:
        raise ValueError(
            f"The output {name} has an axis {axis} for the rows of the batch, and for one row it is {spec(x)}: the net "
            "holds an array with as many rows as the batch. Pass that array as an argument."
        )
    return jnp.squeeze(x, axis)
