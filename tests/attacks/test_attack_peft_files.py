"""Hostile headers, hostile configs and broken folders of PEFT adapters: an error that names the file, and soon.

A folder that lojax wrote is loaded bit for bit or refused; one of real PEFT, which carries no hashes, may hold other
numbers. The command line prints nothing that a terminal would obey.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import shutil
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same_bits

import lojax
import lojax.peft
from lojax.cli.main import main
from lojax.files import safetensors
from tests.attacks.attack import draw, size
from tests.attacks.test_attack_checkpoint_files import VALUES, damage_bytes, damage_folder, damage_json
from tests.peft.layouts import CONV2D, EMBEDDING, EXPERTS, LAYOUTS, Layout, golden

SECONDS = 20  # of CPU time, for one attempt
CASES = {
    "linear": LAYOUTS["flat"],
    "patterns": LAYOUTS["heads"],
    "dora": LAYOUTS["scanned"],
    "tokens": EMBEDDING,
    "experts": EXPERTS,
    "conv2d": CONV2D,
}
HOSTILE = [
    *VALUES,
    "(", "(a+)+$", ".*" * 30, "²", "\x1b[31m", "\ud800", "a" * 5000, ["("], {"(": 4}, {"q": 10**400}, {"q": -1},
    [True], [2**70], {"embed": [2**70]}, {"": [1]}, {"embed": [1, 1]}, -(10**400), float("nan"), float("inf"),
    "all-linear", ["q"], ".*", [".*"] * 3, {".*": 3}, "0.18.0", "9" * 5000, [[["q"]]], {key: {} for key in "abc"},
]  # fmt: skip


@functools.cache
def base_of(case: str) -> Any:
    return CASES[case].base(golden(case)[1])


def attempt(path: Path, f: Callable[[], Any], outcomes: Counter[str]) -> Any:
    """What ``f`` gives, or None where it raises an error that names the path; anything else is a find."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields that nobody knows
            result = f()
        outcomes["taken"] += 1
        return result
    except (OSError, ValueError) as error:
        text = str(error)
        assert str(path) in text, f"an error that does not name the file: {text[:500]}"
        assert len(text) < 20_000 and all(line.isprintable() for line in text.splitlines())
        outcomes["refused"] += 1
        return None
    finally:
        assert time.process_time() - start < SECONDS


def try_all(path: Path, case: str, capsys: pytest.CaptureFixture[str], outcomes: Counter[str]) -> Any:
    """Loads, inspects and merges an adapter; returns what was loaded."""
    lora = attempt(path, lambda: lojax.peft.load(path, base_of(case), CASES[case].names), outcomes)
    base = path.parent / "model.safetensors"
    if not base.exists():
        safetensors.write_all(base, golden(case)[1], {})
    target = path.parent / "merged"
    for arguments in (["inspect", str(path)], ["merge", str(base), str(path), str(target), "--experts", "out_in"]):
        capsys.readouterr()
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(arguments)
        printed = "".join(capsys.readouterr())
        assert time.process_time() - start < SECONDS
        assert all(line.isprintable() for line in printed.splitlines())
        assert code == 0 or str(path) in printed or str(base) in printed, printed[:500]
        outcomes[f"{arguments[0]} {'refused' if code else 'taken'}"] += 1
    shutil.rmtree(target, ignore_errors=True)
    return lora


def hostile_header(rng: random.Random, header: dict[str, Any], data: bytes) -> bytes:
    """A file with a header that was tampered with."""
    kind = rng.choice(["json", "json", "json", "bytes", "keys", "numbers", "length"])
    if kind == "json":
        for _ in range(rng.choice([1, 1, 2, 5])):
            damage_json(rng, header)
    elif kind == "keys":
        entry = rng.choice(list(header.values()))
        extra = rng.choice(
            ["key{}", "base_model.model.{}.lora_A.weight", "base_model.model.{}.weight", "\x1b{}", "{}" * 99]
        )
        header |= {extra.replace("{}", str(i)): entry for i in range(rng.choice([1, 3, 3000]))}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if kind == "numbers":
        digits = b"9" * rng.choice([1, 19, 300, 4000, 5000])
        text = text.replace(str(rng.choice([0, 1, 2, 6])).encode(), digits, rng.choice([1, 3, 1000]))
    elif kind == "bytes":
        text = damage_bytes(rng, text)
    length = rng.choice([0, 7, 2**31, 2**63, len(text) + 1]) if kind == "length" else len(text)
    return struct.pack("<Q", length) + text + data


@pytest.mark.parametrize("case", ["linear", "tokens", "experts"])
def test_hostile_headers(case, tmp_path, capsys):
    rng, outcomes = draw(), Counter()
    path = tmp_path / "adapter"
    shutil.copytree(golden(case)[0], path)
    whole = (path / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length]
    for _ in range(size(10)):
        hostile = hostile_header(rng, json.loads(header), whole[8 + length :])
        (path / "adapter_model.safetensors").write_bytes(hostile)
        try_all(path, case, capsys, outcomes)
    print(f"{case}: {dict(outcomes)}")


@pytest.mark.parametrize("case", CASES)
def test_hostile_configs(case, tmp_path, capsys):
    rng, outcomes = draw(), Counter()
    path = tmp_path / "adapter"
    shutil.copytree(golden(case)[0], path)
    whole = json.loads((path / "adapter_config.json").read_text())
    for _ in range(size(10)):
        fields = json.loads(json.dumps(whole))
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            kind = rng.choice(["hostile", "hostile", "json"])
            if kind == "hostile":
                fields[rng.choice([*fields])] = copy.deepcopy(rng.choice(HOSTILE))
            else:
                damage_json(rng, fields)
        text = json.dumps(fields).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            text = damage_bytes(rng, text)
        (path / "adapter_config.json").write_bytes(text)
        try_all(path, case, capsys, outcomes)
    print(f"{case}: {dict(outcomes)}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("writer", ["lojax", "peft"])
def test_broken_folders(writer, case, tmp_path, capsys):
    rng, outcomes = draw(), Counter()
    whole, broken, lora = (
        tmp_path / "whole",
        tmp_path / "broken",
        written(writer, case, CASES[case], tmp_path / "whole"),
    )
    for _ in range(size(10)):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        print(damage_folder(rng, broken))
        result = try_all(broken, case, capsys, outcomes)
        if result is not None and writer == "lojax":
            assert_same_bits(result, lora)
    print(f"{writer}, {case}: {dict(outcomes)}")


def written(writer: str, case: str, layout: Layout, path: Path) -> Any:
    """Makes a whole folder of a writer; returns the adapter."""
    source, base = golden(case)[0], base_of(case)
    lora = lojax.peft.load(source, base, layout.names)
    if writer == "lojax":
        lojax.peft.save(path, lora, lojax.peft.freeze(base, lora), layout.names)
        return lojax.peft.load(path, base, layout.names)
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(source / name, path / name)
    return lora
