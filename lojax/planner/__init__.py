"""Plans of a fine-tuning run on accelerators that are not there: a decoder, its step, and what the compiler says."""

from lojax.planner.collectives import traffic
from lojax.planner.plan import plan, search

__all__ = ["plan", "search", "traffic"]
