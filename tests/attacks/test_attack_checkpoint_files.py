"""Broken checkpoints: an error that names the path, or the adapter bit for bit. Never other values, never a hang."""

from __future__ import annotations

import copy
import random
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_same_bits

import lojax
from lojax.checkpoint.adapter_directory import MANIFEST
from tests.attacks.attack import draw, size
from tests.checkpoint import checkpoint_cases as cases

SECONDS = 20  # for one restore, in CPU time


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """One of the things that disks, networks and people do to a file."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice([1, 4, 64, len(data)]))
    kind = rng.choice(["flip", "cut", "zero", "double", "remove", "noise", "append"])
    if kind == "flip":
        flipped = bytearray(data or b"\0")
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    middle = {
        "cut": b"",
        "zero": bytes(stop - start),
        "double": data[start:stop] * 2,
        "remove": b"",
        "noise": rng.randbytes(stop - start),
        "append": data[start:stop] + rng.randbytes(8),
    }[kind]
    return data[:start] + middle + (b"" if kind == "cut" else data[stop:])


def damage_folder(rng: random.Random, path: Path) -> str:
    """Damages a file of a checkpoint, or several; says what it did."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file, other = rng.choice(files), rng.choice(files)
    kind = rng.choice(["bytes", "bytes", "bytes", "delete", "copy over", "folder", "link"])
    if kind == "bytes":
        file.write_bytes(damage_bytes(rng, file.read_bytes()))
    elif kind == "delete":
        file.unlink()
    elif kind == "copy over":
        other.write_bytes(file.read_bytes())
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.unlink()
        file.symlink_to(other if other != file else path)
    return f"{kind}: {file.name}, {other.name}"


VALUES = [None, True, -1, 0, 3, 2**63, 10**400, 0.5, 1e308, "", "x", "../x", "\0", [], [[]], {}, {"shape": []}, ["in"]]


def damage_json(rng: random.Random, node: Any) -> None:
    """Replaces, removes, adds or swaps something at a random place in a tree of JSON."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        kind = rng.choice(["replace", "replace", "remove", "add", "swap"])
        if kind == "replace":
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "remove":
            del node[key]
        elif kind == "add" and isinstance(node, dict):
            node[rng.choice(["x", "a", "", "tokens", "rows", "../x"])] = copy.deepcopy(rng.choice(VALUES))
        else:
            other = rng.choice(keys)
            node[key], node[other] = node[other], node[key]
        return


@pytest.fixture
def whole(tmp_path):
    frozen, lora = cases.pair()
    lojax.save(tmp_path / "whole", lora, frozen=frozen)
    return tmp_path / "whole", frozen, lora


def restore(path: Path, rng: random.Random, frozen: Any, lora: Any) -> Any:
    """What `lojax.restore` gives, or the text of its error; it must be one that names the path, and soon."""
    settings = rng.choice([{}, {"frozen": frozen}, {"like": lora}])
    start = time.process_time()
    try:
        return lojax.restore(path, **settings)
    except (OSError, ValueError) as error:
        assert str(path) in str(error)
        return str(error)
    finally:
        assert time.process_time() - start < SECONDS


def test_broken_files(whole, tmp_path):
    path, frozen, lora = whole
    rng, refused = draw(), 0
    for _ in range(size(60)):
        broken = tmp_path / "broken"
        shutil.copytree(path, broken)
        print(damage_folder(rng, broken))
        result = restore(broken, rng, frozen, lora)
        if isinstance(result, str):
            refused += 1
        else:
            assert_same_bits(result, jax.tree.map(jnp.asarray, lora))
        shutil.rmtree(broken)
    print(f"{refused} of {size(60)} refused, the others whole")


def test_forged_manifests(whole, tmp_path):
    """With a checksum made right again. A forger may change a scale; a crash or a hang is what must not be."""
    path, frozen, lora = whole
    rng, refused = draw(), 0
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    text = (path / MANIFEST).read_text()
    for _ in range(size(60)):
        (broken / MANIFEST).write_text(text)
        changes = rng.choice([1, 1, 2, 5])
        cases.forge(broken, lambda manifest, n=changes: [damage_json(rng, manifest) for _ in range(n)])
        result = restore(broken, rng, frozen, lora)
        refused += isinstance(result, str)
    print(f"{refused} of {size(60)} refused")
