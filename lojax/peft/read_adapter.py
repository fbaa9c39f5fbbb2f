"""A PEFT adapter directory becomes a ``lora`` tree that fits a base."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from lojax.adapters.adapter import Adapter, box_arrays
from lojax.adapters.bank import Bank
from lojax.adapters.metadata import rebox, unbox
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.targets import nearest
from lojax.files import safetensors
from lojax.files.naming import as_path
from lojax.peft import factors, tensor_keys
from lojax.peft.config import CONFIG, Config, read_config
from lojax.peft.extras import EXTRAS
from lojax.peft.full_parameters import full_from_torch, full_index, full_shape
from lojax.peft.model_families import name_map as find_map
from lojax.peft.name_map import NameMap, Table, TorchParameter, group_by
from lojax.text import printable
from lojax.types import Dtype, Leaf, Params, Path, Shape

MAX_LISTED = 40
"""How many keys the text of an error lists."""


def load(
    path: str | os.PathLike[str], params: Params, name_map: NameMap | str, *, dtype: Dtype | None = jnp.float32
) -> Params:
    """The ``lora`` tree of a Hugging Face PEFT adapter.

    Several are one bank by ``lojax.stack([lojax.peft.load(path, params, name_map) for path in paths], names=...)``.

    Args:
        path: The directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        params: The base the adapter is for: a parameter tree, or a ``frozen`` tree. Shapes are enough
            (`jax.ShapeDtypeStruct`), except where only part of a scanned leaf is saved in full or has a DoRA
            adapter, and for trained token rows.
        name_map: A `NameMap`, or the name of a ready one (see `name_maps`).
        dtype: The dtype of the adapters; None keeps that of the file. Parameters saved in full take the
            dtype of the base.

    Returns:
        A tree of the structure of ``params``: an `Adapter` at each adapted weight, an array at each
        parameter saved in full (``modules_to_save``, ``bias``), None elsewhere. `freeze` gives the
        ``frozen`` tree beside it. An embedding that ``params`` also uses as the output head is adapted
        in both uses; PEFT adapts the look-up alone (token rows both, as here). A scanned leaf of which only some
        layers have a DoRA adapter has a magnitude for the others too, their own lengths, which trains.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The files are damaged, need what lojax does not compute, or do not fit ``params``; the
            text lists every missing, unexpected and mis-shaped key. Nothing is loaded partly.
    """
    config, file = open_adapter(as_path(path))
    table = find_map(name_map).table(params)
    contents = match_keys(file, table, config)
    leaves = flatten(params)
    trained: dict[Path, Leaf] = dict(_adapters(file, contents, leaves, config, dtype))
    parameters = table.by_path()
    for leaf_path, saved in group_by(contents.full, lambda item: item[0].path).items():
        if leaf_path in trained:
            _check_same_base(leaves[leaf_path], saved, file)
        else:
            trained[leaf_path] = _full_leaf(leaves[leaf_path], len(parameters[leaf_path]), saved, file)
    return map_paths(lambda leaf_path, _: trained.get(leaf_path), params)


def freeze(params: Params, lora: Params) -> Params:
    """The ``frozen`` tree beside ``lora``: ``params``, with None where ``lora`` holds the parameter in full.

    Args:
        params: The base.
        lora: What `load` returned, or the `lojax.Bank` of several.

    Returns:
        The ``frozen`` tree.
    """
    lora = lora.lora if isinstance(lora, Bank) else lora
    return map_paths(lambda _, p, t: p if t is None or isinstance(t, Adapter) else None, params, lora)


def open_adapter(directory: pathlib.Path) -> tuple[Config, safetensors.File]:
    """The config and the weights of an adapter directory.

    Raises:
        FileNotFoundError: One of them is missing.
        ValueError: One of them is damaged, they do not belong together, or the weights are a pickle.
    """
    config = read_config(directory)
    path, pickled = directory / tensor_keys.WEIGHTS, directory / "adapter_model.bin"
    if not path.is_file() and pickled.exists():
        raise ValueError(
            f"{pickled} is a pickle, which can run any code when it is opened; lojax reads safetensors only. If you "
            "trust its origin, convert it once with PyTorch: "
            "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
            f"'{tensor_keys.WEIGHTS}', metadata={{'format': 'pt'}})"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {tensor_keys.WEIGHTS}.")
    file = safetensors.open_file(path)
    _check_unchanged(config, file, directory / CONFIG)
    return config, file


def _check_unchanged(config: Config, file: safetensors.File, path: pathlib.Path) -> None:
    """Raises if the config differs from the copy that `save` put into the metadata of the weights."""
    try:
        fields = dict(json.loads(file.metadata.get(tensor_keys.CONFIG_RECORD, "{}")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file.path}: {tensor_keys.CONFIG_RECORD} in its metadata is not a JSON object.") from None
    changed = [name for name, value in fields.items() if config[name] != value]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path} is not the one that lojax wrote beside {file.path.name}: {printable(name)} is "
            f"{printable(repr(config[name]))}, and was {printable(repr(fields[name]))}. Fetch it again. If you changed "
            "it on purpose, take the record out of the weights: t = safetensors.numpy.load_file(path); "
            "safetensors.numpy.save_file(t, path, metadata={'format': 'pt'})"
        )


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds, by the torch parameter it is about.

    Attributes:
        factors: ``(parameter, key of A, key of B)``.
        full: ``(parameter, key)`` of each parameter saved in full.
        extras: ``(parameter, key)`` of each other tensor, by the field of `Adapter` that it goes to.
    """

    factors: list[tuple[TorchParameter, str, str]]
    full: list[tuple[TorchParameter, str]]
    extras: dict[str, list[tuple[TorchParameter, str]]]


