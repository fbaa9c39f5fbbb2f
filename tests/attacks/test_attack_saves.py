"""Programs that are killed, that save to one path at once, that read while another saves: nothing is ever half."""

from __future__ import annotations

import functools
import os
import random
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_same_bits

import lojax
from lojax.checkpoint.adapter_directory import BANK, MANIFEST
from lojax.files.atomic_directory import atomic_directory
from tests.attacks.attack import draw, forkserver, size
from tests.checkpoint import bank_cases
from tests.checkpoint import checkpoint_cases as cases


def check_whole(path: Path) -> int:
    """The step whose adapter is at ``path``, bit for bit; anything else raises."""
    lora = lojax.restore(path)
    step = int(lora["step"][0])
    assert_same_bits(lora, jax.tree.map(jnp.asarray, cases.at_step(step)))
    return step


def kill_at_random(rng: random.Random, times: int, target: Any, path: Path, check: Any) -> None:
    """Kills one child after another that does ``target(path, progress)``, and checks what it leaves."""
    context, last = forkserver(), 0
    for trial in range(times):
        progress = context.RawValue("q", last)
        child = context.Process(target=target, args=(str(path), progress))
        child.start()
        if trial % 4:  # now and then even before its first step is complete
            deadline = time.monotonic() + 60
            while progress.value == last and time.monotonic() < deadline:
                time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2 if trial % 4 else 0.6))
        child.kill()
        child.join()
        assert child.exitcode == -9, f"the child ended by itself ({child.exitcode})"
        last = check(path, progress.value)


# --- killed while saving ---


def save_in_background_forever(path: str, progress: Any) -> None:
    """As `checkpoint_cases.save_forever`, with a save always under way while the next step is computed."""
    step = progress.value
    while True:
        step += 1
        saving = lojax.save(path, cases.at_step(step), wait=False)
        time.sleep(0.01)
        saving.result()
        progress.value = step


def check_checkpoint(path: Path, told: int) -> int:
    """The step that is left: the last one that the child knew to be complete, or the one after it."""
    if not (path / MANIFEST).exists():
        assert told == 0
        return 0
    step = check_whole(path)
    assert told <= step <= told + 1  # the rename may have come just before the kill
    finished = [entry.name for entry in path.iterdir() if (entry / "_CHECKPOINT_METADATA").exists()]
    assert cases.arrays_folder(path).name in finished
    return step


@pytest.mark.parametrize("target", [cases.save_forever, save_in_background_forever], ids=["waiting", "background"])
def test_killed_saves(tmp_path, target):
    kill_at_random(draw(), size(6), target, tmp_path / "adapter", check_checkpoint)
    lojax.save(tmp_path / "adapter", cases.at_step(1))
    assert len(os.listdir(tmp_path / "adapter")) == 2, "the next save removes what the killed ones left"


def check_bank(path: Path, told: int) -> int:
    """As `check_checkpoint`, for a bank."""
    if not (path / BANK).exists():
        assert told == 0
        return 0
    bank = lojax.restore(path)
    step = int(bank.lora["step"][0, 0])
    assert_same_bits(bank, bank_cases.at_step(step))
    assert told <= step <= told + 1
    return step


def test_killed_saves_of_a_bank(tmp_path):
    save_forever = functools.partial(cases.save_forever, at_step=bank_cases.at_step)
    kill_at_random(draw(), size(6), save_forever, tmp_path / "bank", check_bank)
    lojax.save(tmp_path / "bank", bank_cases.at_step(1))
    assert len(os.listdir(tmp_path / "bank")) == 2, "the next save removes what the killed ones left"


def replace_forever(path: str, progress: Any) -> None:
    """Replaces one directory of ten files after another."""
    step = progress.value
    while True:
        step += 1
        with atomic_directory(Path(path), overwrite=True) as fresh:
            for i in range(10):
                (fresh / str(i)).write_text(str(step))
        progress.value = step


def check_directory(path: Path, told: int) -> int:
    """The step whose ten files are all there."""
    if told == 0 and not path.exists():
        return 0
    (step,) = {int((path / str(i)).read_text()) for i in range(10)}
    assert told <= step <= told + 1
    return step


def test_killed_replacements_of_a_directory(tmp_path):
    """Between the two renames there was nothing at the target, and nobody removed what was left over."""
    kill_at_random(draw(), size(8), replace_forever, tmp_path / "out", check_directory)
    with atomic_directory(tmp_path / "out", overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]


# --- several at once ---


def save_some(path: str, first: int, count: int, done: Any) -> None:
    """Saves ``count`` steps, and says how many went well, or what went wrong."""
    try:
        for step in range(first, first + count):
            lojax.save(path, cases.at_step(step), wait=step % 3 != 0).result()
        done.put(count)
    except BaseException as error:
        done.put(f"{type(error).__name__}: {error}")


def test_processes_that_save_to_one_path(tmp_path):
    """They failed three times out of four, each with the other's unfinished arrays swept away."""
    context, count = forkserver(), max(1, size(12) // 3)
    done = context.Queue()
    children = [context.Process(target=save_some, args=(str(tmp_path), 1000 * i, count, done)) for i in range(3)]
    for child in children:
        child.start()
    results = [done.get(timeout=60 + 10 * count) for _ in children]
    for child in children:
        child.join()
    assert results == [count] * 3
    assert check_whole(tmp_path) % 1000 == count - 1
    assert len(os.listdir(tmp_path)) == 2


def test_a_reader_beside_a_saver(tmp_path):
    """One restore in twenty raised a TypeError out of orbax."""
    context, rng, step = forkserver(), draw(), 0
    progress = context.RawValue("q", 0)
    saver = context.Process(target=cases.save_forever, args=(str(tmp_path), progress))
    saver.start()
    deadline = time.monotonic() + 60
    while progress.value == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        for _ in range(size(15)):
            told = progress.value
            step = check_whole(tmp_path)
            assert step >= told, "an older adapter than the one that was complete before"
            time.sleep(rng.uniform(0, 0.02))
        assert saver.is_alive()
    finally:
        saver.kill()
        saver.join()
