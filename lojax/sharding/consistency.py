"""A check that all processes have the same adapters. It names the processes with another seed or file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.bank import Bank
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten
from lojax.text import spec
from lojax.types import Array, Params, Path

Gather = Callable[[bytes], Sequence[bytes]]
"""Sends the bytes of this process to all, and returns what every process sent, in process order."""


def check_agreement(lora: Params, *, gather: Gather | None = None) -> None:
    """Raises unless all processes have the same adapters. Every process must call it.

    It compares paths, shapes, dtypes, scales and axes, and the values of every array of which a process has all shards.

    Args:
        lora: The trained tree of this process, or its bank.
        gather: How bytes reach the other processes; the default is JAX's own runtime.

    Raises:
        ValueError: Some differ. The message names the path, the processes, and what each has.

    >>> check_agreement({"w": np.ones(3)})
    """
    # A few bytes for each array, not the array: every process gets the texts of all the others.
    description = json.dumps(_describe(lora)).encode()
    processes = [json.loads(text) for text in (gather or _gather)(description)]
    for path in dict.fromkeys(path for leaves in processes for path in leaves):
        holders: dict[str, list[str]] = {}
        for i, leaves in enumerate(processes):
            holders.setdefault(leaves.get(path, "nothing"), []).append(str(i))
        if len(holders) > 1:
            contents = "; ".join(f"process {', '.join(ids)}: {leaf}" for leaf, ids in holders.items())
            raise ValueError(
                f"{path} differs between processes: {contents}. Start every process with the same key, settings and "
                "adapter files, or make the adapters under one jit (lojax.sharding.init_sharded)."
            )


def _describe(lora: Params) -> dict[Path, str]:
    leaves = {path: unbox(leaf) for path, leaf in flatten(lora).items()}
    if isinstance(lora, Bank):
        leaves = {path.removeprefix("lora/"): leaf for path, leaf in leaves.items()}
    return {
        path: (f"{_describe_scale(leaf)}, axes {' '.join(leaf.axes)}, " if is_adapter(leaf) else "")
        + ", ".join(_describe_array(unbox(x)) for x in jax.tree.leaves(leaf))
        for path, leaf in leaves.items()
        if leaf is not None
    }


def _describe_scale(adapter: Adapter) -> str:
    if adapter.entries is None:
        return f"scale {adapter.scale}"
    own = [None if entry is None else (entry.scale, entry.rank) for entry in adapter.entries]
    return f"scales and ranks {own}"


def _describe_array(x: Array | np.ndarray) -> str:
    if isinstance(x, jax.Array):
        if not (x.is_fully_addressable or x.is_fully_replicated):
            return spec(x)
        # np.asarray refuses a replicated array whose other copies are on devices of other processes.
        x = x.addressable_shards[0].data if x.is_fully_replicated else x
    # The standard library's hash: the digest of `lojax.checkpoint` is made for gigabytes of base weights on a device,
    # and here some megabytes of adapters are hashed once. Eight bytes keep the message short.
    digest = hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=8).hexdigest()
    return f"{spec(x)} hash {digest}"


def _gather(text: bytes) -> list[bytes]:
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    # process_allgather needs the same shape in every process, so shorter texts are padded and cut again.
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(np.asarray(rows), sizes, strict=True)]
