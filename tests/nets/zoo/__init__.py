"""The nets that every release is proved on. A new net is one row in the file of its library."""

from tests.nets.zoo import equinox, functions, haiku, linen, nnx, transformers
from tests.nets.zoo.case import Case, Example

CASES: tuple[Case, ...] = (
    *functions.CASES,
    *linen.CASES,
    *nnx.CASES,
    *haiku.CASES,
    *equinox.CASES,
    *transformers.CASES,
)

__all__ = ["CASES", "Case", "Example"]
