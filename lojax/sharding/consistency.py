"""Do all processes hold the same adapters? One that was started with another seed or file is found and named."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lojax.adapters.adapter import is_adapter
from lojax.adapters.metadata import unbox
from lojax.adapters.paths import flatten

Gather = Callable[[bytes], Sequence[bytes]]
"""Sends one process's bytes to all: what every process sent, in their order."""


def check_agreement(lora: Any, *, gather: Gather | None = None) -> None:
    """Raises unless every process holds the same adapters. Every process must call it.

    Compared are paths, shapes, dtypes, scales and axes; and the values of every array that a process holds whole.

    Args:
        lora: The trained tree of this process.
        gather: How bytes reach the other processes; the default is JAX's own runtime.

    Raises:
        ValueError: Some differ. The message names the path, the processes, and what each holds.

    >>> check_agreement({"w": np.ones(3)})
    """
    mine = json.dumps(_described(lora)).encode()
    everyone = [json.loads(text) for text in (gather or _all_processes)(mine)]
    paths = dict.fromkeys(path for one in everyone for path in one)
    for path in paths:
        held = [one.get(path, "nothing") for one in everyone]
        if len(set(held)) == 1:
            continue
        kinds = {kind: [i for i, h in enumerate(held) if h == kind] for kind in dict.fromkeys(held)}
        shown = "; ".join(f"process {', '.join(map(str, who))}: {kind}" for kind, who in kinds.items())
        raise ValueError(
            f"{path} differs between processes: {shown}. Start every process with the same key, settings and "
            "adapter files, or make the adapters under one jit (lojax.sharding.init_sharded)."
        )


def _described(lora: Any) -> dict[str, str]:
    found = {}
    for path, leaf in flatten(lora).items():
        leaf = unbox(leaf)
        if leaf is None:
            continue
        head = f"scale {leaf.scale}, axes {' '.join(leaf.axes)}, " if is_adapter(leaf) else ""
        found[path] = head + ", ".join(_array(unbox(x)) for x in jax.tree.leaves(leaf))
    return found


def _array(x: Any) -> str:
    text = f"{x.dtype}{list(x.shape)}"
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return text
    data = x.addressable_shards[0].data if isinstance(x, jax.Array) and x.is_fully_replicated else x
    return f"{text} crc {zlib.crc32(np.ascontiguousarray(data).tobytes()):08x}"


def _all_processes(text: bytes) -> list[bytes]:
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(np.asarray(everyone), sizes, strict=True)]
