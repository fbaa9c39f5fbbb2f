"""Every test runs on eight CPU devices, with strict dtype promotion."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

collect_ignore_glob = ["*/conftest.py"]  # which hold no doctests, and share a name


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of the program that lojax builds, and not of what XLA makes of it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
