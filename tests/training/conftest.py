"""What the tests of training share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def optax_promotes_dtypes() -> Iterator[None]:
    """For optax, which counts steps in integers and relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield
