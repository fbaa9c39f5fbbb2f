"""Trees to save, and ways to damage what was saved."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import trained

import lojax
from lojax.checkpoint import adapter_directory as files


def params(seed: int = 0) -> dict[str, Any]:
    """A small base: two kernels ``[16, 8]``, a head ``[8, 3]``, an embedding in bfloat16."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "params": {
            "embed": {"table": draw(5, 4).astype(jnp.bfloat16)},
            "head": {"bias": draw(3), "kernel": draw(8, 3)},
            "layer_0": {"query": {"kernel": draw(16, 8)}, "value": {"kernel": draw(16, 8)}},
        }
    }


def pair(seed: int = 0) -> tuple[Any, Any]:
    """``(frozen, lora)`` over `params`: adapters on query and value, the head in full."""
    targets = ["**/query/kernel", "**/value/kernel"]
    key = jax.random.key(seed)
    frozen, lora = lojax.init(key, params(), targets, rank=4, alpha=8, train="**/head/*", dropout=0.1)
    return frozen, trained(lora, seed)


def at_step(step: int) -> dict[str, Any]:
    """A lora whose every value tells the step at which it was saved."""
    rng = np.random.default_rng(step)
    a, b, head = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 8), (8, 32), (32, 3)))
    adapter = lojax.Adapter(a, b, 2.0, ("in", "out"), 0.0)
    return {"head": head, "query": adapter, "rest": None, "step": np.full(3, step, np.int32)}


def save_full(path: Path, lora: Any, **settings: Any) -> Any:
    """Saves a lora without an adapter: all of it is trained in full, and ``frozen`` says so."""
    return lojax.save(path, lora, frozen=jax.tree.map(lambda _: None, lora), **settings)


def arrays_folder(path: Path) -> Path:
    """The folder that the checkpoint at ``path`` names."""
    return path / json.loads((path / files.MANIFEST).read_text())["arrays"]


def forge(path: Path, change: Any) -> None:
    """Changes ``adapter.json`` and makes its checksum right again, as an attacker would."""
    record = json.loads((path / files.MANIFEST).read_text())
    del record["checksum"]
    change(record)
    value = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
    (path / files.MANIFEST).write_text(json.dumps({**record, "checksum": value}))


def run_in_two_processes(program: str, path: Path) -> None:
    """Runs ``program`` in two processes of one JAX program, of two devices each, with the number, a port, ``path``."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen([*command, str(i), port, str(path)], env=os.environ | flags) for i in range(2)]
    try:
        assert [process.wait(120) for process in running] == [0, 0]
    finally:
        for process in running:  # where one fails, the other would wait for it
            process.kill()
            process.wait()


def save_forever(path: str, progress: Any, at_step: Callable[[int], Any] = at_step) -> None:
    """Saves one step after another and tells the last one that is complete, until killed."""
    step = progress.value
    while True:
        step += 1
        lojax.save(path, at_step(step), metadata={"step": step})
        progress.value = step
