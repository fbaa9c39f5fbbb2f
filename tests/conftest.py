"""Every test runs on eight CPU devices, with strict dtype promotion, and compiles quickly unless it must not."""

import functools
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

# Jaxlib 0.10 has a quicker way to generate code for a CPU, with the same results: half the time of all tests. Where
# libtpu is installed it reads these flags too, and ends the process over one that it does not know.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    + ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    * (importlib.metadata.version("jaxlib").startswith("0.10.") and importlib.util.find_spec("libtpu") is None)
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

collect_ignore_glob = [
    "*/conftest.py",
    "*/make_golden.py",
]  # which hold no doctests; the one shares a name, the other needs torch

READS_COMPILED = re.compile(r"cost_analysis|memory_analysis|\.as_text\(")


@functools.cache
def optimized_tests(file: Path) -> str:
    """Which tests of a file see all of XLA's optimizations: "marked", "all" or "none"."""
    text = file.read_text()
    if "pytest.mark.optimized" in text:
        return "marked"
    return "all" if READS_COMPILED.search(text) else "none"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Two thirds of a test's time is compilation, most of it for optimizations that change no result.

    What lojax builds is the same without them. So they are left out, but where a test asserts what XLA makes of a
    program: in files that read costs, memory or the text of compiled programs, or that have the mark `optimized` (then
    in the tests that have it alone; `optimized(False)` on a whole file says that what it reads is made before).
    A hook rather than a fixture, so that fixtures of a module are compiled quickly as well.
    """
    which = optimized_tests(item.path)
    mark = item.get_closest_marker("optimized")
    quick = which == "none" or (which == "marked" and (mark is None or mark.args == (False,)))
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        return (yield)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
