"""One rule for each primitive that can meet an adapted weight."""

from lojax.rewrite.rules import control_flow, custom_derivatives, products  # noqa: F401  (each fills its part of the table)
