"""The mathematics of ``w + s a b``: low-rank values, their products, and merging. No jaxprs here."""
