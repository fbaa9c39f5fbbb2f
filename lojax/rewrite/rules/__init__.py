"""One rule for each primitive that can take an adapted weight. A primitive without a rule materializes the weight."""

from collections.abc import Mapping

from lojax.rewrite.interpreter import EquationRule
from lojax.rewrite.rules import carriers, control_flow, custom_derivatives, products

RULES: Mapping[str, EquationRule] = {
    **products.RULES,
    **carriers.RULES,
    **control_flow.RULES,
    **custom_derivatives.RULES,
}
"""The rule of each primitive, by its name."""