def match_keys(file: safetensors.File, table: Table, config: Config) -> Contents:
    """The contents of a file, all of its keys checked.

    Raises:
        ValueError: Keys are missing, unexpected or mis-shaped; the text lists them.
    """
    weights = table.weights()
    keys = tensor_keys.read_keys(file, weights.__contains__)
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    pairs, unexpected = tensor_keys.match_factors(keys.pairs, weights, shapes, config)
    full = [(table.parameters[name], key) for name, key in keys.full.items() if name in table.parameters]
    unexpected += [key for name, key in keys.full.items() if name not in table.parameters]
    contents = Contents(pairs, full, {extra.field: [] for extra in EXTRAS})
    misfits = _place_extras(keys.extras, contents, weights, config)
    expected = [(p, key, full_shape(p)) for p, key in full]
    expected += [(w, key, e.torch_shape(w, config)) for e in EXTRAS for w, key in contents.extras[e.field]]
    problems = _misshapen_factors(pairs, shapes, config)
    problems += [_misshapen(p, key, shapes[key], want) for p, key, want in expected if shapes[key] != want]
    problems += misfits
    problems += [f"  unexpected: {printable(key)} {reason}" for key, reason in keys.unexpected.items()]
    problems += _list_keys("unexpected", unexpected, [tensor_keys.PREFIX + name for name in table.parameters])
    unexpected_keys = {*unexpected, *keys.unexpected}
    missing = [key for key in _missing(contents, weights, config) if key not in unexpected_keys]
    problems += _list_keys("missing", missing, ())
    if problems:
        raise ValueError(
            _misfit_text(file.path, problems, none_fit=not (pairs or full or any(contents.extras.values())))
        )
    return contents


