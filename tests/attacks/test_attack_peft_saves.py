"""Programs that are killed while they save a PEFT adapter: what is at the path is whole, or nothing ever was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import lojax
import lojax.peft
from tests.attacks.attack import draw, size
from tests.attacks.test_attack_saves import kill_at_random

NAMES = lojax.peft.NameMap.parse("w <-> w")
BASE = {"w": jnp.zeros((64, 48))}


def adapter(step: int) -> Any:
    """An adapter that says its step in every number, and in its scale."""
    return {
        "w": lojax.Adapter(jnp.full((64, 4), float(step)), jnp.full((4, 48), -float(step)), float(step), ("in", "out"))
    }


def save_forever(path: str, progress: Any) -> None:
    """Saves one step after another to one path."""
    step = progress.value
    while True:
        step += 1
        lojax.peft.save(path, adapter(step), BASE, NAMES)
        progress.value = step


def check(path: Path, told: int) -> int:
    """The step that is left: the last one that the child knew to be complete, or the one after it."""
    if told == 0 and not path.exists():
        return 0
    w = lojax.peft.load(path, BASE, NAMES)["w"]
    step = int(w.scale)
    assert (w.a == step).all() and (w.b == -step).all()
    assert told <= step <= told + 1
    return step


def test_killed_peft_saves(tmp_path):
    kill_at_random(draw(), size(6), save_forever, tmp_path / "adapter", check)
    lojax.peft.save(tmp_path / "adapter", adapter(1), BASE, NAMES)
    assert os.listdir(tmp_path) == ["adapter"], "the next save removes what the killed ones left"
