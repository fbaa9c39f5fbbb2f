"""How an adapted net computes: low-rank values, products, and the jaxpr evaluator."""
