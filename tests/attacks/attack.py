"""How large an attack is, and where its random numbers come from.

By default an attack is small enough for every run of the tests. To make it larger, or to repeat one::

    LOJAX_ATTACK_SIZE=1000 pytest tests/attacks
    LOJAX_ATTACK_SEED=123456 pytest tests/attacks
"""

from __future__ import annotations

import multiprocessing
import os
import random
import secrets
from typing import Any


def size(default: int) -> int:
    """The number of attempts."""
    return int(os.environ.get("LOJAX_ATTACK_SIZE", default))


def draw() -> random.Random:
    """Random numbers of a seed that is drawn anew each time, and printed."""
    seed = int(os.environ.get("LOJAX_ATTACK_SEED", secrets.randbits(32)))
    print(f"LOJAX_ATTACK_SEED={seed}")
    return random.Random(seed)


def forkserver() -> Any:
    """Starts children that need not import JAX again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lojax", "tests.checkpoint.checkpoint_cases", "tests.checkpoint.bank_cases"])
    return context