def _place_extras(
    keys: Sequence[tensor_keys.ExtraKey],
    contents: Contents,
    weights: Mapping[str, Sequence[TorchParameter]],
    config: Config,
) -> list[str]:
    """Adds the extras to ``contents``; returns those that have no place, and why."""
    adapted = {weight.module: weight for weight, *_ in contents.factors if not weight.is_experts}
    misfits = []
    for key in keys:
        weight = adapted.get(key.module) or next(iter(weights.get(key.module, ())), None)
        if weight is None:
            reason = f"the name map has no weight of {key.module}"
        elif key.extra.needs_factors and key.module not in adapted:
            reason = f"{key.module} has no lora_A and lora_B beside it"
        elif not key.extra.needs_factors and key.module in adapted:
            reason = f"{key.module} has an adapter too, which PEFT does not allow"
        else:
            reason = key.extra.misfit(weight, config)
        if weight is None or reason:
            misfits.append(f"  unexpected: {printable(key.key)} ({printable(reason)})")
        else:
            contents.extras[key.extra.field].append((weight, key.key))
    return misfits


def _missing(contents: Contents, weights: Mapping[str, Sequence[TorchParameter]], config: Config) -> list[str]:
    """The keys that the config asks for and the file lacks."""
    every = [weight for group in weights.values() for weight in group]
    factored = [weight for weight, *_ in contents.factors]
    names = {weight.name for weight in factored}
    unadapted = [weight for weight in every if weight.name not in names and _is_wanted(weight, config)]
    missing = [key for weight in unadapted for key in tensor_keys.factor_keys(weight)]
    for extra in EXTRAS:
        candidates = [*factored, *unadapted] if extra.needs_factors else every
        present = [weight for weight, _ in contents.extras[extra.field]]
        missing += [tensor_keys.extra_key(extra, weight) for weight in extra.missing(candidates, present, config)]
    return missing


def _is_wanted(weight: TorchParameter, config: Config) -> bool:
    return config.targets_parameter(weight.name) if weight.is_experts else config.targets(weight.module)


def _misshapen_factors(
    pairs: Sequence[tuple[TorchParameter, str, str]], shapes: Mapping[str, Shape], config: Config
) -> list[str]:
    """The factors of another shape than the weight needs, or of another rank, on which the scale depends."""
    lines = []
    for weight, *keys in pairs:
        got = tuple(shapes[key] for key in keys)
        rank, config_rank = factors.rank_in_file(weight, got[0]), config.rank(weight.config_key)
        if not rank or got not in [factors.torch_shapes(weight, rank, exchanged=e) for e in (False, True)]:
            triples = zip(keys, got, factors.torch_shapes(weight, rank or config_rank), strict=True)
            lines += [_misshapen(weight, key, shape, want) for key, shape, want in triples if shape != want]
        elif rank != config_rank:
            reason = f"adapter_config.json says {config_rank} for {weight.config_key}"
            lines.append(f"  of another adapter: {printable(keys[0])} has rank {rank}, {reason}")
    return lines


def _misshapen(parameter: TorchParameter, key: str, got: Shape, expected: Shape) -> str:
    return f"  mis-shaped: {printable(key)} is {got}; {parameter.path} {parameter.shape} needs {expected}"


def _list_keys(kind: str, keys: Sequence[str], known: Sequence[str]) -> list[str]:
    lines = [f"  {kind}: {printable(key)}" for key in keys]
    for i, key in enumerate(keys[:3] if known else ()):  # the search takes a while in a large base
        lines[i] += f" (nearest in the base: {nearest(key, known, 1)[0]})"
    return lines


def _misfit_text(path: pathlib.Path, problems: list[str], none_fit: bool) -> str:
    start = f"{path} does not fit the base:"
    hint = "Is this the base it was trained on, and does the name map fit it? print(name_map.table(params)) shows."
    if none_fit:
        start = f"{path} is an adapter for another architecture, or the name map is for another: no key fits the base."
    more = [f"  and {len(problems) - MAX_LISTED:,} more"] if len(problems) > MAX_LISTED else []
    return "\n".join([start, *problems[:MAX_LISTED], *more, hint])


