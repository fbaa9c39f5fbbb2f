"""The settings of the runs of a sweep: which are numbers that differ, and so data of the compiled program."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lojax.text import suggest
from lojax.types import Array

Run = Mapping[str, Any]
"""The settings of one run by name: its learning rate, rank, seed, or anything else."""


class Settings(dict[str, Any]):
    """The settings of one run as the optimizer reads them: numbers that differ between runs are traced."""

    def __init__(self, settings: Mapping[str, Any], hidden: set[str]) -> None:
        super().__init__(settings)
        self.hidden = hidden

    def __missing__(self, name: str) -> None:
        if name in self.hidden:
            raise ValueError(
                f"optimizer reads the setting {name!r}, which differs between the runs and is no number. One program "
                "serves all runs: make a sweep for each of its values."
            )
        raise KeyError(f"optimizer reads {name!r}, and the runs have {[*self]}.{suggest(name, self)}")

    def get(self, name: str, default: Any = None) -> Any:
        """``self[name]``, or ``default`` where no run has such a setting."""
        return self[name] if name in self or name in self.hidden else default


def differing(runs: Sequence[Run]) -> set[str]:
    """The names of the settings that are not the same in all runs."""
    return {name for name, x in runs[0].items() if any(not _same(run[name], x) for run in runs)}


def _same(x: object, y: object) -> bool:
    return type(x) is type(y) and bool(np.all(np.asarray(x == y)))


def as_numbers(values: Sequence[Any]) -> Array | None:
    """The values as one array; None unless all are numbers that fit into 32 bits."""
    values = [x.item() if getattr(x, "shape", None) == () else x for x in values]
    if not all(isinstance(x, numbers.Real) for x in values):
        return None
    if not all(isinstance(x, numbers.Integral) for x in values):
        values = [float(x) for x in values]
    elif any(abs(int(x)) >= 2**31 for x in values):
        return None
    # A stack of weakly typed scalars is weakly typed: as a Python number does, it takes the dtype of what it meets.
    return jnp.stack([jnp.asarray(x) for x in values])
