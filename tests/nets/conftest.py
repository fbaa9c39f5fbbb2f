"""What the tests of nets share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For code of other libraries (optax, transformers) that relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield
