"""Every version of the format that was ever written stays readable: one golden checkpoint each.

``golden/v1`` was written by lojax 0.1.0 (jax 0.10.2, orbax-checkpoint 0.12.8), and ``golden/v2`` by the commit that
left out the digest of each array. Never write them again: a change that this test does not survive needs a new format
version, a reader for the old one, and ``golden/v3``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from helpers import assert_same_bits, message

import lojax
from lojax.checkpoint.manifest import VERSION
from lojax.checkpoint.save_restore import read_manifest

GOLDEN = Path(__file__).parent / "golden"


def _ramp(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 5) / 8


def _known() -> tuple[dict, dict]:
    """``(frozen, lora)`` in golden/v1: stacked and plain adapters, a box, bfloat16, odd names, numbers as keys."""
    frozen = {
        "blocks": {"kernel": jnp.asarray(_ramp(3, 6, 2, 4))},
        "head": {"bias": None, "w é": None},
        "mlp": {
            0: {"kernel": nn.Partitioned(jnp.asarray(_ramp(6, 4)), ("data", "model"))},
            1: jnp.ones(4, jnp.float16),
        },
    }
    stacked = lojax.Adapter(
        jnp.asarray(_ramp(3, 6, 2)), jnp.asarray(_ramp(3, 2, 2, 4)), 8.0, ("stack", "in", "out", "out"), 0.25
    )
    boxed = lojax.Adapter(
        nn.Partitioned(jnp.asarray(_ramp(6, 1)), ("data", None)),
        nn.Partitioned(jnp.asarray(_ramp(1, 4)), (None, "model")),
        0.1,
        ("in", "out"),
    )
    lora = {
        "blocks": {"kernel": stacked},
        "head": {"bias": jnp.asarray([1.5, float("nan"), -0.0], jnp.bfloat16), "w é": jnp.asarray(_ramp(4, 3))},
        "mlp": {0: {"kernel": boxed}, 1: None},
    }
    return frozen, lora


def test_a_golden_checkpoint_for_every_version():
    assert sorted(path.name for path in GOLDEN.glob("v*")) == [f"v{i + 1}" for i in range(VERSION)]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_restores_bit_for_bit(version):
    frozen, lora = _known()
    for given in ({}, {"frozen": frozen}, {"like": lora, "frozen": frozen}):
        assert_same_bits(lojax.restore(GOLDEN / version, **given), lora)
    manifest = read_manifest(GOLDEN / version)
    assert manifest.metadata == {"step": 1234, "note": "golden"}
    assert manifest.software["jax"] == "0.10.2"
    entry = manifest.adapters["blocks/kernel"]
    assert (entry.rank, entry.weight_shape, entry.scale) == (2, (3, 6, 2, 4), 8.0)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_numbers(version):
    """Straight from the file, with nothing of lojax but the name of the folder."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(GOLDEN / version / read_manifest(GOLDEN / version).arrays)
    assert found["blocks/kernel/a"].ravel()[:4].tolist() == [-0.625, -0.5, -0.375, -0.25]
    assert float(found["blocks/kernel/b"].sum()) == 48 * (47 / 2 - 5) / 8
    assert found["head/w%20%C3%A9"].shape == (4, 3)
    assert sorted(found) == [
        "blocks/kernel/a",
        "blocks/kernel/b",
        "head/bias",
        "head/w%20%C3%A9",
        "mlp/0/kernel/a",
        "mlp/0/kernel/b",
    ]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_knows_its_base(version):
    frozen, _ = _known()
    frozen["blocks"]["kernel"] = frozen["blocks"]["kernel"].at[0, 0, 0, 0].add(1)
    assert message(ValueError, lojax.restore, GOLDEN / version, frozen=frozen).startswith(
        "blocks/kernel: frozen holds other"
    )


@pytest.mark.parametrize(("version", "wait"), [("v1", True), ("v2", False)])
def test_what_is_written_today_says_the_same(tmp_path, version, wait):
    """The entries, but for dates, versions and file names, are those of the golden file."""
    frozen, lora = _known()
    shutil.copytree(GOLDEN / version, tmp_path / "x")  # and an old checkpoint can be replaced
    lojax.save(tmp_path / "x", lora, frozen=frozen, metadata={"step": 1234, "note": "golden"}, wait=wait).result()
    old, new = (read_manifest(path).to_json() for path in (GOLDEN / version, tmp_path / "x"))
    for name in ("saved", "software", "files", "arrays"):
        old.pop(name), new.pop(name)
    # New since these files: the content of vectors, such as biases and batch statistics, is in the fingerprint.
    assert new["base"]["mlp/1"].pop("content")
    assert old == new