def _adapters(
    file: safetensors.File, contents: Contents, leaves: Mapping[Path, Leaf], config: Config, dtype: Dtype | None
) -> dict[Path, Adapter]:
    """The adapter of each leaf that has one."""
    adapters: dict[Path, Adapter] = {}
    for path, pairs in group_by(contents.factors, lambda item: item[0].path).items():
        updates = [(weight, _read_update(file, weight, a, b, config, dtype)) for weight, a, b in pairs]
        adapters[path] = factors.assemble(updates, updates[0][1].a.dtype)
    for extra in EXTRAS:
        for path, keys in group_by(contents.extras[extra.field], lambda item: item[0].path).items():
            tensors = [(weight, file.read(key)) for weight, key in keys]
            adapters[path] = extra.add(adapters.get(path), tensors, leaves[path], config, dtype)
    return {path: _finish(leaves[path], adapter, config) for path, adapter in adapters.items()}


def _read_update(
    file: safetensors.File, weight: TorchParameter, key_a: str, key_b: str, config: Config, dtype: Dtype | None
) -> factors.TorchUpdate:
    a, b = (tensor if dtype is None else tensor.astype(dtype) for tensor in (file.read(key_a), file.read(key_b)))
    rank = factors.rank_in_file(weight, a.shape)
    straight, exchanged = (factors.torch_shapes(weight, rank, exchanged=e) for e in (False, True))
    # where in and out are of one size, the version of PEFT that wrote the file tells which is which
    is_old = config.exchanges_experts and weight.kind == "experts"
    is_exchanged = is_old if straight == exchanged else (a.shape, b.shape) == exchanged
    return factors.from_torch(weight, a, b, config.scale(weight.config_key, rank), exchanged=is_exchanged)


def _finish(leaf: Leaf, adapter: Adapter, config: Config) -> Adapter:
    """``adapter`` with JAX arrays, in boxes like that of its weight, and the dropout of the config."""
    arrays = {name: jnp.asarray(x) for name, x in adapter.arrays.items()}
    dropout = 0.0 if adapter.a is None else float(config["lora_dropout"] or 0.0)
    invocation = tuple(config["alora_invocation_tokens"] or ()) or None
    return box_arrays(leaf, dataclasses.replace(adapter, dropout=dropout, invocation_tokens=invocation, **arrays))


def _full_leaf(leaf: Leaf, count: int, saved: Sequence[tuple[TorchParameter, str]], file: safetensors.File) -> Leaf:
    """A leaf of ``count`` parameters, with those that are saved in full."""
    base = unbox(leaf)
    if len(saved) < count and not hasattr(base, "__array__"):
        raise ValueError(
            f"{saved[0][0].path}: {file.path} holds {len(saved)} of its {count} entries, so the others must come "
            "from the base; pass its arrays, not shapes."
        )
    value = np.array(base) if len(saved) < count else np.empty(base.shape, base.dtype)
    for parameter, key in saved:
        tensor = file.read(key)
        if jnp.issubdtype(base.dtype, jnp.floating) and tensor.dtype.kind not in "fV":
            raise ValueError(f"{file.path}: {printable(key)} holds {tensor.dtype}; {parameter.path} is {base.dtype}.")
        value[full_index(parameter)] = full_from_torch(parameter, tensor).astype(base.dtype)
    return rebox(leaf, jnp.asarray(value))


def _check_same_base(leaf: Leaf, saved: Sequence[tuple[TorchParameter, str]], file: safetensors.File) -> None:
    """Raises unless the base weight that PEFT saved beside the adapter of an embedding is that of ``leaf``."""
    base = unbox(leaf)
    if not hasattr(base, "__array__"):
        return
    for parameter, key in saved:
        ours = np.asarray(base)[full_index(parameter)].astype(np.float32)
        theirs = full_from_torch(parameter, file.read(key)).astype(np.float32)
        if not np.allclose(ours, theirs, atol=1e-6, rtol=1e-3):
            raise ValueError(
                f"{file.path}: {key} is the base weight that the adapter was trained on, and {parameter.path} differs "
                "from it. Put it into params first, or load the base that the adapter belongs to."
            )
