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
import numpy as np
from jax.core import Tracer

from lojax.adapters.adapter import is_adapter
from lojax.adapters.bank import Bank
from lojax.adapters.create import check_key
from lojax.adapters.initializers import key_for
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths, path_of
from lojax.adapters.stack import stack
from lojax.adapters.trees import check_pair
from lojax.lowrank.bank_value import BankValue, from_bank, mix_full, pick_full, prefers_wide
from lojax.lowrank.value import Dropout, LowRank
from lojax.rewrite.batch_axes import BatchAxes, named_axes, probe_outputs, split_arguments
from lojax.rewrite.evaluate import evaluate, frozen_leaf
from lojax.rewrite.interpreter import Interpreter
from lojax.rewrite.recorder import Use
from lojax.text import spec
from lojax.types import Array, Key, Leaf, Params, Path, PyTree

CACHE = "cache"
"""The collection of a Linen ``variables`` dict that holds an entry for each row: keys and values while decoding."""


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
        without = map_paths(lambda path, leaf: None if path in in_full else leaf, frozen)
        check_pair(without, one_entry(bank))
        if not isinstance(choice, Tracer):
            _check_base(choice, in_full - {*self.base}, trained)
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


def one_entry(bank: Bank) -> Params:
    """The shapes of one adapter of a bank, with the largest rank, as a ``lora`` tree."""

    def entry(_: Path, leaf: Leaf) -> Leaf:
        if leaf is None:
            return None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), leaf)
        return dataclasses.replace(shapes, entries=None, ranks=None) if is_adapter(shapes) else shapes

    return map_paths(entry, bank.lora)


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


def check_bank(lora: Params | Bank | None) -> Bank:
    """``lora``, if it is a bank.

    Raises:
        TypeError: It is not.
    """
    if isinstance(lora, Bank):
        return lora
    what = "None" if lora is None else "one adapter"
    raise TypeError(
        f"adapter= picks adapters of a bank, and lora is {what}. Make a bank with lojax.stack([lora, ...]), or leave "
        "adapter= out."
    )


def check_choice(bank: Bank, adapter: Any) -> Array:
    """``adapter`` as an array.

    Raises:
        TypeError: ``adapter`` is of a kind that names no adapters.
        ValueError: A number is out of range, or the shape is not one of those expected.
    """
    if isinstance(adapter, str):
        adapter = bank.index(adapter)
    elif isinstance(adapter, (list, tuple)) and any(isinstance(name, str) or name is None for name in adapter):
        adapter = bank.ids(adapter)
    choice = jnp.asarray(adapter)
    if choice.size == 0:
        raise ValueError("adapter= is empty; expected the number of an adapter for each row of the batch.")
    usage = f"expected integers [batch] from -1 (the base alone) to {len(bank) - 1}, or floats [batch, {len(bank)}]"
    if jnp.issubdtype(choice.dtype, jnp.integer):
        if choice.ndim > 1:
            raise ValueError(f"adapter= is {spec(choice)}; {usage}.")
        if not isinstance(choice, Tracer):
            values = np.asarray(choice)
            bad = values[(values < -1) | (values >= len(bank))]
            if bad.size:
                raise ValueError(f"adapter= holds {bad[0]}, and the bank {len(bank)} adapters; {usage}.")
        return choice.astype(jnp.int32)
    if not jnp.issubdtype(choice.dtype, jnp.floating):
        raise TypeError(f"adapter= is {spec(choice)}; {usage}.")
    if choice.ndim != 2 or choice.shape[1] != len(bank):
        raise ValueError(f"adapter= is {spec(choice)}; {usage}.")
    return choice


def _check_base(choice: Array, without_base: set[Path], trained: Mapping[Path, Leaf]) -> None:
    """Raises where -1 is to be the base alone and frozen does not hold the base."""
    if not jnp.issubdtype(choice.dtype, jnp.integer) or not np.any(np.asarray(choice) == -1):
        return
    if without_base:
        raise ValueError(
            f"adapter=-1 is the base alone, and {min(without_base)} is trained in full: frozen holds None there. Put "
            "the value of the base into frozen."
        )
    moved = [path for path, leaf in trained.items() if is_adapter(leaf) and leaf.moved_base]
    if moved:
        raise ValueError(
            f"adapter=-1 is the base alone, and the start of {moved[0]} was taken out of its weight, so frozen is not "
            "the base. Save the adapters with lojax.save(..., start=lora_at_init), and stack them on the pretrained "
            "weights."
        )


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


def check_active(active: Any, rows: int) -> Array:
    """``active`` as an array, or an error unless it says for every row on which tokens its adapter acts."""
    active = jnp.asarray(active)
    if active.dtype != bool or active.ndim != 2 or active.shape[0] != rows:
        raise ValueError(
            f"active= is {spec(active)}; expected bool [{rows}, T]: for each row, the tokens on which its adapter acts "
            "(lojax.active_tokens makes it)."
        )
    return active


def check_invocation(lora: Params) -> None:
    """Raises if an adapter acts from its invocation tokens on, and nobody said where those stand."""
    for path, leaf in flatten(lora).items():
        if not is_adapter(leaf):
            continue
        own = [leaf.invocation_tokens, *(entry.invocation_tokens for entry in leaf.entries or () if entry is not None)]
        if any(own):
            raise ValueError(
                f"{path}: this adapter acts from its invocation tokens {next(filter(None, own))} on. Say where that "
                "is: apply(..., active=lojax.active_tokens(tokens, lora))."
            )


def split_cache_axes(batch_axes: BatchAxes, kwargs: Mapping[str, Any]) -> tuple[BatchAxes, Any]:
    """``batch_axes`` without its entry for the cache, and that entry: axes, or "auto"."""
    if isinstance(batch_axes, Mapping) and CACHE in batch_axes and CACHE not in kwargs:
        return {name: axis for name, axis in batch_axes.items() if name != CACHE}, batch_axes[CACHE]
    return batch_axes, "auto"


def find_cache_axes(cache: PyTree, rows: int, asked: Any) -> PyTree:
    """The axis of rows of each leaf of a Linen cache: the one of their number. What counts the steps has none."""
    if asked != "auto":
        return asked

    def axis(keys: tuple[Any, ...], leaf: Any) -> int | None:
        axes = [d for d, n in enumerate(jnp.shape(leaf)) if n == rows]
        if len(axes) > 1:
            raise ValueError(
                f"{CACHE}/{path_of(keys)} ({spec(leaf)}) has {len(axes)} axes of the length of the batch, {rows}. Say "
                'which one counts the rows with batch_axes={"cache": axis}, or a tree of axes.'
            )
        return axes[0] if axes else None

    return jax.tree_util.tree_map_with_path(axis, cache)


def _without_axis(x: Array, axis: int, name: str) -> Array:
    if x.ndim <= axis or x.shape[axis] != 1:
        raise ValueError(
            f"The output {name} has an axis {axis} for the rows of the batch, and for one row it is {spec(x)}: the net "
            "holds an array with as many rows as the batch. Pass that array as an argument."
        )
    return jnp.squeeze(x, axis)
